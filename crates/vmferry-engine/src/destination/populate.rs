//! Population: having the kernel back guest memory ahead of the stream.
//!
//! The first touch of a page is often the slowest step of a migration: the kernel has to find and clear
//! memory, and on a virtual host its own hypervisor does too. A thread of its own does that a little ahead of
//! the pages that arrive, where pages are likely to arrive: next to others that carried data. Memory that
//! the guest never used is not populated.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use vmferry_dirty::{PAGE_SIZE, PageIndex, PageRange};

use crate::ram::RamBlock;

/// Memory is populated in regions of this size, that of a huge page.
const REGION_PAGES: usize = (2 << 20) / PAGE_SIZE;

/// How many regions ahead of the stream.
const AHEAD: usize = 8;

/// Where the stream has been, and where it is likely to go: one flag for each region of each block.
pub(super) struct Populator {
    /// Whether a region was populated, or has received data.
    seen: Vec<Vec<bool>>,
    requests: SyncSender<(usize, PageRange)>,
}

impl Populator {
    /// Starts the populating thread, which ends when the `Populator` is dropped.
    pub(super) fn start<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        ram: &'env [RamBlock],
    ) -> std::io::Result<(Self, ScopedJoinHandle<'scope, ()>)> {
        let (requests, queue) = sync_channel(2 * AHEAD);
        let thread = std::thread::Builder::new()
            .name("populate".to_owned())
            .spawn_scoped(scope, move || populate(ram, &queue))?;
        let seen = ram
            .iter()
            .map(|b| vec![false; b.pages().div_ceil(REGION_PAGES)])
            .collect();
        Ok((Populator { seen, requests }, thread))
    }

    /// A page with data arrives in `block`: what lies behind it will probably be needed soon.
    #[inline]
    pub(super) fn data_arrives(&mut self, block: usize, page: PageIndex) {
        let region = page.0 / REGION_PAGES;
        if page.0.is_multiple_of(REGION_PAGES) || !self.seen[block][region] {
            self.look_ahead(block, region);
        }
    }

    fn look_ahead(&mut self, block: usize, region: usize) {
        let seen = &mut self.seen[block];
        seen[region] = true;
        let end = (region + 1 + AHEAD).min(seen.len());
        for (ahead, seen) in seen.iter_mut().enumerate().take(end).skip(region + 1) {
            if !*seen {
                let start = ahead * REGION_PAGES;
                let request = (block, PageRange::new(start, start + REGION_PAGES));
                // A full queue means that the thread is behind: then the stream populates by itself.
                *seen = self.requests.try_send(request).is_ok();
            }
        }
    }
}

fn populate(ram: &[RamBlock], queue: &Receiver<(usize, PageRange)>) {
    while let Ok((block, range)) = queue.recv() {
        let block = &ram[block];
        if let Err(error) = block.populate(range.clamp_to(block.pages())) {
            // Linux before 5.14 has no such advice. Writing the pages populates them as well.
            tracing::debug!("guest memory is not populated ahead: {error}");
            return;
        }
    }
}
