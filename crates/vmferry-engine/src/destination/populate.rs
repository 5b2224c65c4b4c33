//! Population: having the kernel back guest memory ahead of the stream.
//!
//! The first touch of a page is often the slowest step of a migration: the kernel has to find and clear
//! memory, and on a virtual host its own hypervisor does too. So a thread of its own populates guest memory
//!
//! - all of it, from the first page on, while the destination waits for its source;
//! - a little ahead of the pages that arrive, once they arrive, wherever they carry data.
//!
//! A host must have room for the guests that it takes, but perhaps not for all the memory that they never
//! use: what turns out to be all zero is given back, and nothing is populated that would leave the host short.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::Scope;
use std::time::Duration;

use vmferry_dirty::{PAGE_SIZE, PageIndex, PageRange};

use crate::ram::RamBlock;

/// Memory is populated in regions of this size, that of a huge page.
const REGION_PAGES: usize = (2 << 20) / PAGE_SIZE;

/// How many regions ahead of the stream.
const AHEAD: usize = 8;

/// What must stay available on the host, as a part of its memory.
const RESERVE: u64 = 8;

/// Which regions of which block are populated, or about to be.
struct Populated(Vec<Vec<AtomicBool>>);

impl Populated {
    fn new(ram: &[RamBlock]) -> Self {
        let regions = |b: &RamBlock| b.pages().div_ceil(REGION_PAGES);
        let clear = |n| (0..n).map(|_| AtomicBool::new(false)).collect();
        Populated(ram.iter().map(regions).map(clear).collect())
    }

    /// Claims a region for populating; false if it is claimed already. Relaxed: the flags only save work.
    fn claim(&self, block: usize, region: usize) -> bool {
        !self.0[block][region].swap(true, Ordering::Relaxed)
    }

    /// Takes a claim back; false if there was none.
    fn unclaim(&self, block: usize, region: usize) -> bool {
        self.0[block][region].swap(false, Ordering::Relaxed)
    }

    fn regions(&self, block: usize) -> usize {
        self.0[block].len()
    }
}

/// What the populating thread is told.
enum Request {
    /// The source is there: from now on, only what is asked for.
    Stream,
    /// A region of a block.
    Region(usize, usize),
}

/// The state that outlives the populating thread.
pub(super) struct Shared<'a> {
    ram: &'a [RamBlock],
    populated: Populated,
    stop: AtomicBool,
}

impl<'a> Shared<'a> {
    pub(super) fn new(ram: &'a [RamBlock]) -> Self {
        Shared {
            ram,
            populated: Populated::new(ram),
            stop: AtomicBool::new(false),
        }
    }
}

/// The receiving thread's side of population. Dropping it ends the populating thread after the region it
/// is at.
pub(super) struct Populator<'a> {
    shared: &'a Shared<'a>,
    requests: SyncSender<Request>,
    /// The last region in which a page of zeros arrived.
    zero_region: (usize, usize),
}

impl<'a> Populator<'a> {
    /// Starts populating all of RAM.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        shared: &'scope Shared<'a>,
    ) -> std::io::Result<Populator<'scope>>
    where
        'a: 'scope,
    {
        let (requests, queue) = sync_channel(2 * AHEAD);
        std::thread::Builder::new()
            .name("populate".to_owned())
            .spawn_scoped(scope, move || populate(shared, &queue))?;
        Ok(Populator {
            shared,
            requests,
            zero_region: (0, 0),
        })
    }

    /// The stream begins.
    pub(super) fn stream_begins(&self) {
        // The thread may have ended: with all populated, or with none left on the host.
        let _ = self.requests.send(Request::Stream);
    }

    /// Populates nothing more, so that the switch-over has the processor for itself.
    pub(super) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// A page with data arrives in `block`: what lies behind it will probably be needed soon.
    #[inline]
    pub(super) fn data_arrives(&self, block: usize, page: PageIndex) {
        let region = page.0 / REGION_PAGES;
        let populated = &self.shared.populated;
        if page.0.is_multiple_of(REGION_PAGES) || populated.claim(block, region) {
            self.look_ahead(block, region);
        }
    }

    fn look_ahead(&self, block: usize, region: usize) {
        let populated = &self.shared.populated;
        let end = (region + 1 + AHEAD).min(populated.regions(block));
        for ahead in region + 1..end {
            if populated.claim(block, ahead)
                && self
                    .requests
                    .try_send(Request::Region(block, ahead))
                    .is_err()
            {
                // The thread is behind, or has ended: then the stream populates by itself.
                populated.unclaim(block, ahead);
                return;
            }
        }
    }

    /// A page of zeros arrives in `block`. When zeros move on to another region, the one they leave is
    /// given back if it was populated for nothing: if no page of it `has_data`.
    #[inline]
    pub(super) fn zeros_arrive(
        &mut self,
        block: usize,
        page: PageIndex,
        has_data: impl FnOnce(usize, PageRange) -> bool,
    ) {
        let here = (block, page.0 / REGION_PAGES);
        if here == self.zero_region {
            return;
        }
        let (block, region) = std::mem::replace(&mut self.zero_region, here);
        let range = self.range(block, region);
        if !has_data(block, range) && self.shared.populated.unclaim(block, region) {
            self.shared.ram[block].release(range);
        }
    }

    fn range(&self, block: usize, region: usize) -> PageRange {
        region_range(&self.shared.ram[block], region)
    }
}

impl Drop for Populator<'_> {
    fn drop(&mut self) {
        self.stop();
    }
}

fn region_range(block: &RamBlock, region: usize) -> PageRange {
    let start = region * REGION_PAGES;
    PageRange::new(start, start + REGION_PAGES).clamp_to(block.pages())
}

/// The populating thread.
fn populate(shared: &Shared<'_>, queue: &Receiver<Request>) {
    let populate = |block: usize, region: usize| {
        let ram = &shared.ram[block];
        let result = ram.populate(region_range(ram, region));
        if let Err(error) = &result {
            // Linux before 5.14 has no such advice. Writing the pages populates them as well.
            tracing::debug!("guest memory is not populated ahead: {error}");
        }
        result.is_ok()
    };
    // While there is no stream: everything, in order.
    let all = (0..shared.ram.len())
        .flat_map(|block| (0..shared.populated.regions(block)).map(move |region| (block, region)));
    for (number, (block, region)) in all.enumerate() {
        if shared.stop.load(Ordering::Relaxed) || queue.try_recv().is_ok() {
            break;
        }
        // Looking at the host's memory takes microseconds, and populating 64 regions milliseconds.
        if number.is_multiple_of(64) && !host_has_room() {
            tracing::debug!("guest memory is not populated ahead: the host has little left");
            break;
        }
        if shared.populated.claim(block, region) && !populate(block, region) {
            return;
        }
    }
    // Then what is asked for.
    loop {
        match queue.recv_timeout(Duration::from_millis(100)) {
            _ if shared.stop.load(Ordering::Relaxed) => return,
            Ok(Request::Region(block, region)) => {
                if !populate(block, region) {
                    return;
                }
            }
            Ok(Request::Stream) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Whether the host has more than its reserve of memory available, by `/proc/meminfo`. Unknown is no.
fn host_has_room() -> bool {
    let Ok(meminfo) = std::fs::read_to_string("/proc/meminfo") else {
        return false;
    };
    let kib = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    match (kib("MemAvailable:"), kib("MemTotal:")) {
        (Some(available), Some(total)) => available > total / RESERVE,
        _ => false,
    }
}
