//! A slice of the migration thread's work: taking dirty pages.

use crate::batch::Batch;
use crate::bitmap::DirtyBitmap;
use crate::discipline::Discipline;
use crate::set::DirtySet;
use crate::sync::{MutexGuard, unlock_fair};
use crate::units::{BlockIndex, PageRange};
use crate::words::{WORD_BITS, mask};

/// An open slice brings the published count up to date before it has taken more pages than this: often enough for
/// a progress display, seldom enough to cost nothing (one atomic addition in some 4000 pages).
pub const PUBLISH_INTERVAL: u64 = 4096;

/// What is taken until it is published; what one step takes beyond that stays within the interval.
const PUBLISH_AT: i64 = PUBLISH_INTERVAL as i64 - (Batch::MAX_PAGES + WORD_BITS) as i64;

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

/// An open slice: takes dirty pages in order from a [`Cursor`], a run or a batch of runs at a time.
///
/// Whole words of the bitmap are taken, and runs are handed out from them; what is left of the last word
/// when the slice is dropped goes back.
pub struct Slice<'a> {
    set: &'a DirtySet,
    cursor: &'a mut Cursor,
    block: BlockIndex,
    scan: Scan,
    /// Pages taken that the published count still contains.
    unpublished: i64,
    guard: Option<MutexGuard<'a, ()>>,
}

/// Position in a block's bitmap.
#[derive(Clone, Copy)]
struct Scan {
    /// The word to look at next.
    next: usize,
    /// Bits of the word before `next` that are taken but not yet handed out.
    held: u64,
}

impl Scan {
    /// The word that `held` is of.
    fn word(self) -> usize {
        self.next - 1
    }

    /// Takes the next word that is not clean, if there is one.
    #[inline(always)]
    fn hold_next(&mut self, bitmap: &DirtyBitmap, take: impl Fn(usize) -> u64) {
        while self.next < bitmap.words() {
            // Where much is dirty, it is the next word.
            let word = match bitmap.load(self.next) {
                0 => bitmap.skip_clean(self.next + 1),
                _ => self.next,
            };
            if word == bitmap.words() {
                self.next = word;
                return;
            }
            self.next = word + 1;
            self.held = take(word);
            if self.held != 0 {
                return;
            }
            // A hint has cleared the word since we looked.
        }
    }

    /// Moves words into `batch`, as many as have room; of the first one a part, if need be. Begins with what is
    /// held, which is something. Returns how many pages were taken from the bitmap.
    #[inline(always)]
    fn fill(
        &mut self,
        batch: &mut Batch,
        mut room: u32,
        bitmap: &DirtyBitmap,
        take: impl Fn(usize) -> u64,
    ) -> u32 {
        let mut taken = 0;
        let mut ones = self.held.count_ones();
        if ones > room {
            let mut rest = self.held;
            for _ in 0..room {
                rest &= rest - 1;
            }
            batch.push(self.word(), self.held ^ rest, room);
            self.held = rest;
            return taken;
        }
        while ones != 0 && ones <= room {
            let (word, bits, pages) = (self.word(), std::mem::take(&mut self.held), ones);
            // The next word is taken before the runs of this one are worked out, which needs nothing from
            // memory: so the processor does that while it waits for the locked instruction.
            self.hold_next(bitmap, &take);
            ones = self.held.count_ones();
            taken += ones;
            batch.push(word, bits, pages);
            room -= pages;
        }
        taken
    }

    /// [`fill`](Self::fill), with the instructions for counting and finding bits that every processor of the last
    /// ten years has, but not those that a portable program is compiled for.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "popcnt,bmi1")]
    fn fill_with_bit_instructions(
        &mut self,
        batch: &mut Batch,
        room: u32,
        bitmap: &DirtyBitmap,
        take: impl Fn(usize) -> u64,
    ) -> u32 {
        self.fill(batch, room, bitmap, take)
    }

    /// [`fill`](Self::fill), as fast as this processor can.
    #[inline]
    fn fill_fast(
        &mut self,
        batch: &mut Batch,
        room: u32,
        bitmap: &DirtyBitmap,
        take: impl Fn(usize) -> u64,
    ) -> u32 {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("popcnt") && is_x86_feature_detected!("bmi1") {
            // SAFETY: the processor has the instructions.
            return unsafe { self.fill_with_bit_instructions(batch, room, bitmap, take) };
        }
        self.fill(batch, room, bitmap, take)
    }
}

impl<'a> Slice<'a> {
    pub(crate) fn new(
        set: &'a DirtySet,
        cursor: &'a mut Cursor,
        guard: Option<MutexGuard<'a, ()>>,
    ) -> Self {
        let (block, word, bit) = (
            BlockIndex(cursor.block),
            cursor.page / WORD_BITS,
            cursor.page % WORD_BITS,
        );
        let mut slice = Slice {
            set,
            cursor,
            block,
            scan: Scan {
                next: word,
                held: 0,
            },
            unpublished: 0,
            guard,
        };
        // The pages of the cursor's word that lie behind it are for the next pass.
        if bit != 0 {
            slice.scan.next += 1;
            slice.scan.held = slice.take(word, mask(bit, WORD_BITS - bit));
        }
        slice
    }

    /// Takes the next run of dirty pages: at most `max` of them. `None` when there is no dirty page from the
    /// cursor to the end of the last block.
    pub fn next_run(&mut self, max: usize) -> Option<Run> {
        debug_assert!(max > 0);
        if !self.hold_something() {
            return None;
        }
        let bitmap = self.set.bitmap(self.block);
        let start = self.scan.word() * WORD_BITS + self.scan.held.trailing_zeros() as usize;
        let (limit, mut end) = (start.saturating_add(max), start);
        loop {
            let bit = end % WORD_BITS;
            let ones = (self.scan.held >> bit).trailing_ones() as usize;
            let ones = ones.min(limit - end);
            self.scan.held &= !mask(bit, ones);
            end += ones;
            // Does a run that fills its word to the end go on in the next?
            let word = self.scan.next;
            if !end.is_multiple_of(WORD_BITS)
                || end == limit
                || word == bitmap.words()
                || bitmap.load(word) & 1 == 0
            {
                break;
            }
            self.scan.next += 1;
            self.scan.held = self.take(word, u64::MAX);
            self.publish_if_due();
            if self.scan.held & 1 == 0 {
                break; // a hint was faster
            }
        }
        self.publish_if_due();
        Some(Run {
            block: self.block,
            pages: PageRange::new(start, end),
        })
    }

    /// Takes the next runs of dirty pages, at most `max` pages and [`Batch::MAX_PAGES`], into `batch`, whose
    /// former content is forgotten. `false` when there is no dirty page from the cursor to the end of the last
    /// block.
    ///
    /// A batch may hold less than it could although there are more pages: it ends with the block, and with
    /// a word of the bitmap.
    pub fn next_batch(&mut self, batch: &mut Batch, max: usize) -> bool {
        debug_assert!(max > 0);
        let more = self.hold_something();
        batch.restart(self.block);
        if !more {
            return false;
        }
        let room = max.min(Batch::MAX_PAGES) as u32;
        let (set, block) = (self.set, self.block);
        let bitmap = set.bitmap(block);
        // On a copy, which lives in registers; and with the discipline looked at once, not for each word.
        let mut scan = self.scan;
        let taken = match set.discipline() {
            Discipline::LockFree | Discipline::SliceLock => {
                scan.fill_fast(batch, room, bitmap, |word| bitmap.take(word, u64::MAX))
            }
            Discipline::PerBitLock => scan.fill_fast(batch, room, bitmap, |word| {
                set.take_bit_by_bit(block, word, u64::MAX)
            }),
        };
        self.scan = scan;
        self.count(taken);
        self.publish_if_due();
        true
    }

    /// Gives pages back that were taken in this or an earlier slice but not sent.
    pub fn give_back(&mut self, run: Run) {
        self.unpublished -= self.set.put_back(run.block, run.pages) as i64;
        // At once: while a slice is open the count may be too high, but never so low that pages seem to be sent.
        if self.unpublished < 0 {
            self.publish();
        }
    }

    /// [`DirtySet::merge`] inside the slice: with [`Discipline::SliceLock`] one lock covers the merge and all that
    /// is taken after it, as a flush of COLO's RAM cache needs it.
    pub fn merge(&mut self, block: BlockIndex, log: &[u64]) -> u64 {
        let _guard = self.set.lock_against_plain_stores();
        self.set.merge_held(block, log)
    }

    /// Makes sure that bits are held, in this block or a later one. `false` if there are none left.
    fn hold_something(&mut self) -> bool {
        while self.scan.held == 0 {
            if self.block.0 >= self.set.blocks() {
                return false;
            }
            let (set, block) = (self.set, self.block);
            self.scan.hold_next(set.bitmap(block), |word| {
                set.take_word(block, word, u64::MAX)
            });
            self.count(self.scan.held.count_ones());
            if self.scan.held == 0 {
                self.block.0 += 1;
                self.scan.next = 0;
            }
        }
        true
    }

    /// Takes bits of a word.
    fn take(&mut self, word: usize, mask: u64) -> u64 {
        let bits = self.set.take_word(self.block, word, mask);
        self.count(bits.count_ones());
        bits
    }

    /// Counts pages that were taken.
    fn count(&mut self, taken: u32) {
        // With the lock for every bit goes the count for every bit.
        if self.set.discipline() != Discipline::PerBitLock {
            self.unpublished += i64::from(taken);
        }
    }

    fn publish_if_due(&mut self) {
        if self.unpublished >= PUBLISH_AT {
            self.publish();
        }
    }

    fn publish(&mut self) {
        if self.unpublished != 0 {
            let _guard = self.set.lock_against_plain_stores();
            self.set.add(-std::mem::take(&mut self.unpublished));
        }
    }
}

impl Drop for Slice<'_> {
    fn drop(&mut self) {
        let Scan { next, held } = self.scan;
        let mut page = next * WORD_BITS;
        if held != 0 {
            let word = self.scan.word();
            page = word * WORD_BITS + held.trailing_zeros() as usize;
            self.unpublished -= self.set.put_back_word(self.block, word, held) as i64;
        }
        *self.cursor = Cursor {
            block: self.block.0,
            page,
        };
        self.publish();
        // The migration thread begins its next slice at once. A hint that waits must come first, or it would wait
        // for ever.
        if let Some(guard) = self.guard.take() {
            unlock_fair(guard);
        }
    }
}
