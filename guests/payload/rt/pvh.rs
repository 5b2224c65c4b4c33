//! What the VMM passes in: `struct hvm_start_info`, version 1, of the PVH boot protocol.

use core::ffi::CStr;

/// `struct hvm_start_info`.
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// `struct hvm_memmap_table_entry`.
#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

/// Physical memory from `start` up to `end`, both multiples of 4096.
#[derive(Clone, Copy, Default)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
}

/// The RAM of the machine, as few regions.
#[derive(Default)]
pub struct RamMap {
    regions: [Region; 16],
    count: usize,
}

impl RamMap {
    /// Adds a region, without the pages that are in it only in part; an empty one, or one too many,
    /// is left out.
    pub fn push(&mut self, region: Region) {
        let region = Region {
            start: region.start.next_multiple_of(4096),
            end: region.end & !4095,
        };
        if region.start < region.end && self.count < self.regions.len() {
            self.regions[self.count] = region;
            self.count += 1;
        }
    }

    /// The regions, in the order of the VMM's map.
    pub fn regions(&self) -> &[Region] {
        &self.regions[..self.count]
    }
}

/// The command line and the RAM.
pub struct BootInfo {
    /// Where the VMM put it, which is somewhere in RAM: to be read before that RAM is used.
    pub command_line: &'static str,
    /// RAM from 1 MiB up.
    pub ram: RamMap,
}

/// Reads what the VMM left. An error says what is wrong with it.
///
/// # Safety
///
/// `start_info` must be what the VMM passed in EBX at the PVH entry, and the VMM's structures must
/// still be as it left them, below 1 GiB.
pub unsafe fn read(start_info: u64) -> Result<BootInfo, &'static str> {
    // SAFETY: the caller's promise.
    let info = unsafe { &*(start_info as *const StartInfo) };
    if info.magic != MAGIC {
        return Err("EBX does not point to a PVH start_info");
    }
    if info.version < 1 || info.memory_map_entries == 0 {
        return Err("the PVH start_info has no memory map");
    }
    let mut ram = RamMap::default();
    for index in 0..u64::from(info.memory_map_entries) {
        let address = info.memory_map + index * size_of::<MapEntry>() as u64;
        // SAFETY: the caller's promise, and the index is inside the map.
        let entry = unsafe { &*(address as *const MapEntry) };
        if entry.kind == RAM {
            ram.push(Region {
                start: entry.address.max(1 << 20),
                end: entry.address + entry.size,
            });
        }
    }
    let command_line = if info.command_line == 0 {
        ""
    } else {
        // SAFETY: the caller's promise; the protocol says that it ends with a zero byte.
        unsafe { CStr::from_ptr(info.command_line as *const _) }
            .to_str()
            .map_err(|_| "the command line is not UTF-8")?
    };
    Ok(BootInfo { command_line, ram })
}
