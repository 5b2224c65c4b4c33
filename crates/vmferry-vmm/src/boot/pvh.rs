//! The PVH entry: an ELF image whose note names a 32-bit entry point.

use std::io::Cursor;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Address, Bytes, GuestAddress};

use super::{BootError, Entry, Images, Occasion, elf, memory_map};
use crate::layout::{
    ACPI_TABLES, CMDLINE, HIGH_MEMORY, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO,
};
use crate::memory::GuestMemory;

const START_INFO_MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const START_INFO_VERSION: u32 = 1;

pub(super) fn load(
    images: &Images,
    image: &elf::Image,
    memory: &GuestMemory,
    ram: u64,
    occasion: Occasion,
) -> Result<Entry, BootError> {
    let loaded = Elf::load(memory, None, &mut Cursor::new(image.bytes()), None)
        .map_err(|e| BootError::BadImage(format!("{e}; is the guest's memory large enough?")))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::BadImage(
            "the ELF file has no PVH entry note: Linux needs CONFIG_PVH=y, or use a bzImage".into(),
        ));
    };
    if occasion == Occasion::Reset {
        // The loader leaves .bss alone, and the guest has written to it.
        for zeroed in image.zeroed() {
            zero(memory, zeroed.start, zeroed.len)?;
        }
    }

    let kernel_end = loaded.kernel_end.max(HIGH_MEMORY);
    let initrd = images.load_initrd(memory, ram, kernel_end, u64::MAX)?;
    let modules: Vec<_> = initrd
        .into_iter()
        .map(|(paddr, size)| hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        })
        .collect();
    let map: Vec<_> = memory_map(ram)
        .into_iter()
        .map(|(addr, size, kind)| hvm_memmap_table_entry {
            addr,
            size,
            type_: kind as u32,
            reserved: 0,
        })
        .collect();
    let start_info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { PVH_MODULES },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: ACPI_TABLES,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(PVH_START_INFO));
    params.set_sections(&map, GuestAddress(PVH_MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(|_| BootError::NoRoom {
        what: "the PVH start info",
    })?;
    Ok(Entry {
        rip: entry.raw_value(),
        rbx: PVH_START_INFO,
        rsi: 0,
    })
}

fn zero(memory: &GuestMemory, start: u64, len: u64) -> Result<(), BootError> {
    const ZEROS: [u8; 4096] = [0; 4096];
    for at in (start..start + len).step_by(ZEROS.len()) {
        let piece = (start + len - at).min(ZEROS.len() as u64) as usize;
        memory
            .write_slice(&ZEROS[..piece], GuestAddress(at))
            .map_err(|_| BootError::NoRoom {
                what: "the kernel's zeroed memory",
            })?;
    }
    Ok(())
}
