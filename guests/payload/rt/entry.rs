//! Where the processors enter Rust, in ring 3. `entry.s` is what runs before.

use core::arch::global_asm;

use super::virtio::registers;
use super::{lapic, serial, smp, traps};

/// The most processors the guest can run on.
pub const MAX_CPUS: usize = 64;

const CPU_BLOCK_SHIFT: usize = 15;
const RING0_STACK: usize = 1024;
/// Room for a task state segment with an I/O bitmap.
const TSS: usize = 256;

global_asm!(
    include_str!("entry.s"),
    MAX_CPUS = const MAX_CPUS,
    CPU_BLOCK_SHIFT = const CPU_BLOCK_SHIFT,
    CPU_BLOCK = const 1usize << CPU_BLOCK_SHIFT,
    RING0_STACK = const RING0_STACK,
    TSS = const TSS,
    LAPIC = const lapic::BASE,
    DEVICES = const registers::MAPPED,
    cpu_main = sym cpu_main,
    exception_main = sym traps::exception_main,
    options(att_syntax)
);

/// The first Rust code of each processor: processor 0 is the boot processor.
///
/// SSE is on, interrupts are off, and no interrupt ever uses this stack (ring 0 has its own), so the
/// red zone that the compiler counts on is safe.
extern "C" fn cpu_main(cpu: u32, start_info: u32) -> ! {
    if cpu != 0 {
        smp::application_processor();
    }
    serial::init();
    traps::init();
    crate::main(u64::from(start_info))
}
