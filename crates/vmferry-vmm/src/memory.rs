//! Guest RAM: one block, mapped once, that the guest sees in two pieces around the hole below 4 GiB.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::null_mut;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmferry_dirty::log::{KvmSlot, VmmWriteLog, VmmWrites};
use vmferry_dirty::{BlockIndex, PAGE_SIZE};
use vmferry_engine::seam::RamBlock;

use crate::config::Backing;
use crate::dirty_log::{Chosen, KvmLog};
use crate::error::{Attempt, MachineError};
use crate::layout::{HIGH_RAM_START, LOW_RAM_END};
use crate::vcpu::Vcpu;

/// The RAM block's name in the stream; QEMU's microvm calls it so.
pub(crate) const BLOCK_NAME: &str = "microvm.ram";

/// Alignment of the mapping, so that huge pages can back it.
const HUGE_PAGE: usize = 2 << 20;

/// What the kernel is advised about guest memory, and what for. A guest runs without any of it.
const ADVICE: [(libc::c_int, &str); 3] = [
    (libc::MADV_HUGEPAGE, "have huge pages for guest memory"),
    // A guest's secrets are not for whoever reads the core dumps of this process, and a dump without them fits on a disk.
    (libc::MADV_DONTDUMP, "leave guest memory out of core dumps"),
    // A command that is started costs no copy of page tables, and the guest no fault for each page that it writes next.
    (
        libc::MADV_DONTFORK,
        "keep guest memory from child processes",
    ),
];

/// Guest memory as the VMM reads and writes it; all its writes are logged.
pub(crate) type GuestMemory = GuestMemoryMmap<VmmWrites>;

/// One piece of the block as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Guest physical address of its first byte.
    pub guest_addr: u64,
    /// Offset of that byte in the block.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// How the guest sees a block of `memory` bytes.
pub(crate) fn pieces(memory: u64) -> Vec<Piece> {
    let low = memory.min(LOW_RAM_END);
    let mut pieces = vec![Piece {
        guest_addr: 0,
        offset: 0,
        len: low,
    }];
    if memory > low {
        pieces.push(Piece {
            guest_addr: HIGH_RAM_START,
            offset: low,
            len: memory - low,
        });
    }
    pieces
}

/// A mapping of this process, unmapped when dropped.
///
/// # Invariant
///
/// `addr..addr + len` is mapped readable and writable for as long as the value lives, and nothing in it is
/// ever touched through a Rust reference.
#[derive(Debug)]
struct Mapping {
    addr: *mut u8,
    len: usize,
}

// SAFETY: the pointer is only the address of memory that any thread may access (see the invariant).
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize, backing: Backing) -> io::Result<Self> {
        let room = len
            .checked_add(HUGE_PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new reservation at an address of the kernel's choice touches no existing memory.
        let reserved = unsafe {
            libc::mmap(
                null_mut(),
                room,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = (reserved as usize).next_multiple_of(HUGE_PAGE) - reserved as usize;
        let addr = reserved.wrapping_byte_add(before);
        let (file, flags) = match backing {
            Backing::Private => (None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
            Backing::Memfd => (Some(memfd(len)?), libc::MAP_SHARED),
        };
        // SAFETY: the range lies in the reservation made above, which nothing else uses: before + len is at
        // most `room`.
        let mapped = unsafe {
            libc::mmap(
                addr,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_ref().map_or(-1, |f| f.as_raw_fd()),
                0,
            )
        };
        let error = io::Error::last_os_error();
        // SAFETY: both ranges are the rest of the reservation, which nothing uses.
        unsafe {
            if before > 0 {
                libc::munmap(reserved, before);
            }
            libc::munmap(addr.wrapping_byte_add(len), HUGE_PAGE - before);
        }
        if mapped == libc::MAP_FAILED {
            return Err(error);
        }
        let mapping = Mapping {
            addr: addr.cast(),
            len,
        };
        for (advice, purpose) in ADVICE {
            // SAFETY: the range is the mapping; none of the advice changes its contents, and the child of a fork, which
            // does not get it, has no use for it: children of this process only execute something else.
            if unsafe { libc::madvise(addr, len, advice) } != 0 {
                let error = io::Error::last_os_error();
                tracing::debug!(%error, "cannot {purpose}");
            }
        }
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and, by the invariant, nobody uses it any more.
        unsafe { libc::munmap(self.addr.cast(), self.len) };
    }
}

fn memfd(len: usize) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated string.
    let fd = unsafe { libc::memfd_create(c"vmferry-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64)?;
    Ok(file)
}

/// The guest's RAM.
pub(crate) struct GuestRam {
    /// It in the guest's addresses.
    pub memory: GuestMemory,
    /// It as the engine sees it: one block.
    pub blocks: [RamBlock; 1],
    slots: Vec<KvmSlot>,
    writes: Arc<VmmWriteLog>,
}

impl GuestRam {
    /// Maps `bytes` of RAM, all zero.
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, MachineError> {
        let len = bytes as usize;
        let mapping = Mapping::new(len, backing).map_err(|source| MachineError::Os {
            action: format!("map {} MiB of guest memory", bytes >> 20),
            source,
        })?;
        let (addr, mapping) = (mapping.addr, Arc::new(mapping));
        let sharing = match backing {
            Backing::Private => libc::MAP_PRIVATE,
            Backing::Memfd => libc::MAP_SHARED,
        };
        let writes = Arc::new(VmmWriteLog::new(len / PAGE_SIZE));
        let mut regions = Vec::new();
        let mut slots = Vec::new();
        for (number, piece) in pieces(bytes).into_iter().enumerate() {
            let host = addr.wrapping_add(piece.offset as usize);
            let first_page = piece.offset as usize / PAGE_SIZE;
            let bitmap = VmmWrites::new(writes.clone(), first_page);
            // SAFETY: the piece lies inside the mapping, which `blocks` keeps alive beside `memory`.
            let region = unsafe {
                MmapRegionBuilder::new_with_bitmap(piece.len as usize, bitmap)
                    .with_raw_mmap_pointer(host)
            }
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing)
            .build()
            .expect("the mapping is page-aligned");
            regions.push(
                GuestRegionMmap::new(region, GuestAddress(piece.guest_addr))
                    .expect("no piece reaches the end of the address space"),
            );
            slots.push(KvmSlot {
                slot: number as u32,
                guest_addr: piece.guest_addr,
                host_addr: host as u64,
                block: BlockIndex(0),
                first_page,
                pages: piece.len as usize / PAGE_SIZE,
            });
        }
        let memory = GuestMemory::from_regions(regions).expect("the pieces do not overlap");
        // SAFETY: Mapping's invariant is what is asked for.
        let block = unsafe { RamBlock::new(BLOCK_NAME, addr, len, mapping) }
            .map_err(|e| MachineError::Config(e.to_string()))?;
        Ok(GuestRam {
            memory,
            blocks: [block],
            slots,
            writes,
        })
    }

    /// Shows the RAM to the guest of `vm`. The RAM must outlive `vm`.
    pub fn attach(&self, vm: &VmFd) -> Result<(), MachineError> {
        for slot in &self.slots {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: 0,
                guest_phys_addr: slot.guest_addr,
                memory_size: (slot.pages * PAGE_SIZE) as u64,
                userspace_addr: slot.host_addr,
            };
            // SAFETY: the slots lie in the mapping, which only the guest and code that expects concurrent
            // writes access; the caller keeps it alive.
            unsafe { vm.set_user_memory_region(region) }.attempt("register guest memory")?;
        }
        Ok(())
    }

    /// Completes the log of a guest that the RAM is attached to. Returns it without the VMM's own writes, which
    /// [`writes`](Self::writes) has.
    pub fn log(&self, chosen: Chosen, vcpus: &[Arc<Vcpu>]) -> Result<KvmLog, MachineError> {
        // SAFETY: `attach` has registered the slots as described, and they are never changed elsewhere.
        Ok(unsafe { chosen.complete(self.slots.clone(), vcpus) }?)
    }

    /// What the VMM itself has written, of each block.
    pub fn writes(&self) -> Vec<Arc<VmmWriteLog>> {
        vec![self.writes.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;
    use vm_memory::bitmap::Bitmap;

    /// The flags of the mapping that `addr` lies in, by `/proc/self/smaps`.
    fn flags_of_mapping(addr: u64) -> Vec<String> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begins_it = |line: &str| {
            let range = line.split(' ').next().and_then(|word| word.split_once('-'));
            let parse = |text| u64::from_str_radix(text, 16).ok();
            range.is_some_and(|(from, to)| {
                parse(from).is_some_and(|from| from <= addr)
                    && parse(to).is_some_and(|to| addr < to)
            })
        };
        let mapping = smaps.lines().skip_while(|line| !begins_it(line));
        let flags = mapping
            .filter_map(|line| line.strip_prefix("VmFlags:"))
            .next();
        let flags = flags.expect("the mapping is there").split_whitespace();
        flags.map(str::to_owned).collect()
    }

    #[test]
    fn ram_is_neither_dumped_nor_inherited() {
        for backing in [Backing::Private, Backing::Memfd] {
            let ram = GuestRam::new(16 << 20, backing).unwrap();
            let flags = flags_of_mapping(ram.slots[0].host_addr);
            // proc_pid_smaps(5): do not include in core dump, do not copy on fork.
            for flag in ["dd", "dc"] {
                assert!(
                    flags.iter().any(|one| one == flag),
                    "{backing:?}: {flags:?}"
                );
            }
        }
    }

    #[test]
    fn the_hole_is_where_qemu_has_it() {
        assert_eq!(pieces(3 << 30).len(), 1);
        let split = pieces(5 << 30);
        assert_eq!(split[0].len, 3 << 30);
        assert_eq!(
            split[1],
            Piece {
                guest_addr: 4 << 30,
                offset: 3 << 30,
                len: 2 << 30
            }
        );
    }

    #[test]
    fn writes_reach_the_one_block_and_its_log() {
        for backing in [Backing::Private, Backing::Memfd] {
            let ram = GuestRam::new((3 << 30) + (1 << 20), backing).unwrap();
            ram.memory
                .write_slice(&[1, 2, 3], GuestAddress(HIGH_RAM_START + 4095))
                .unwrap();
            let mut words = vec![0; ram.blocks[0].pages().div_ceil(64)];
            ram.writes.drain_into(&mut words);
            let page = (3usize << 30) / PAGE_SIZE;
            assert_eq!(words.iter().map(|w| w.count_ones()).sum::<u32>(), 2);
            assert_eq!(words[page / 64], 0b11);
            let region = VmmWrites::new(ram.writes.clone(), 0);
            assert!(!region.dirty_at(page * PAGE_SIZE), "drained");
            assert_eq!(ram.slots[0].host_addr % HUGE_PAGE as u64, 0);
        }
    }
}
