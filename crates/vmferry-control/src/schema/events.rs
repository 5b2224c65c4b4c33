//! Events: what happens without having been asked for.

use serde::{Deserialize, Serialize};

use super::{BalloonChangeData, MigrationStatus};

/// Something that clients are told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Event {
    /// The vCPUs stopped.
    Stop,
    /// The vCPUs run again.
    Resume,
    /// A migration changed its state. Only emitted while the `events` capability is on.
    Migration(MigrationData),
    /// A migration began another pass over RAM. Only emitted while the `events` capability is on.
    MigrationPass(MigrationPassData),
    /// The VM ends.
    Shutdown(ShutdownData),
    /// The VM's power button was pressed, with `system_powerdown`.
    Powerdown,
    /// The VM was reset.
    Reset(ShutdownData),
    /// The guest has taken memory from its balloon, or given some to it. At most once a second, as in QEMU.
    BalloonChange(BalloonChangeData),
}

/// Data of [`Event::Migration`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationData {
    /// The new state.
    pub status: MigrationStatus,
}

/// Data of [`Event::MigrationPass`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationPassData {
    /// Number of the pass, from 1.
    pub pass: u64,
}

/// Data of [`Event::Shutdown`] and [`Event::Reset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShutdownData {
    /// Whether the guest asked for it.
    pub guest: bool,
    /// Why.
    pub reason: ShutdownCause,
}

/// Why a VM ends or is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownCause {
    /// No reason.
    None,
    /// An error of the host.
    HostError,
    /// `quit`.
    HostQmpQuit,
    /// `system_reset`.
    HostQmpSystemReset,
    /// A signal, such as from Ctrl-C.
    HostSignal,
    /// The user interface.
    HostUi,
    /// The guest powered off.
    GuestShutdown,
    /// The guest reset itself, and resets are set to end the VM.
    GuestReset,
    /// The guest panicked.
    GuestPanic,
    /// A part of the machine was reset.
    SubsystemReset,
    /// A snapshot was loaded.
    SnapshotLoad,
}
