//! The guest's physical address space.
//!
//! | from | what |
//! |---|---|
//! | 0 | RAM, up to 3 GiB |
//! | 0x500 | boot GDT |
//! | 0x6000 | PVH start info, module list and memory map |
//! | 0x8000 | Linux boot parameters |
//! | 0x20000 | kernel command line |
//! | 0x9fc00 - 1 MiB | RAM that the memory map keeps for firmware: ACPI's tables from 0xe0000, the reset vector 0xffff0 |
//! | 1 MiB | usual load address of kernels; the initial RAM disk lies at the end of the low RAM |
//! | 0xfea00000 | generic event device: power button, power-off, reset |
//! | 0xfeb00000 | virtio-mmio slots, 512 bytes each |
//! | 0xfec00000, 0xfee00000 | I/O APIC, local APICs |
//! | 0xfffbc000 | four pages that KVM keeps for itself on some Intel CPUs |
//! | 4 GiB | RAM beyond the first 3 GiB |

/// Where the RAM below 4 GiB ends at the latest; QEMU's microvm has its hole here too.
pub(crate) const LOW_RAM_END: u64 = 0xc000_0000;
/// Where the rest of the RAM begins.
pub(crate) const HIGH_RAM_START: u64 = 1 << 32;

/// Segment descriptors for the entry into the kernel.
pub(crate) const BOOT_GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH entry.
pub(crate) const PVH_START_INFO: u64 = 0x6000;
/// Its list of modules (the initial RAM disk).
pub(crate) const PVH_MODULES: u64 = 0x6040;
/// Its memory map.
pub(crate) const PVH_MEMORY_MAP: u64 = 0x7000;
/// Linux's `boot_params`.
pub(crate) const LINUX_BOOT_PARAMS: u64 = 0x8000;
/// The command line, NUL-terminated.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its NUL.
pub(crate) const CMDLINE_ROOM: usize = 0x1_0000;
/// End of the first piece of usable RAM.
pub(crate) const LOW_AREA_END: u64 = 0x9_fc00;
/// Where usable RAM begins again.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

/// Where the ACPI tables begin, with the root pointer. Kernels without a pointer to it search from here on.
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;

/// Where a PC's firmware begins after a reset, for code in real mode. Kernels jump there to reset the machine.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;

/// Registers of the generic event device; QEMU's microvm has them here too.
pub(crate) const EVENT_DEVICE: u64 = 0xfea0_0000;
/// Its interrupt.
pub(crate) const EVENT_DEVICE_IRQ: u32 = 9;

/// Registers of the first virtio-mmio slot.
pub(crate) const VIRTIO_MMIO: u64 = 0xfeb0_0000;
/// Bytes of a slot.
pub(crate) const VIRTIO_MMIO_SLOT: u64 = 512;
/// How many slots there are.
pub(crate) const VIRTIO_MMIO_SLOTS: u32 = 24;
/// The first of the interrupts that the slots take in turn: the lines of the I/O APIC that no legacy device can have.
const VIRTIO_MMIO_IRQ: u32 = 16;
/// How many these are.
pub(crate) const VIRTIO_MMIO_IRQS: u32 = 8;

/// Address of a virtio-mmio slot's registers.
pub(crate) fn virtio_slot(slot: u32) -> u64 {
    VIRTIO_MMIO + u64::from(slot) * VIRTIO_MMIO_SLOT
}

/// Interrupt of a virtio-mmio slot. Beyond the first [`VIRTIO_MMIO_IRQS`] slots, lines are shared.
pub(crate) fn virtio_irq(slot: u32) -> u32 {
    VIRTIO_MMIO_IRQ + slot % VIRTIO_MMIO_IRQS
}

/// Registers of the I/O APIC.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// Registers of each local APIC.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// One page of identity-mapping page table that KVM needs on Intel CPUs without unrestricted guest mode, and
/// behind it three pages of task state.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// I/O ports of the serial port.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// I/O port of the keyboard controller's data; its commands go to the port four above.
pub(crate) const I8042_PORT: u16 = 0x60;
