//! Linux's bzImage, entered by the 32-bit boot protocol.

use std::io::Cursor;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Address, GuestAddress};

use super::{BootError, Entry, Images, memory_map};
use crate::layout::{ACPI_TABLES, CMDLINE, HIGH_MEMORY, LINUX_BOOT_PARAMS};
use crate::memory::GuestMemory;

/// Where the setup header's magic number is, and what it is.
const MAGIC_AT: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
/// `type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

pub(super) fn is_bzimage(image: &[u8]) -> bool {
    image.get(MAGIC_AT..MAGIC_AT + MAGIC.len()) == Some(MAGIC)
}

pub(super) fn load(
    images: &Images,
    image: &[u8],
    memory: &GuestMemory,
    ram: u64,
) -> Result<Entry, BootError> {
    let loaded = BzImage::load(
        memory,
        None,
        &mut Cursor::new(image),
        Some(GuestAddress(HIGH_MEMORY)),
    )
    .map_err(|e| BootError::BadImage(format!("{e}; is the guest's memory large enough?")))?;
    let Some(header) = loaded.setup_header else {
        return Err(BootError::BadImage(
            "the bzImage has no setup header".into(),
        ));
    };

    let max = header.cmdline_size as usize;
    // Before protocol 2.06 the field is not there and the limit is 255.
    let max = if header.version < 0x206 { 255 } else { max };
    if images.cmdline.len() > max {
        return Err(BootError::Cmdline {
            len: images.cmdline.len(),
            max,
        });
    }
    // The kernel unpacks itself to pref_address and needs init_size bytes there.
    let kernel_end = loaded
        .kernel_end
        .max(header.pref_address.saturating_add(header.init_size.into()));
    let initrd_limit = u64::from(header.initrd_addr_max) + 1;
    let initrd = images.load_initrd(memory, ram, kernel_end, initrd_limit)?;

    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: ACPI_TABLES,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    if let Some((start, len)) = initrd {
        // Both are below 4 GiB: the disk lies in the low RAM.
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = len as u32;
    }
    let map = memory_map(ram);
    params.e820_entries = map.len() as u8;
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: kind as u32,
        };
    }
    let params = BootParams::new(&params, GuestAddress(LINUX_BOOT_PARAMS));
    LinuxBootConfigurator::write_bootparams(&params, memory).map_err(|_| BootError::NoRoom {
        what: "the boot parameters",
    })?;
    Ok(Entry {
        rip: loaded.kernel_load.raw_value(),
        rbx: 0,
        rsi: LINUX_BOOT_PARAMS,
    })
}
