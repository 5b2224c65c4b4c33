//! Population: having the kernel back guest memory ahead of the stream.
//!
//! The first touch of a page is often the slowest step of a migration: the kernel has to find and clear
//! memory, and on a virtual host its own hypervisor does too. So a thread of its own populates guest memory
//!
//! - all of it, from the first page on, while the destination waits for its source;
//! - a little ahead of the pages that arrive, once they arrive, wherever they carry data.
//!
//! Nobody else is to be short of memory for that:
//!
//! - Nothing is populated that would leave the host, or a control group of this process, short ([`Room`]).
//! - What is populated while the destination waits is lent (`MADV_FREE`): the kernel takes it back as soon as anybody
//!   needs memory. What others may still touch cannot be known: a neighbour may have a guest that has hardly begun.
//! - What turns out not to be needed is given back ([`super::memory`]).
//!
//! Memory is populated in regions of 2 MiB, the size of a huge page: one page with data keeps that much.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Scope;

use vmferry_dirty::{PAGE_SIZE, PageRange};

use crate::ram::RamBlock;
use crate::room::Room;

/// Pages in a region.
pub(super) const REGION_PAGES: usize = (2 << 20) / PAGE_SIZE;

const REGION_BYTES: u64 = (REGION_PAGES * PAGE_SIZE) as u64;

/// How many regions ahead of the stream, at most.
const AHEAD: usize = 8;

/// Bytes that are populated between two looks at how much room there is, at most. A look takes some tens of microseconds,
/// populating so much at least ten milliseconds.
const LOOK_INTERVAL: u64 = 64 << 20;

/// A region of guest memory: its block, and its number in that. In the order of the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Region {
    pub(super) block: usize,
    pub(super) number: usize,
}

impl Region {
    /// The pages of the region.
    pub(super) fn range(self, ram: &[RamBlock]) -> PageRange {
        let start = self.number * REGION_PAGES;
        PageRange::new(start, start + REGION_PAGES).clamp_to(ram[self.block].pages())
    }
}

/// What the populating thread may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No page has arrived yet: all memory may be populated, and lent.
    Waiting,
    /// Pages arrive: what is asked for may be populated. Nothing may be lent, as it may hold data.
    Streaming,
    /// Nothing more.
    Over,
}

/// The state that outlives the populating thread.
pub(super) struct Shared<'a> {
    ram: &'a [RamBlock],
    /// Which regions of which block have been populated.
    populated: Vec<Vec<AtomicBool>>,
    phase: AtomicU8,
    /// Held by the populating thread while it is at a region.
    at_work: Mutex<()>,
}

impl<'a> Shared<'a> {
    pub(super) fn new(ram: &'a [RamBlock]) -> Self {
        let regions = |block: &RamBlock| block.pages().div_ceil(REGION_PAGES);
        let clear = |n| (0..n).map(|_| AtomicBool::new(false)).collect();
        Shared {
            ram,
            populated: ram.iter().map(regions).map(clear).collect(),
            phase: AtomicU8::new(Phase::Waiting as u8),
            at_work: Mutex::new(()),
        }
    }

    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    /// The thread works, or its work is waited for.
    fn at_work(&self) -> MutexGuard<'_, ()> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins with a region, if it is still this phase. Whoever enters another one and then takes the lock knows that
    /// nothing of the one before is under way.
    fn begin(&self, phase: Phase) -> Option<MutexGuard<'_, ()>> {
        let guard = self.at_work();
        (self.phase.load(Ordering::SeqCst) == phase as u8).then_some(guard)
    }

    /// All regions from `first` on, in the order of the stream.
    fn regions_from(&self, first: Region) -> impl Iterator<Item = Region> + use<'_> {
        let blocks = self.populated.iter().enumerate().skip(first.block);
        blocks.flat_map(move |(block, regions)| {
            let start = if block == first.block {
                first.number
            } else {
                0
            };
            (start..regions.len()).map(move |number| Region { block, number })
        })
    }

    fn is_populated(&self, region: Region) -> &AtomicBool {
        &self.populated[region.block][region.number]
    }
}

/// Population before the stream begins. Dropping it ends the populating thread after the region it is at.
pub(super) struct Waiting<'a>(Populator<'a>);

impl<'a> Waiting<'a> {
    /// Starts populating all of RAM.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        shared: &'scope Shared<'a>,
    ) -> std::io::Result<Waiting<'scope>>
    where
        'a: 'scope,
    {
        let (requests, queue) = sync_channel(2 * AHEAD);
        std::thread::Builder::new()
            .name("populate".to_owned())
            .spawn_scoped(scope, move || Thread::new(shared).run(&queue))?;
        Ok(Waiting(Populator {
            shared,
            requests,
            asked: Region::default(),
            last_data: None,
            streak: 0,
        }))
    }

    /// The stream begins: from now on pages may be written, and none of them is lent (law 1).
    pub(super) fn stream_begins(self) -> Populator<'a> {
        self.0.shared.enter(Phase::Streaming);
        drop(self.0.shared.at_work());
        self.0
    }
}

/// The receiving thread's side of population. Dropping it ends the populating thread after the region it
/// is at.
pub(super) struct Populator<'a> {
    shared: &'a Shared<'a>,
    requests: SyncSender<Region>,
    /// Regions before this one have been asked for, or lie behind the stream.
    asked: Region,
    /// The last region in which data has arrived.
    last_data: Option<Region>,
    /// How many regions with data have come in a row.
    streak: usize,
}

impl Populator<'_> {
    /// Populates nothing more, so that the switch-over has the processor for itself.
    pub(super) fn stop(&self) {
        self.shared.enter(Phase::Over);
    }

    /// Waits for the region that is being populated. After [`stop`](Self::stop) there is none to come.
    pub(super) fn finish(&self) {
        drop(self.shared.at_work());
    }

    /// Data arrives in a region that the stream has not reached before: what lies behind it will probably be needed soon. The
    /// more regions with data come in a row, the further ahead.
    pub(super) fn data_arrives(&mut self, region: Region) {
        let follows = |last: Region| last.block == region.block && last.number + 1 == region.number;
        self.streak = match self.last_data {
            Some(last) if follows(last) => self.streak + 1,
            _ => 1,
        };
        self.last_data = Some(region);
        let after = region.number + 1;
        let mut ahead = self.asked.max(Region {
            number: after,
            ..region
        });
        let regions = self.shared.populated[region.block].len();
        let end = (after + self.streak.min(AHEAD)).min(regions);
        while ahead.block == region.block && ahead.number < end {
            let populated = self.shared.is_populated(ahead).load(Ordering::Relaxed);
            // The thread is behind, or has ended: then the stream populates by itself.
            if !populated && self.requests.try_send(ahead).is_err() {
                break;
            }
            ahead.number += 1;
        }
        self.asked = ahead;
    }

    /// Takes note that a region's memory is about to be given back. Returns whether there is any: it was populated.
    pub(super) fn take_back(&self, region: Region) -> bool {
        self.shared
            .is_populated(region)
            .swap(false, Ordering::Relaxed)
    }

    /// All regions from `first` on, in the order of the stream.
    pub(super) fn regions_from(&self, first: Region) -> impl Iterator<Item = Region> + use<'_> {
        self.shared.regions_from(first)
    }
}

impl Drop for Populator<'_> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Why the thread populates nothing more for now.
enum Stop {
    /// The phase is over.
    Phase,
    /// There is not enough room.
    Room,
    /// The kernel cannot, or does not any more.
    Kernel,
}

/// The populating thread.
struct Thread<'a> {
    shared: &'a Shared<'a>,
    /// Bytes that may be populated before the next look at how much room there is.
    allowed: u64,
    /// True if a control group set a limit when we last looked.
    limited: bool,
    /// Bytes that have been lent.
    lent: u64,
}

impl<'a> Thread<'a> {
    fn new(shared: &'a Shared<'a>) -> Self {
        Thread {
            shared,
            allowed: 0,
            limited: false,
            lent: 0,
        }
    }

    fn run(mut self, queue: &Receiver<Region>) {
        let shared = self.shared;
        let waited = shared
            .regions_from(Region::default())
            .try_for_each(|region| self.lend(region));
        if matches!(waited, Err(Stop::Kernel)) {
            return;
        }
        // Until the other side is dropped.
        while let Ok(region) = queue.recv() {
            if matches!(self.populate(region, Phase::Streaming), Err(Stop::Kernel)) {
                return;
            }
        }
    }

    /// Populates a region while nothing arrives, and lends it.
    fn lend(&mut self, region: Region) -> Result<(), Stop> {
        let guard = self.populate(region, Phase::Waiting)?;
        let block = &self.shared.ram[region.block];
        let range = region.range(self.shared.ram);
        match block.lend(range) {
            Ok(()) => self.lent += REGION_BYTES,
            // Shared memory cannot be lent. A host has room enough to go on; of a control group nobody knows.
            Err(_) if !self.limited => {}
            Err(error) => {
                tracing::debug!("guest memory is not populated ahead in a control group: {error}");
                block.release(range);
                self.shared
                    .is_populated(region)
                    .store(false, Ordering::Relaxed);
                return Err(Stop::Room);
            }
        }
        drop(guard);
        Ok(())
    }

    /// Populates a region. Nothing else happens to it until the guard is dropped.
    fn populate(&mut self, region: Region, phase: Phase) -> Result<MutexGuard<'a, ()>, Stop> {
        self.look()?;
        let shared = self.shared;
        let guard = shared.begin(phase).ok_or(Stop::Phase)?;
        shared.ram[region.block]
            .populate(region.range(shared.ram))
            .map_err(|error| {
                // Linux before 5.14 has no such advice. Writing the pages populates them as well.
                tracing::debug!("guest memory is not populated ahead: {error}");
                Stop::Kernel
            })?;
        shared.is_populated(region).store(true, Ordering::Relaxed);
        Ok(guard)
    }

    /// Looks at how much room there is for one region more, if it is time to.
    fn look(&mut self) -> Result<(), Stop> {
        if self.allowed < REGION_BYTES {
            let room = Room::look().map_err(|error| {
                tracing::debug!("guest memory is not populated ahead: {error}");
                Stop::Room
            })?;
            self.limited = room.is_limited();
            // Half of it, because others may be about to use it too.
            self.allowed = (room.spare(self.lent) / 2).min(LOOK_INTERVAL);
        }
        self.allowed = self.allowed.checked_sub(REGION_BYTES).ok_or_else(|| {
            tracing::debug!("guest memory is not populated ahead: there is little left");
            Stop::Room
        })?;
        Ok(())
    }
}
