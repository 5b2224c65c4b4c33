//! The serial line at 0x3f8: whole lines, also when several processors print.
//!
//! A byte costs an exit to the VMM, tens of microseconds. So there are two ways to print: [`say!`]
//! prints at once, and a [`LineQueue`] lets a program that watches its own timing print a few bytes
//! now and then.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::cpu;

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// Bytes that the empty FIFO takes: the status is read once for so many.
const FIFO: u8 = 16;

/// Held while a line is on its way.
static BUSY: AtomicBool = AtomicBool::new(false);
/// Room that is left in the FIFO; for the holder of `BUSY` only.
static ROOM: AtomicU8 = AtomicU8::new(0);

/// Sets the line up: 115200 baud, 8 bits, no interrupts, FIFO on.
pub fn init() {
    const DIVISOR_LATCH: u8 = 0x80;
    const EIGHT_BITS: u8 = 3;
    cpu::outb(PORT + 1, 0);
    cpu::outb(PORT + 3, DIVISOR_LATCH);
    cpu::outb(PORT, 1);
    cpu::outb(PORT + 1, 0);
    cpu::outb(PORT + 3, EIGHT_BITS);
    cpu::outb(PORT + 2, 0b111);
}

fn lock() -> bool {
    !BUSY.swap(true, Ordering::Acquire)
}

fn unlock() {
    BUSY.store(false, Ordering::Release);
}

/// Sends a byte if the line takes one.
fn send(byte: u8) -> bool {
    let mut room = ROOM.load(Ordering::Relaxed);
    if room == 0 {
        if cpu::inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
            return false;
        }
        room = FIFO;
    }
    cpu::outb(PORT, byte);
    ROOM.store(room - 1, Ordering::Relaxed);
    true
}

/// Sends without a queue.
struct Direct;

impl Write for Direct {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while !send(byte) {
                core::hint::spin_loop();
            }
        }
        Ok(())
    }
}

/// Prints one line at once; see [`say!`].
pub fn print(line: fmt::Arguments) {
    while !lock() {
        core::hint::spin_loop();
    }
    // `Direct` never fails.
    let _ = write!(Direct, "{}: {line}\r\n", crate::NAME);
    unlock();
}

/// Prints a line without regard to others that are being printed, for a guest that is about to end.
pub fn last_words(line: fmt::Arguments) {
    let _ = write!(Direct, "\r\n{}: {line}\r\n", crate::NAME);
}

/// Prints one line at once, like `println!`, behind the program's name.
macro_rules! say {
    ($($line:tt)*) => { $crate::rt::serial::print(format_args!($($line)*)) };
}
pub(crate) use say;

/// Lines that wait to be printed, of one processor.
pub struct LineQueue {
    bytes: [u8; Self::SIZE],
    /// Bytes ever put in.
    put: usize,
    /// Bytes ever sent.
    sent: usize,
    /// Whether this processor holds the line, in the middle of one.
    holding: bool,
}

impl LineQueue {
    const SIZE: usize = 4096;

    /// An empty queue.
    pub const fn new() -> Self {
        Self {
            bytes: [0; Self::SIZE],
            put: 0,
            sent: 0,
            holding: false,
        }
    }

    /// Adds one line behind the program's name; prints older ones first if there is no room.
    pub fn push(&mut self, line: fmt::Arguments) {
        // The queue itself never fails.
        let _ = write!(self, "{}: {line}\r\n", crate::NAME);
    }

    /// Sends up to `most` bytes, and no more than the rest of one line. Says whether it did anything.
    pub fn drain(&mut self, most: usize) -> bool {
        let before = self.sent;
        for _ in 0..most {
            if self.sent == self.put {
                break;
            }
            if !self.holding && !lock() {
                break;
            }
            self.holding = true;
            let byte = self.bytes[self.sent % Self::SIZE];
            if !send(byte) {
                break;
            }
            self.sent += 1;
            if byte == b'\n' {
                self.holding = false;
                unlock();
                break;
            }
        }
        self.sent != before
    }

    /// Sends all.
    pub fn flush(&mut self) {
        while self.sent != self.put {
            self.drain(usize::MAX);
        }
    }
}

impl Write for LineQueue {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            while self.put - self.sent == Self::SIZE {
                self.drain(usize::from(FIFO));
            }
            self.bytes[self.put % Self::SIZE] = byte;
            self.put += 1;
        }
        Ok(())
    }
}
