//! Ranges of guest memory as pages of the RAM block, and pages that are given back to the host.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmferry_dirty::log::VmmWrites;
use vmferry_dirty::{PAGE_SIZE, PageRange};

use crate::memory::GuestMemory;

/// Whole pages, one after the other, that the guest sees in one piece.
struct Run<'a> {
    region: &'a GuestRegionMmap<VmmWrites>,
    /// Offset of its first byte in the region.
    offset: usize,
    /// Bytes.
    len: usize,
    /// Number of its first page in the block.
    first_page: usize,
}

/// The whole pages of RAM among `len` bytes of the guest's address space from `start` on.
fn runs(memory: &GuestMemory, start: u64, len: u64) -> impl Iterator<Item = Run<'_>> {
    const PAGE: u64 = PAGE_SIZE as u64;
    let end = start.saturating_add(len) / PAGE * PAGE;
    let start = start.checked_next_multiple_of(PAGE).unwrap_or(end);
    // The guest sees the pieces of the block in the block's order.
    let mut pages_before = 0;
    memory.iter().filter_map(move |region| {
        let first = region.start_addr().raw_value();
        let page_of_region = pages_before;
        pages_before += region.size() / PAGE_SIZE;
        let (from, to) = (start.max(first), end.min(first + region.len()));
        let offset = from.checked_sub(first)? as usize;
        (from < to).then(|| Run {
            region,
            offset,
            len: (to - from) as usize,
            first_page: page_of_region + offset / PAGE_SIZE,
        })
    })
}

/// The whole pages of RAM among `len` bytes of the guest's address space from `start` on, as pages of the block.
pub(crate) fn pages_within(
    memory: &GuestMemory,
    start: u64,
    len: u64,
) -> impl Iterator<Item = PageRange> {
    runs(memory, start, len)
        .map(|run| PageRange::new(run.first_page, run.first_page + run.len / PAGE_SIZE))
}

/// Gives the whole pages of RAM among `len` bytes from `start` on back to the host. Returns how many bytes that were.
///
/// They read as zero until they are written to again. That is a change of content like any other (law 1), so they are
/// logged as written, after it has happened. A page that was sent already is sent again, as a page of zeros.
pub(crate) fn discard(memory: &GuestMemory, start: u64, len: u64) -> u64 {
    let mut given = 0;
    for run in runs(memory, start, len) {
        // Private memory is dropped from the mapping, shared memory has to be dropped from its file.
        let advice = match run.region.flags() & libc::MAP_SHARED {
            0 => libc::MADV_DONTNEED,
            _ => libc::MADV_REMOVE,
        };
        let at = run.region.as_ptr().wrapping_add(run.offset);
        // SAFETY: a run lies within its region, which is mapped as long as `memory` lives. The mapping stays; only what
        // it holds changes, which everybody who reads guest memory expects at any time.
        if unsafe { libc::madvise(at.cast(), run.len, advice) } == 0 {
            given += run.len as u64;
        } else {
            let error = io::Error::last_os_error();
            tracing::warn!(%error, pages = run.len / PAGE_SIZE, "cannot give guest memory back to the host");
        }
        // A part may be gone even if not all is.
        run.region.bitmap().mark_dirty(run.offset, run.len);
    }
    given
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    use crate::config::Backing;
    use crate::layout::{HIGH_RAM_START, LOW_RAM_END};
    use crate::memory::GuestRam;

    fn list(memory: &GuestMemory, start: u64, len: u64) -> Vec<PageRange> {
        pages_within(memory, start, len).collect()
    }

    #[test]
    fn only_whole_pages_of_ram_count() {
        let ram = GuestRam::new(LOW_RAM_END + (1 << 20), Backing::Private).unwrap();
        let memory = &ram.memory;
        let low = (LOW_RAM_END / 4096) as usize;
        assert_eq!(list(memory, 4096, 8192), [PageRange::new(1, 3)]);
        assert_eq!(list(memory, 1, 3 * 4096), [PageRange::new(1, 3)]);
        assert_eq!(list(memory, 1, 4096), []);
        assert_eq!(list(memory, 0, 0), []);
        // The hole is none of it, and what lies behind it follows in the block.
        assert_eq!(list(memory, LOW_RAM_END, 1 << 30), []);
        assert_eq!(
            list(memory, LOW_RAM_END - 4096, u64::MAX),
            [PageRange::new(low - 1, low), PageRange::new(low, low + 256)]
        );
        assert_eq!(list(memory, HIGH_RAM_START + (1 << 20), 1 << 20), []);
        assert_eq!(list(memory, u64::MAX, u64::MAX), []);
        assert_eq!(list(memory, u64::MAX - 5000, 5000), []);
    }

    #[test]
    fn discarded_pages_read_as_zero_and_are_logged() {
        for backing in [Backing::Private, Backing::Memfd] {
            let ram = GuestRam::new(LOW_RAM_END + (1 << 20), backing).unwrap();
            let at = HIGH_RAM_START + 4096;
            ram.memory
                .write_slice(&[7; 3 * 4096], GuestAddress(at))
                .unwrap();
            let mut words = vec![0; ram.blocks[0].pages().div_ceil(64)];
            ram.writes()[0].drain_into(&mut words);
            assert_eq!(discard(&ram.memory, at, 2 * 4096), 2 * 4096);
            let mut bytes = vec![0; 3 * 4096];
            ram.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            assert!(bytes[..8192].iter().all(|byte| *byte == 0), "{backing:?}");
            assert!(bytes[8192..].iter().all(|byte| *byte == 7), "{backing:?}");
            words.fill(0);
            ram.writes()[0].drain_into(&mut words);
            let page = LOW_RAM_END as usize / PAGE_SIZE + 1;
            assert_eq!(words[page / 64], 0b11 << (page % 64), "{backing:?}");
        }
    }

    /// A migration that looks at the log all the time, and sends what it finds there, sends a discarded page as zeros in
    /// the end: whoever sees that it was discarded sees that it is empty.
    #[test]
    fn discarded_pages_are_logged_when_they_are_gone() {
        const PAGES: usize = 4096;
        const LEN: usize = PAGES * PAGE_SIZE;
        for backing in [Backing::Private, Backing::Memfd] {
            let ram = GuestRam::new(LEN as u64, backing).unwrap();
            let first_byte = |page: usize| -> u8 {
                let at = GuestAddress((page * PAGE_SIZE) as u64);
                ram.memory.read_obj(at).unwrap()
            };
            // One round shows it nearly always.
            for round in 0..10 {
                ram.memory.write_slice(&[7; LEN], GuestAddress(0)).unwrap();
                let mut sent = vec![7; PAGES];
                let mut words = vec![0; PAGES / 64];
                ram.writes()[0].drain_into(&mut words);
                let mut send_what_is_logged = || {
                    words.fill(0);
                    ram.writes()[0].drain_into(&mut words);
                    for page in (0..PAGES).filter(|page| words[page / 64] >> (page % 64) & 1 == 1) {
                        sent[page] = first_byte(page);
                    }
                };
                std::thread::scope(|scope| {
                    let discarding = scope.spawn(|| discard(&ram.memory, 0, LEN as u64));
                    while !discarding.is_finished() {
                        send_what_is_logged();
                    }
                    assert_eq!(discarding.join().unwrap(), LEN as u64);
                });
                send_what_is_logged();
                let stale = sent.iter().filter(|byte| **byte != 0).count();
                assert_eq!(
                    stale, 0,
                    "{backing:?}, round {round}: stale pages were sent"
                );
            }
        }
    }
}
