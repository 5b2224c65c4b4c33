//! The local APIC, through its page at the architectural address: ring 3 may use it.

use super::cpu;
use super::traps;

/// Physical address of the registers.
pub const BASE: usize = 0xfee0_0000;

const SPURIOUS_VECTOR: usize = 0xf0;
const COMMAND: usize = 0x300;
const LVT_TIMER: usize = 0x320;
const LVT_LINT0: usize = 0x350;
const TIMER_COUNT: usize = 0x380;
const TIMER_LEFT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;

const SOFTWARE_ENABLE: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_ONE: u32 = 0b1011;

/// KVM's timer counts nanoseconds unless the VMM says otherwise, and so does QEMU's emulation.
const TIMER_HZ: u32 = 1_000_000_000;

fn write(register: usize, value: u32) {
    // SAFETY: the page is mapped by the boot page tables and holds device registers, not Rust memory.
    unsafe { ((BASE + register) as *mut u32).write_volatile(value) };
}

fn read(register: usize) -> u32 {
    // SAFETY: as for `write`.
    unsafe { ((BASE + register) as *const u32).read_volatile() }
}

/// Sends INIT to all other processors.
pub fn init_others() {
    write(COMMAND, 0x000c_4500);
}

/// Sends the start-up IPI to all other processors: they start at `page` * 4096 in real mode.
pub fn start_others(page: u8) {
    write(COMMAND, 0x000c_4600 | u32::from(page));
}

/// Starts a timer interrupt of this processor, `hz` times a second, for [`traps::halt`] to wake up
/// from. It is periodic rather than one-shot so that a single lost tick cannot stop the guest.
pub fn start_ticks(hz: u32) {
    // Only the timer is to interrupt: the two PICs and the APIC's pin for them are masked.
    cpu::outb(0x21, 0xff);
    cpu::outb(0xa1, 0xff);
    write(
        SPURIOUS_VECTOR,
        SOFTWARE_ENABLE | u32::from(traps::SPURIOUS),
    );
    write(LVT_LINT0, MASKED);
    write(LVT_TIMER, PERIODIC | u32::from(traps::TIMER));
    write(TIMER_DIVIDE, DIVIDE_BY_ONE);
    write(TIMER_COUNT, TIMER_HZ / hz);
}

/// Starts the timer from its highest value, without an interrupt.
pub fn start_countdown() {
    write(
        SPURIOUS_VECTOR,
        SOFTWARE_ENABLE | u32::from(traps::SPURIOUS),
    );
    write(LVT_TIMER, MASKED);
    write(TIMER_DIVIDE, DIVIDE_BY_ONE);
    write(TIMER_COUNT, u32::MAX);
}

/// Nanoseconds since [`start_countdown`].
pub fn counted_ns() -> u32 {
    u32::MAX - read(TIMER_LEFT)
}
