//! Dirty tracking of a running migration: the bitmaps, the log that feeds them, and the order of law 3.

use crate::arming::{ArmingChunk, BlockArming};
use crate::discipline::Discipline;
use crate::log::{DirtyLog, LogError};
use crate::set::DirtySet;
use crate::slice::{Cursor, Run, Slice};
use crate::units::BlockIndex;

/// What must still be sent, and what the guest writes meanwhile.
///
/// [`sync`](Self::sync) fetches the log and merges it; a [`TrackedSlice`] takes runs of dirty pages and arms
/// the log for them before it hands them out, so that its user cannot read a page too early.
pub struct DirtyTracker<'g> {
    log: &'g dyn DirtyLog,
    set: DirtySet,
    arming: Vec<BlockArming>,
    chunk: ArmingChunk,
}

impl<'g> DirtyTracker<'g> {
    /// Switches `log` on, with every page of every block dirty. `block_pages` holds the blocks' sizes.
    pub fn start(
        log: &'g dyn DirtyLog,
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
            chunk,
        };
        log.start()?;
        tracker.set.mark_all();
        // A log may begin with every page reported as written. Unless this is fetched now, nothing of it
        // gets armed in the first pass, and all of memory is sent twice.
        tracker.sync()?;
        Ok(tracker)
    }

    /// Merges what was written since the last sync; returns how many pages were clean before.
    pub fn sync(&self) -> Result<u64, LogError> {
        let mut new = 0;
        for (block, arming) in self.arming.iter().enumerate() {
            new += arming.fetch(self.log, |words| self.set.merge(BlockIndex(block), words))?;
        }
        Ok(new)
    }

    /// Begins a slice of work at `cursor`.
    pub fn slice<'a>(&'a self, cursor: &'a mut Cursor) -> TrackedSlice<'a> {
        TrackedSlice {
            slice: self.set.slice(cursor),
            tracker: self,
        }
    }

    /// The bitmaps.
    pub fn set(&self) -> &DirtySet {
        &self.set
    }
}

impl Drop for DirtyTracker<'_> {
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
    tracker: &'a DirtyTracker<'a>,
}

impl TrackedSlice<'_> {
    /// Takes the next run of at most `max` dirty pages, ready to be read. See [`Slice::next_run`].
    pub fn next_run(&mut self, max: usize) -> Result<Option<Run>, LogError> {
        let Some(run) = self.slice.next_run(max, self.tracker.chunk.pages()) else {
            return Ok(None);
        };
        let arming = &self.tracker.arming[run.block.0];
        if let Err(e) = arming.arm(self.tracker.log, run.pages.start.0) {
            self.slice.give_back(run);
            return Err(e);
        }
        Ok(Some(run))
    }

    /// Gives pages back that were not sent. See [`Slice::give_back`].
    pub fn give_back(&mut self, run: Run) {
        self.slice.give_back(run);
    }
}
