//! A guest of a few hundred bytes that shows what it does: it prints digits, counts what happens to it in
//! memory, and obeys a command byte. It needs no paging and runs in ring 0 throughout.

use std::arch::global_asm;
use std::borrow::Cow;

use crate::config::KernelSource;

/// The time stamp counter, as last read; eight bytes.
pub(super) const TSC: u64 = 0xb000;
/// How often it went backwards.
pub(super) const BACKWARDS: u64 = 0xb010;
/// Ticks of the local APIC's timer in TSC-deadline mode.
pub(super) const TICKS: u64 = 0xb020;
/// A command of the test to the guest.
pub(super) const COMMAND: u64 = 0xb030;
/// Value of a counter in `.bss` after it was incremented once at the entry.
pub(super) const BOOTS: u64 = 0xb040;
/// Incremented by all application processors together.
pub(super) const AP_COUNTER: u64 = 0xb050;
/// The guest's kvmclock page.
pub(super) const PVCLOCK: u64 = 0xa000;

/// Commands.
pub(super) const RESET: u8 = 1;
pub(super) const TRIPLE_FAULT: u8 = 2;
pub(super) const UNKNOWN_IO: u8 = 3;
/// Sleep, type 5.
pub(super) const POWER_OFF: u8 = 4;
/// Write to the reset register that ACPI names.
pub(super) const ACPI_RESET: u8 = 5;
/// Notify queue 0 of the first virtio slot.
pub(super) const NOTIFY: u8 = 6;
/// Read the event selector, and put what it says at [`SELECTOR`].
pub(super) const READ_SELECTOR: u8 = 7;
/// The event selector, as last read.
pub(super) const SELECTOR: u64 = 0xb070;

const LOAD: u64 = 0x10_0000;

global_asm!(
    ".pushsection .rodata.vmferry_guest, \"a\"",
    ".global vmferry_guest_start",
    ".global vmferry_guest_end",
    ".code32",
    "vmferry_guest_start:",
    "  mov $0x9f000, %esp",
    "  incl 0x101000", // .bss
    "  mov 0x101000, %eax",
    "  mov %eax, 0xb040",
    "  movb $0, 0xb030",
    "  movl $0, 0xb000",
    "  movl $0, 0xb004",
    // kvmclock
    "  mov $0x4b564d01, %ecx",
    "  mov $0xa001, %eax",
    "  xor %edx, %edx",
    "  wrmsr",
    // Interrupt 0x40 goes to `tick`.
    "  movl $(0x100000 + tick - vmferry_guest_start), %eax",
    "  mov %eax, %ebx",
    "  and $0xffff, %eax",
    "  or $0x100000, %eax",
    "  mov %eax, 0xc200",
    "  and $0xffff0000, %ebx",
    "  or $0x8e00, %ebx",
    "  mov %ebx, 0xc204",
    "  lidt 0x100000 + idtr - vmferry_guest_start",
    // The local APIC: on, timer in TSC-deadline mode.
    "  movl $0x1ff, 0xfee000f0",
    "  movl $0x40040, 0xfee00320",
    "  call arm",
    // Application processors start at 0x10000.
    "  mov $(0x100000 + ap - vmferry_guest_start), %esi",
    "  mov $0x10000, %edi",
    "  mov $(ap_end - ap), %ecx",
    "  rep movsb",
    "  movl $0xc4500, 0xfee00300",
    "  mov $1000, %ecx",
    "2: loop 2b",
    "  movl $0xc4610, 0xfee00300",
    "  mov $100, %ecx",
    "2: loop 2b",
    "  movl $0xc4610, 0xfee00300",
    "  xor %ebx, %ebx",
    "3: mov $50, %ebp",
    "4: rdtsc",
    "  cmp 0xb004, %edx",
    "  jb 5f",
    "  ja 6f",
    "  cmp 0xb000, %eax",
    "  jae 6f",
    "5: incl 0xb010",
    "6: mov %eax, 0xb000",
    "  mov %edx, 0xb004",
    "  mov 0xb030, %cl",
    "  cmp $1, %cl",
    "  je 7f",
    "  cmp $2, %cl",
    "  je 8f",
    "  cmp $3, %cl",
    "  je 9f",
    "  cmp $4, %cl",
    "  je power_off",
    "  cmp $5, %cl",
    "  je acpi_reset",
    "  cmp $6, %cl",
    "  je notify",
    "  cmp $7, %cl",
    "  je read_selector",
    "1: dec %ebp",
    "  jnz 4b",
    // The next digit, after the next tick.
    "  sti",
    "  hlt",
    "  cli",
    "  mov $0x3f8, %dx",
    "  lea 0x30(%ebx), %eax",
    "  out %al, %dx",
    "  inc %ebx",
    "  cmp $10, %ebx",
    "  jb 3b",
    "  xor %ebx, %ebx",
    "  jmp 3b",
    "7: mov $0xfe, %al",
    "  out %al, $0x64",
    // What a CPU that was reset must never come to.
    "  movb $33, %al",
    "  mov $0x3f8, %dx",
    "  out %al, %dx",
    "  jmp 7b",
    "8: lidt 0x100000 + no_idt - vmferry_guest_start",
    "  ud2",
    // Unknown ports and addresses read as all ones.
    "9: movb $0, 0xb030",
    "  mov $0x1234, %dx",
    "  in %dx, %eax",
    "  out %eax, %dx",
    "  mov %eax, 0xb060",
    "  mov 0xd0000000, %eax",
    "  mov %eax, 0xd0000000",
    "  mov %eax, 0xb064",
    "  jmp 1b",
    "power_off:",
    "  movb $0x34, 0xfea00200",
    // What a CPU that was switched off must never come to.
    "  movb $33, %al",
    "  mov $0x3f8, %dx",
    "  out %al, %dx",
    "  jmp power_off",
    "acpi_reset:",
    "  movb $0x42, 0xfea00202",
    "  jmp acpi_reset",
    "notify:",
    "  movb $0, 0xb030",
    "  movl $0, 0xfeb00050",
    "  jmp 1b",
    "read_selector:",
    "  movb $0, 0xb030",
    "  mov 0xfea00000, %eax",
    "  mov %eax, 0xb070",
    "  jmp 1b",
    "tick:",
    "  pusha",
    "  incl 0xb020",
    "  call arm",
    "  movl $0, 0xfee000b0",
    "  popa",
    // Back without IRET, which KVM cannot emulate in protected mode: the interrupted code is in the same
    // segment, and its flags mean nothing where interrupts are on.
    "  ret $8",
    "arm:",
    "  rdtsc",
    "  add $2000000, %eax", // about a millisecond
    "  adc $0, %edx",
    "  mov $0x6e0, %ecx",
    "  wrmsr",
    "  ret",
    "idtr: .word 0x7ff",
    "  .long 0xc000",
    "no_idt: .word 0",
    "  .long 0",
    ".code16",
    "ap:",
    "  xor %ax, %ax",
    "  mov %ax, %ds",
    "1: lock incl 0xb050",
    "  jmp 1b",
    "ap_end:",
    ".code64",
    "vmferry_guest_end:",
    ".popsection",
    options(att_syntax)
);

unsafe extern "C" {
    static vmferry_guest_start: u8;
    static vmferry_guest_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const vmferry_guest_start, &raw const vmferry_guest_end);
    // SAFETY: the two labels delimit bytes of the test's read-only data.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// An ELF image of the guest with one loadable segment (and a page of `.bss` at 0x101000) and a PVH note.
pub(super) fn elf() -> Vec<u8> {
    let code = code();
    assert!(code.len() < 0x1000);
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend((LOAD as u32).to_le_bytes());

    let note_at = 64 + 2 * 56;
    let code_at = note_at + note.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    elf.extend(LOAD.to_le_bytes());
    elf.extend(64u64.to_le_bytes()); // program headers
    elf.extend(0u64.to_le_bytes());
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    let mut header = |kind: u32, at: u64, address: u64, file: u64, memory: u64| {
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        for word in [at, address, address, file, memory, 4] {
            elf.extend(word.to_le_bytes());
        }
    };
    let len = code.len() as u64;
    header(1, code_at, LOAD, len, 0x2000);
    header(4, note_at, 0, note.len() as u64, note.len() as u64);
    elf.extend(note);
    elf.extend(code);
    elf
}

/// A bzImage of the guest: two sectors of setup with the fields that a loader reads, then the code.
pub(super) fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[1]); // setup sectors beside the boot sector
    set(0x1fe, &0xaa55_u16.to_le_bytes());
    set(0x202, b"HdrS");
    set(0x206, &0x20f_u16.to_le_bytes());
    set(0x211, &[1]); // loaded high
    set(0x214, &(LOAD as u32).to_le_bytes());
    set(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // highest address of the initial RAM disk
    set(0x238, &2047_u32.to_le_bytes()); // longest command line
    set(0x258, &LOAD.to_le_bytes());
    set(0x260, &0x10_0000_u32.to_le_bytes());
    image.extend(code());
    image
}

pub(super) fn kernel() -> KernelSource {
    KernelSource::Bytes(Cow::Owned(elf()))
}
