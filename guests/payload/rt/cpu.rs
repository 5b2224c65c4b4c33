//! Single instructions.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;

/// Writes one byte to an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: ring 3 may use the ports up to 0x3ff, and others only raise an exception. No device that the guest talks to reads or writes memory because of
    // a port write; a reset ends the program, which is no memory error either.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Reads one byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as for `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// The processor's time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: CR4.TSD is clear, so RDTSC works in ring 3.
    unsafe { _rdtsc() }
}
