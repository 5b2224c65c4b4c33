//! The interrupt descriptor table, and the few things ring 3 asks of ring 0.

use core::arch::asm;

use super::cpu;
use super::serial;

/// The service of [`write_msr`].
const WRITE_MSR: u32 = 0;
/// The service of [`halt`].
const HALT: u32 = 1;
/// Vector of the breakpoint instruction, INT3.
const BREAKPOINT: u8 = 3;
/// Vector of the local APIC timer, which only ends a [`halt`].
pub const TIMER: u8 = 0x40;
/// Vector of the local APIC's spurious interrupts.
pub const SPURIOUS: u8 = 0xff;

/// Bytes of one stub in `exception_stubs`.
const STUB: u64 = 16;

unsafe extern "C" {
    static mut idt: [[u64; 2]; 256];
    static exception_stubs: u8;
    static breakpoint: u8;
    static interrupt_timer: u8;
    static interrupt_spurious: u8;
}

/// Fills the table in. Every processor has loaded its (then empty) address already.
pub fn init() {
    let stubs = (&raw const exception_stubs) as u64;
    for vector in 0..32 {
        set(vector, stubs + u64::from(vector) * STUB, 0);
    }
    set(BREAKPOINT, (&raw const breakpoint) as u64, 3);
    set(TIMER, (&raw const interrupt_timer) as u64, 0);
    set(SPURIOUS, (&raw const interrupt_spurious) as u64, 0);
}

/// Makes `vector` an interrupt gate to ring-0 code at `handler`; instructions may use it in ring `dpl`.
fn set(vector: u8, handler: u64, dpl: u64) {
    let low = (handler & 0xffff)
        | (0x10 << 16)
        | ((0x8e00 | (dpl << 13)) << 32)
        | ((handler >> 16 & 0xffff) << 48);
    // SAFETY: only the boot processor writes the table, before it starts the others, and the
    // processor reads it by address only, so there is no Rust reference to it anywhere.
    unsafe { (&raw mut idt[usize::from(vector)]).write_volatile([low, handler >> 32]) };
}

/// Writes a model-specific register of this processor.
///
/// # Safety
///
/// The value must not change how memory is mapped or which code runs.
pub unsafe fn write_msr(msr: u32, value: u64) {
    // SAFETY: the service runs WRMSR and returns; the rest is the caller's promise.
    unsafe {
        asm!(
            "int3",
            in("edi") WRITE_MSR,
            in("esi") msr,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
            out("ecx") _,
        );
    }
}

/// Sleeps until this processor takes an interrupt. Without [`super::lapic::start_ticks`] there is
/// none, and it sleeps for good.
pub fn halt() {
    // SAFETY: the service runs STI, HLT and CLI and returns. Interrupt handlers keep all registers,
    // and use the ring-0 stack.
    unsafe { asm!("int3", in("edi") HALT) };
}

/// Where an exception ends up, whatever ring it came from: reports it and ends the machine.
pub extern "C" fn exception_main(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    serial::last_words(format_args!(
        "exception vector={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x}"
    ));
    reset()
}

/// Ends the machine: the keyboard controller's reset line and, where there is no such controller, a
/// triple fault.
pub fn reset() -> ! {
    cpu::outb(0x64, 0xfe);
    // SAFETY: with no gate at all any exception is a triple fault; nothing else uses the table, and
    // no processor shall go on.
    unsafe { (&raw mut idt).write_volatile([[0; 2]; 256]) };
    // SAFETY: raises #UD, which does not come back.
    unsafe { asm!("ud2", options(noreturn)) }
}
