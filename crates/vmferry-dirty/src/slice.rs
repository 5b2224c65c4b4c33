//! A slice of the migration thread's work: taking runs of dirty pages.

use crate::discipline::Discipline;
use crate::set::DirtySet;
use crate::sync::MutexGuard;
use crate::units::{BlockIndex, PageRange};
use crate::words::{WORD_BITS, mask};

/// Pages that an open slice takes before it brings the published count up to date: often enough for a
/// progress display, seldom enough to cost nothing (one atomic addition in 4096 pages).
pub const PUBLISH_INTERVAL: u64 = 4096;

/// Where the migration thread's scan of the bitmaps stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    block: usize,
    page: usize,
}

/// A run of dirty pages that was taken: their bits are clear, and whoever has the run must send the pages
/// or give them back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The block that the pages belong to.
    pub block: BlockIndex,
    /// The pages.
    pub pages: PageRange,
}

/// An open slice: takes dirty pages in order from a [`Cursor`].
///
/// Under [`Discipline::LockFree`] a whole word of the bitmap is taken with one atomic operation, and runs
/// are handed out from it; what is left of it when the slice is dropped goes back. The other disciplines
/// work on the word in place.
pub struct Slice<'a> {
    set: &'a DirtySet,
    cursor: &'a mut Cursor,
    /// Bits of the cursor's word that are taken but not yet handed out.
    held: u64,
    /// Pages taken that the published count still contains; negative after giving back.
    unpublished: i64,
    _guard: Option<MutexGuard<'a, ()>>,
}

impl<'a> Slice<'a> {
    pub(crate) fn new(
        set: &'a DirtySet,
        cursor: &'a mut Cursor,
        guard: Option<MutexGuard<'a, ()>>,
    ) -> Self {
        Slice {
            set,
            cursor,
            held: 0,
            unpublished: 0,
            _guard: guard,
        }
    }

    /// Takes the next run of dirty pages: at most `max` pages, none beyond the next multiple of `align` pages
    /// (a multiple of 64). `None` when there is no dirty page from the cursor to the end of the last block.
    pub fn next_run(&mut self, max: usize, align: usize) -> Option<Run> {
        debug_assert!(max > 0 && align.is_multiple_of(WORD_BITS));
        loop {
            if self.cursor.block >= self.set.blocks() {
                return None;
            }
            let block = BlockIndex(self.cursor.block);
            let bitmap = self.set.bitmap(block);
            if self.held == 0 {
                if !self.cursor.page.is_multiple_of(WORD_BITS) {
                    self.hold(block);
                    if self.held == 0 {
                        self.cursor.page = self.cursor.page.next_multiple_of(WORD_BITS);
                    }
                } else {
                    let word = bitmap.skip_clean(self.cursor.page / WORD_BITS);
                    if word == bitmap.words() {
                        *self.cursor = Cursor {
                            block: block.0 + 1,
                            page: 0,
                        };
                        continue;
                    }
                    self.cursor.page = word * WORD_BITS;
                    self.hold(block);
                    if self.held == 0 {
                        // A hint cleared the word since we looked.
                        self.cursor.page += WORD_BITS;
                    }
                }
                if self.held == 0 {
                    continue;
                }
            }
            return Some(self.run_from_held(block, max, align));
        }
    }

    /// Takes the dirty pages of the cursor's word, from the cursor on, into `held`.
    fn hold(&mut self, block: BlockIndex) {
        let (word, bit) = (self.cursor.page / WORD_BITS, self.cursor.page % WORD_BITS);
        let wanted = mask(bit, WORD_BITS - bit);
        let bitmap = self.set.bitmap(block);
        self.held = match self.set.discipline() {
            Discipline::LockFree => bitmap.take(word, wanted),
            Discipline::SliceLock => bitmap.take_locked(word, wanted),
            // Counts for itself, bit by bit.
            Discipline::PerBitLock => {
                self.held = self
                    .set
                    .take_bit_by_bit(block, word, bitmap.load(word) & wanted);
                return;
            }
        };
        self.unpublished += i64::from(self.held.count_ones());
        if self.unpublished >= PUBLISH_INTERVAL as i64 {
            self.publish();
        }
    }

    /// Hands out a run that begins with the lowest held bit, taking following words as long as it goes on.
    fn run_from_held(&mut self, block: BlockIndex, max: usize, align: usize) -> Run {
        let word_start = self.cursor.page / WORD_BITS * WORD_BITS;
        let start = word_start + self.held.trailing_zeros() as usize;
        let limit = (start + max).min((start + 1).next_multiple_of(align));
        let mut end = start;
        self.cursor.page = start;
        loop {
            let bit = end % WORD_BITS;
            let ones = (!(self.held >> bit)).trailing_zeros() as usize;
            let ones = ones.min(WORD_BITS - bit).min(limit - end);
            if ones == 0 {
                break;
            }
            self.held &= !mask(bit, ones);
            end += ones;
            self.cursor.page = end;
            if !end.is_multiple_of(WORD_BITS) || end == limit {
                break;
            }
            // The run fills its word to the end: look whether it goes on in the next.
            if end / WORD_BITS >= self.set.bitmap(block).words() {
                break;
            }
            self.hold(block);
        }
        Run {
            block,
            pages: PageRange::new(start, end),
        }
    }

    /// Gives pages back that were taken in this or an earlier slice but not sent.
    pub fn give_back(&mut self, run: Run) {
        self.unpublished -= self.set.put_back(run.block, run.pages) as i64;
    }

    fn publish(&mut self) {
        self.set.add(-std::mem::take(&mut self.unpublished));
    }
}

impl Drop for Slice<'_> {
    fn drop(&mut self) {
        if self.held != 0 {
            let block = BlockIndex(self.cursor.block);
            let word = self.cursor.page / WORD_BITS;
            self.unpublished -= self.set.put_back_word(block, word, self.held) as i64;
        }
        self.publish();
    }
}
