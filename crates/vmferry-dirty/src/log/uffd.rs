//! A dirty log that needs no KVM: userfaultfd write protection in its asynchronous mode.
//!
//! Every page is write-protected. At the first write to it the kernel lifts the protection by itself, without
//! asking user space: a written page is one that is not protected. The `PAGEMAP_SCAN` ioctl finds those pages
//! and protects them again in one step, under the page table's lock.
//!
//! # Why nothing is armed
//!
//! [`DirtyLog::needs_arming`] is false: a fetch arms what it reports. Law 3 holds, since whoever reads a page
//! does so after the fetch that reported it. Finding and protecting could be two steps as with KVM, and no
//! write would be lost. But each range to be armed would then cost a system call (a bitmap cannot be handed
//! over), and the finding, which walks the page tables, would not become cheaper. What this costs: all written
//! pages are protected at the sync, so one written between the sync and its sending is sent once more for nothing.
//!
//! # Pages that are gone
//!
//! Protection needs something to hold it. For unpopulated pages the kernel makes page tables with a marker in
//! place of each page, so that the first write to one is seen too. Discarding private memory drops the markers
//! with the pages: no protection, hence *written*, and rightly so, since the page now reads as zero. A huge
//! page has no table below it, and leaves nothing at all when it is discarded. Kernels before 6.18.44 or so
//! pass over such a hole; there it is looked for in a second scan.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use linux_raw_sys::general::page_region;

use super::{DirtyLog, LogError};
use crate::units::{BlockIndex, PAGE_SIZE, PageRange};

mod sys;

use sys::{Find, Holes, NOTHING, Pagemap, WriteProtector};

/// How many ranges of written pages one call of the kernel can report. The kernel itself works in pieces of
/// 2 MiB, which have at most 256 such ranges.
const FOUND_RANGES: usize = 1024;

/// Memory of this process that a RAM block, or a part of one, consists of.
#[derive(Clone, Copy, Debug)]
pub struct UffdRegion {
    /// The RAM block that the region is part of.
    pub block: BlockIndex,
    /// The region's first page in that block.
    pub first_page: usize,
    /// Where this process has it mapped, in bytes; a multiple of the page size.
    pub host_addr: u64,
    /// Pages in the region.
    pub pages: usize,
}

impl UffdRegion {
    fn addresses(&self) -> Range<u64> {
        self.host_addr..self.host_addr + (self.pages * PAGE_SIZE) as u64
    }

    /// Sets the bits of the pages at `addresses`.
    fn mark(&self, addresses: Range<u64>, into: &mut [u64]) {
        let page = |addr| self.first_page + (addr - self.host_addr) as usize / PAGE_SIZE;
        let pages = PageRange::new(page(addresses.start), page(addresses.end));
        crate::words::for_each_mask(pages, |word, mask| into[word] |= mask);
    }
}

/// The dirty log of memory of this process, kept by userfaultfd; KVM is not involved.
///
/// Any process can have its memory tracked: a VMM on another hypervisor, an emulator, a test. It takes Linux 6.7
/// and no privilege. `examples/track_process.rs` of this crate is a short program that does.
///
/// The memory must stay mapped where it is while the log is on; otherwise writes are not reported, or a fetch
/// fails. That is a matter of law 1 only, not of memory safety: the log never changes what memory holds.
///
/// # What is tracked
///
/// - *Writes* by this process through the mapping, in user mode and in the kernel (a system call's, a KVM
///   guest's). Not seen are writes to the same memory by other ways: through another mapping of a memfd, with
///   `write` to its file, by a device that had the page pinned before. Such writers mark a
///   [`VmmWriteLog`](super::VmmWriteLog).
/// - *Unpopulated pages*, like others; reading one is not a write to it.
/// - *Discarding* private anonymous memory (`MADV_DONTNEED`), which changes its content, is reported. On a memfd
///   it changes nothing and is not. Punching a hole into a memfd (`fallocate`, `MADV_REMOVE`) changes the content
///   and is **not** reported: whoever does that marks a [`VmmWriteLog`](super::VmmWriteLog).
/// - *Transparent huge pages* are protected as they are. The first write to one splits its mapping, so pages are
///   reported one by one. It stays split after the log is off, until the kernel (`khugepaged`) joins it again.
///   Memory that is populated while the log is on gets small pages, with one exception: what is discarded and
///   touched again before the next fetch may come back as a huge page, and is then reported whole.
/// - *hugetlb* pages are reported whole; a region consists of whole ones. Discarding them is **not** reported, and
///   what was written before that only once the page is touched again: whoever discards marks a
///   [`VmmWriteLog`](super::VmmWriteLog).
/// - *A forked child* is not tracked: private memory is its own copy from then on, and what it writes to shared
///   memory is not seen.
///
/// Only one userfaultfd can have a range. Post-copy, which needs another, begins after [`DirtyLog::stop`].
///
/// # What it costs
///
/// On a 2-core virtual host: 1 us for the first write to a page after a fetch; 1 ns a page for a fetch that finds
/// nothing (6 on kernels before 6.18.44 or so), 40 ns for each page that it finds. Unpopulated memory gets page
/// tables: 8 bytes a page.
pub struct UffdLog {
    regions: Vec<UffdRegion>,
    state: Mutex<State>,
}

enum State {
    Off,
    On(Tracking),
}

impl UffdLog {
    /// Prepares a log of `regions`; the log is off until [`DirtyLog::start`].
    pub fn new(regions: Vec<UffdRegion>) -> Self {
        UffdLog {
            regions,
            state: Mutex::new(State::Off),
        }
    }
}

impl DirtyLog for UffdLog {
    fn start(&self) -> Result<(), LogError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Off = *state {
            *state = State::On(Tracking::start(&self.regions)?);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, State::Off) {
            State::Off => Ok(()),
            State::On(tracking) => tracking.stop(&self.regions),
        }
    }

    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State::On(tracking) = &mut *state else {
            return Ok(()); // a stopped log is empty
        };
        for region in self.regions.iter().filter(|r| r.block == block) {
            tracking.take(Find::Written, region, into)?;
            if let Holes::NotWritten = tracking.holes {
                tracking.take(Find::Hole, region, into)?;
            }
        }
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        false
    }

    fn arm(&self, _: BlockIndex, _: PageRange, _: &[u64]) -> Result<(), LogError> {
        Ok(())
    }
}

/// A log that is on. The kernel forgets the registrations when the last copy of the descriptor is closed.
struct Tracking {
    uffd: WriteProtector,
    pagemap: Pagemap,
    holes: Holes,
    found: Box<[page_region]>,
}

impl Tracking {
    fn start(regions: &[UffdRegion]) -> Result<Self, LogError> {
        let uffd = WriteProtector::open()?;
        let pagemap = Pagemap::open()?;
        let holes = Holes::probe(&uffd, &pagemap).map_err(|source| LogError::Machine {
            action: "find out how memory without page tables is reported",
            source,
        })?;
        let tracking = Tracking {
            uffd,
            pagemap,
            holes,
            found: vec![NOTHING; FOUND_RANGES].into(),
        };
        for region in regions {
            let addresses = region.addresses();
            tracking
                .uffd
                .register(&addresses)
                .map_err(|source| LogError::Region {
                    block: region.block,
                    start: addresses.start,
                    end: addresses.end,
                    source,
                })?;
            tracking
                .uffd
                .protect(&addresses)
                .map_err(kernel_error("write-protect the memory", region.block))?;
        }
        Ok(tracking)
    }

    /// Unregisters by name: closing the descriptor is not enough if a forked child has a copy of it.
    fn stop(self, regions: &[UffdRegion]) -> Result<(), LogError> {
        let mut result = Ok(());
        for region in regions {
            let unregistered = self
                .uffd
                .unregister(&region.addresses())
                .map_err(kernel_error("end the tracking of the memory", region.block));
            result = result.and(unregistered);
        }
        result
    }

    /// Moves the pages of `region` from the log to `into`.
    fn take(&mut self, find: Find, region: &UffdRegion, into: &mut [u64]) -> Result<(), LogError> {
        let mut left = region.addresses();
        while !left.is_empty() {
            match self.pagemap.find_and_protect(find, &left, &mut self.found) {
                Ok((found, end)) => {
                    for range in &self.found[..found] {
                        region.mark(range.start..range.end, into);
                    }
                    left.start = end;
                }
                Err(e) => {
                    // Pages may have been protected without being reported; none shall be lost.
                    region.mark(left, into);
                    return Err(kernel_error(
                        "fetch the userfaultfd dirty log",
                        region.block,
                    )(e));
                }
            }
        }
        Ok(())
    }
}

fn kernel_error(action: &'static str, block: BlockIndex) -> impl Fn(io::Error) -> LogError {
    move |source| LogError::Kernel {
        action,
        block,
        source,
    }
}
