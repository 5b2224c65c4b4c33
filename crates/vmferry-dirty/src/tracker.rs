//! Dirty tracking of a running migration: the bitmaps, the log that feeds them, and the order of laws 3 and 4.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::arming::{ArmingChunk, BlockArming};
use crate::batch::Batch;
use crate::discipline::Discipline;
use crate::log::{DirtyLog, LogError};
use crate::set::DirtySet;
use crate::slice::{Cursor, Run, Slice};
use crate::sync::{Mutex, RwLock};
use crate::units::{BlockIndex, PageRange};

/// What must still be sent, and what the guest writes meanwhile.
///
/// [`sync`](Self::sync) fetches the log and merges it; a [`TrackedSlice`] takes dirty pages and arms the log for
/// them before it hands them out, so that its user cannot read a page too early (law 3). Meanwhile
/// [`hint`](Self::hint) may clear pages that the guest does not use (law 4).
///
/// # Hints
///
/// A guest that is asked for its free pages may use one that it told of as soon as it likes, also before the hint has
/// been looked at (virtio 1.2, section 5.5.6.7.1). So the bit may be cleared only if every write since the question is
/// still going to be seen:
///
/// - not after a sync that came in between, which may have fetched such a write: so every sync ends the
///   [`HintRound`] that was open, and a hint of a round that is over changes nothing;
/// - not where the log was not armed before the question: the write would be in the log already, as one that was made
///   before the last sync, and arming would forget it. So a round begins with arming everything.
///
/// # What may run at once
///
/// Every method may be called by any thread at any time, and no page is lost (law 1), whatever comes first:
///
/// | running | beside it | what happens |
/// |---|---|---|
/// | a slice | [`sync`](Self::sync), by another thread | Under `LockFree` both go on. Pages that the sync has found are handed out as soon as their bits are set, but before the slice arms a chunk of a RAM block it waits for the end of the sync's work on that block. Under `PerBitLock` the slice waits for the end of the sync before it takes its next bit, and under `SliceLock` the sync waits for the end of the slice. |
/// | a slice | `sync`, by the same thread | Use [`TrackedSlice::sync`]: under `SliceLock` the other one would wait for itself. |
/// | a slice | another slice | Each has a cursor of its own, and each page goes to one of them. Under `SliceLock` the second waits for the first. |
/// | a slice | [`begin_hints`](Self::begin_hints) | A chunk is armed by one of them, and the other one waits for that. |
/// | a slice | [`hint`](Self::hint) | A page that the slice has taken is sent. Under `SliceLock` the hint waits for the end of the slice. |
/// | `sync` | `sync` or `begin_hints` | One waits for the other, so a round never begins in the middle of a sync. |
/// | `sync` | `hint` | The round is over: the hint changes nothing. |
///
/// Through [`set`](Self::set) pages may be looked at and [marked](DirtySet::mark) at any time. Its other methods change
/// bits without arming the log and without regard to hints: they are not for a set that is tracked.
///
/// The count is exact (law 2) whenever none of this is under way.
pub struct DirtyTracker {
    log: Arc<dyn DirtyLog>,
    set: DirtySet,
    arming: Vec<BlockArming>,
    /// Held for a whole sync and for the beginning of a round. A round that began while a sync is fetching would be
    /// open for hints about pages that this sync brings.
    ///
    /// Locks are taken in this order: the set's (under `SliceLock`), this one, that of the hints, the set's (under
    /// `PerBitLock`), a block's arming.
    syncing: Mutex<()>,
    /// The round that hints may be of. A hint holds it for reading while it changes something.
    hints: RwLock<Hints>,
}

struct Hints {
    open: bool,
    /// The last round that was opened.
    last: HintRound,
}

/// A time between two syncs in which hints count. Each has a number of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintRound(u64);

impl DirtyTracker {
    /// Switches `log` on, with every page of every block dirty. `block_pages` holds the blocks' sizes.
    pub fn start(
        log: Arc<dyn DirtyLog>,
        block_pages: &[usize],
        discipline: Discipline,
        chunk: ArmingChunk,
    ) -> Result<Self, LogError> {
        let tracker = DirtyTracker {
            log,
            set: DirtySet::new(block_pages, discipline),
            arming: block_pages
                .iter()
                .enumerate()
                .map(|(block, &pages)| BlockArming::new(BlockIndex(block), pages, chunk))
                .collect(),
            syncing: Mutex::new(()),
            hints: RwLock::new(Hints {
                open: false,
                last: HintRound(0),
            }),
        };
        tracker.log.start()?;
        tracker.set.mark_all();
        // A log may begin with every page reported as written. Unless this is fetched now, nothing of it
        // gets armed in the first pass, and all of memory is sent twice.
        tracker.sync()?;
        Ok(tracker)
    }

    /// Merges what was written since the last sync; returns how many pages were clean before. Hints count for
    /// nothing until the next [`begin_hints`](Self::begin_hints).
    ///
    /// # Errors
    ///
    /// The log cannot be fetched. The pages that it reported before it failed are dirty, and the next sync brings the
    /// others.
    pub fn sync(&self) -> Result<u64, LogError> {
        let _guard = self.set.lock_for_hint();
        self.sync_without_hints()
    }

    /// [`sync`](Self::sync) for a caller that holds the lock which hints take.
    fn sync_without_hints(&self) -> Result<u64, LogError> {
        let _syncing = self.syncing.lock();
        // Waits for a hint that is being carried out. Before the set's lock is taken: under `PerBitLock` the hint needs
        // that one.
        self.hints.write().open = false;
        let _guard = self.set.lock_against_plain_stores();
        let mut new = 0;
        for (block, arming) in self.arming.iter().enumerate() {
            let merge = |words: &[u64]| self.set.merge_held(BlockIndex(block), words);
            new += arming.fetch(&*self.log, merge)?;
        }
        Ok(new)
    }

    /// Lets hints count until the next sync, and arms the whole log for that. The guest must be asked for its free pages
    /// after this call: an older answer is older than the sync.
    ///
    /// What is armed that early can be written again before it is sent, and is then sent twice: that is the price of
    /// hints.
    pub fn begin_hints(&self) -> Result<HintRound, LogError> {
        let _syncing = self.syncing.lock();
        let mut hints = self.hints.write();
        for arming in &self.arming {
            arming.arm(&*self.log, PageRange::new(0, usize::MAX))?;
        }
        hints.last.0 += 1;
        hints.open = true;
        Ok(hints.last)
    }

    /// The guest does not need what these pages held when it was asked in `round`: unless it has written to them since,
    /// they need not be sent. Returns how many of them were dirty; 0 if the round is over. What lies beyond the block's
    /// end, or in no block, is ignored.
    pub fn hint(&self, round: HintRound, block: BlockIndex, range: PageRange) -> u64 {
        if block.0 >= self.arming.len() {
            return 0;
        }
        let _guard = self.set.lock_for_hint();
        let hints = self.hints.read();
        if !hints.open || hints.last != round {
            return 0;
        }
        self.set.clear_held(block, range)
    }

    /// Begins a slice of work at `cursor`.
    pub fn slice<'a>(&'a self, cursor: &'a mut Cursor) -> TrackedSlice<'a> {
        TrackedSlice {
            slice: self.set.slice(cursor),
            tracker: self,
            arming_time: Duration::ZERO,
        }
    }

    /// The bitmaps, for looking at pages and for marking them.
    pub fn set(&self) -> &DirtySet {
        &self.set
    }
}

impl Drop for DirtyTracker {
    fn drop(&mut self) {
        if let Err(e) = self.log.stop() {
            // The guest only runs a little slower with a log left on.
            tracing::warn!("{e}");
        }
    }
}

/// A [`Slice`] that arms the log for the pages it hands out.
pub struct TrackedSlice<'a> {
    slice: Slice<'a>,
    tracker: &'a DirtyTracker,
    arming_time: Duration,
}

impl TrackedSlice<'_> {
    /// Takes the next run of at most `max` dirty pages, ready to be read. See [`Slice::next_run`].
    pub fn next_run(&mut self, max: usize) -> Result<Option<Run>, LogError> {
        let Some(run) = self.slice.next_run(max) else {
            return Ok(None);
        };
        if let Err(e) = self.arm(run.block, &[run.pages]) {
            self.slice.give_back(run);
            return Err(e);
        }
        Ok(Some(run))
    }

    /// Takes the next runs of dirty pages, ready to be read. See [`Slice::next_batch`].
    pub fn next_batch(&mut self, batch: &mut Batch, max: usize) -> Result<bool, LogError> {
        if !self.slice.next_batch(batch, max) {
            return Ok(false);
        }
        let block = batch.block();
        if let Err(e) = self.arm(block, batch.runs()) {
            for &pages in batch.runs() {
                self.slice.give_back(Run { block, pages });
            }
            return Err(e);
        }
        Ok(true)
    }

    fn arm(&mut self, block: BlockIndex, runs: &[PageRange]) -> Result<(), LogError> {
        let arming = &self.tracker.arming[block.0];
        for &run in runs {
            if arming.is_pending(run) {
                let start = Instant::now();
                arming.arm(&*self.tracker.log, run)?;
                self.arming_time += start.elapsed();
            }
        }
        Ok(())
    }

    /// Gives pages back that were not sent. See [`Slice::give_back`].
    pub fn give_back(&mut self, run: Run) {
        self.slice.give_back(run);
    }

    /// [`DirtyTracker::sync`] inside the slice: with [`Discipline::SliceLock`] one lock covers the sync and all that is
    /// taken after it, as a flush of COLO's RAM cache needs it.
    pub fn sync(&mut self) -> Result<u64, LogError> {
        self.tracker.sync_without_hints()
    }

    /// Time spent on arming in this slice.
    pub fn arming_time(&self) -> Duration {
        self.arming_time
    }
}
