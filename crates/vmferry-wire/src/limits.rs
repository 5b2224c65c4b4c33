//! What a peer may make us hold, in bytes unless it says otherwise.
//!
//! Everything in a stream comes from someone else. Each length is compared with its limit before anything
//! is allocated for it, and memory for a long item grows as its bytes arrive, not as they are promised.
//! The encoder keeps to the same limits, so that vmferry never writes what it would not read.

/// State of one device.
pub const DEVICE_STATE: usize = 16 << 20;

/// State of all devices of a stream together, the machine's description included.
pub const ALL_DEVICE_STATES: usize = 64 << 20;

/// How many FULL sections a stream may have.
pub const DEVICE_SECTIONS: usize = 4096;

/// The JSON description at the end of a stream. QEMU 10 writes 15 KiB for a microvm.
pub const VM_DESCRIPTION: usize = 1 << 20;

/// The machine type of the CONFIGURATION section.
pub const MACHINE_NAME: usize = 256;

/// Names of sections and RAM blocks: their length is one byte on the wire.
pub const NAME: usize = 255;

/// The sentence of [`crate::ReturnPathMessage::Error`].
pub const ERROR_SENTENCE: usize = 1024;
