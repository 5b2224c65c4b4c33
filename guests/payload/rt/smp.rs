//! Starting the other processors.

use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};

use super::clock::Frequency;
use super::entry::MAX_CPUS;
use super::once::Once;
use super::{cpu, lapic, traps};

/// Where the real-mode code is copied: a page below 1 MiB.
const TRAMPOLINE: usize = 0x8000;

/// How long the processors get to appear. They need milliseconds on a host that has time for them.
const PATIENCE_MS: u64 = 2000;

/// Processors seen in ring 3, the boot processor included.
static ARRIVED: AtomicUsize = AtomicUsize::new(1);
/// How many of them shall work.
static WANTED: AtomicUsize = AtomicUsize::new(1);
static PROGRAM: Once<fn(usize) -> !> = Once::new();

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
}

/// Starts the other processors until `wanted` of them run, this one included; each new one calls
/// `program` with its number from 1. Returns how many run: fewer than `wanted` if the machine has
/// fewer, or they took too long. To be called once.
///
/// What the VMM left below 1 MiB (the command line, for one) must have been read before.
pub fn start(wanted: usize, tsc: Frequency, program: fn(usize) -> !) -> usize {
    let wanted = wanted.min(MAX_CPUS);
    if wanted == 1 {
        return 1;
    }
    let code = &raw const trampoline_start;
    let length = (&raw const trampoline_end) as usize - code as usize;
    // SAFETY: the page at TRAMPOLINE is RAM below 1 MiB on every PC-like machine, outside the image,
    // and the length is that of a few instructions.
    unsafe { ptr::copy_nonoverlapping(code, TRAMPOLINE as *mut u8, length) };
    WANTED.store(wanted, Ordering::Relaxed);
    // SAFETY: the only call, because this function is called once.
    unsafe { PROGRAM.set(program) };

    lapic::init_others();
    tsc.wait_us(10_000);
    for _ in 0..2 {
        lapic::start_others((TRAMPOLINE >> 12) as u8);
        tsc.wait_us(200);
    }
    let end = cpu::tsc() + tsc.ticks_us(PATIENCE_MS * 1000);
    while ARRIVED.load(Ordering::Relaxed) < wanted && cpu::tsc() < end {
        core::hint::spin_loop();
    }
    // Whoever arrives from now on gets a number that is too high, and parks.
    ARRIVED.swap(MAX_CPUS, Ordering::Relaxed).min(wanted)
}

/// What each of the other processors does. They arrive in any order.
pub fn application_processor() -> ! {
    let number = ARRIVED.fetch_add(1, Ordering::Relaxed);
    if number < WANTED.load(Ordering::Relaxed) {
        PROGRAM.wait()(number);
    }
    loop {
        traps::halt();
    }
}
