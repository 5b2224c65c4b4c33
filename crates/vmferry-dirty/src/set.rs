//! The dirty bitmaps of all RAM blocks of a virtual machine, with the exact count of their set bits.

use crate::bitmap::DirtyBitmap;
use crate::discipline::Discipline;
use crate::slice::{Cursor, Slice};
use crate::sync::{AtomicI64, Mutex, MutexGuard, Ordering};
use crate::units::{BlockIndex, PageRange};
use crate::words::for_each_mask;

/// The dirty bitmaps of a virtual machine, under one [`Discipline`].
///
/// Three parties work on it at the same time: a *sync* [`merge`](Self::merge)s a fetched log, the migration
/// thread takes runs of dirty pages through a [`Slice`], a free-page hint [`clear`](Self::clear)s ranges.
///
/// # Count
///
/// [`dirty_pages`](Self::dirty_pages) equals the number of set bits whenever no operation is under way and no
/// slice is open (law 2). While a slice is open it may be too high, by at most the pages that the slice has
/// taken since it last published its count, [`PUBLISH_INTERVAL`](crate::PUBLISH_INTERVAL).
pub struct DirtySet {
    blocks: Vec<DirtyBitmap>,
    discipline: Discipline,
    /// Signed, because a hint may subtract the bits it clears before the merge that set them has added
    /// them. Relaxed everywhere: it is a sum of contributions and orders nothing else; a reader that needs
    /// it exact has joined or been told by the threads it counts for.
    dirty_pages: AtomicI64,
    /// Taken as the discipline says, see [`Discipline`]. Guards no data of its own: words and count stay
    /// atomic, so that a reader needs no lock.
    lock: Mutex<()>,
}

impl DirtySet {
    /// Bitmaps for blocks of the given sizes in pages, all clean.
    pub fn new(block_pages: &[usize], discipline: Discipline) -> Self {
        DirtySet {
            blocks: block_pages.iter().map(|&p| DirtyBitmap::new(p)).collect(),
            discipline,
            dirty_pages: AtomicI64::new(0),
            lock: Mutex::new(()),
        }
    }

    /// The discipline in force.
    pub fn discipline(&self) -> Discipline {
        self.discipline
    }

    /// The bitmap of one block, for looking at.
    pub fn bitmap(&self, block: BlockIndex) -> &DirtyBitmap {
        &self.blocks[block.0]
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Pages that must still be sent. See the type's documentation for how exact it is when.
    pub fn dirty_pages(&self) -> u64 {
        self.dirty_pages.load(Ordering::Relaxed).max(0) as u64
    }

    /// Marks every page of every block as dirty.
    pub fn mark_all(&self) {
        for block in 0..self.blocks.len() {
            self.mark(
                BlockIndex(block),
                PageRange::new(0, self.blocks[block].pages()),
            );
        }
    }

    /// Marks a range as dirty, cut to the block. Returns how many pages were clean.
    pub fn mark(&self, block: BlockIndex, range: PageRange) -> u64 {
        let _guard = self.lock_against_plain_stores();
        let new = self.blocks[block.0].set_range(range);
        self.add(new as i64);
        new
    }

    /// Merges a fetched log: bit `i % 64` of word `i / 64` for page `i`, no bit beyond the block's end.
    /// Returns how many pages were clean before.
    pub fn merge(&self, block: BlockIndex, log: &[u64]) -> u64 {
        let _guard = self.lock_for_sync();
        self.merge_held(block, log)
    }

    /// [`merge`](Self::merge) for a caller that holds the lock which the discipline wants for a sync.
    pub(crate) fn merge_held(&self, block: BlockIndex, log: &[u64]) -> u64 {
        let bitmap = &self.blocks[block.0];
        let mut new = 0;
        for (word, &bits) in log.iter().enumerate() {
            if bits != 0 {
                new += u64::from(bitmap.set(word, bits).count_ones());
            }
        }
        self.add(new as i64);
        new
    }

    /// Clears a range that need not be sent, cut to the block. Returns how many pages were dirty.
    pub fn clear(&self, block: BlockIndex, range: PageRange) -> u64 {
        let _guard = self.lock_for_hint();
        self.clear_held(block, range)
    }

    /// [`clear`](Self::clear) for a caller that holds the lock which the discipline wants for a hint.
    pub(crate) fn clear_held(&self, block: BlockIndex, range: PageRange) -> u64 {
        let bitmap = &self.blocks[block.0];
        match self.discipline {
            Discipline::LockFree | Discipline::SliceLock => {
                let gone = bitmap.clear_range(range);
                self.add(-(gone as i64));
                gone
            }
            Discipline::PerBitLock => {
                let mut gone = 0;
                for_each_mask(range.clamp_to(bitmap.pages()), |word, mask| {
                    gone += u64::from(self.take_bit_by_bit(block, word, mask).count_ones());
                });
                gone
            }
        }
    }

    /// Begins a slice of the migration thread's work at `cursor`, which the slice moves on. Under
    /// [`Discipline::SliceLock`] hints and merges wait until the slice is dropped.
    pub fn slice<'a>(&'a self, cursor: &'a mut Cursor) -> Slice<'a> {
        let guard = (self.discipline == Discipline::SliceLock).then(|| self.lock());
        Slice::new(self, cursor, guard)
    }

    /// Adds to the count, or subtracts from it.
    pub(crate) fn add(&self, pages: i64) {
        self.dirty_pages.fetch_add(pages, Ordering::Relaxed);
    }

    /// Clears bits of a word as the discipline has it. Returns those that were set.
    pub(crate) fn take_word(&self, block: BlockIndex, word: usize, mask: u64) -> u64 {
        match self.discipline {
            Discipline::LockFree | Discipline::SliceLock => self.blocks[block.0].take(word, mask),
            Discipline::PerBitLock => self.take_bit_by_bit(block, word, mask),
        }
    }

    /// Clears the set bits of `mask` one at a time, each under the lock and with its share of the count; the
    /// baseline that [`Discipline::PerBitLock`] stands for. Returns those that were set.
    pub(crate) fn take_bit_by_bit(&self, block: BlockIndex, word: usize, mask: u64) -> u64 {
        let bitmap = &self.blocks[block.0];
        let mut left = bitmap.load(word) & mask;
        let mut taken = 0;
        while left != 0 {
            let bit = left & left.wrapping_neg();
            left ^= bit;
            let _guard = self.lock();
            if bitmap.take_locked(word, bit) != 0 {
                taken |= bit;
                // Whoever changes the count under this discipline holds the lock, as for the bits.
                let count = self.dirty_pages.load(Ordering::Relaxed);
                self.dirty_pages.store(count - 1, Ordering::Relaxed);
            }
        }
        taken
    }

    /// Sets bits again that an open slice had taken, and leaves the count to the slice. Returns how many of
    /// them were clear.
    pub(crate) fn put_back(&self, block: BlockIndex, range: PageRange) -> u64 {
        let _guard = self.lock_against_plain_stores();
        self.blocks[block.0].set_range(range)
    }

    /// [`put_back`](Self::put_back) for bits of one word.
    pub(crate) fn put_back_word(&self, block: BlockIndex, word: usize, bits: u64) -> u64 {
        let _guard = self.lock_against_plain_stores();
        u64::from(self.blocks[block.0].set(word, bits).count_ones())
    }

    /// The lock for setting bits. Only `PerBitLock` needs one: its plain stores would undo what happens
    /// beside them. Under the other disciplines bits are set atomically, and whoever has written a page can
    /// say so without waiting for a slice to end.
    pub(crate) fn lock_against_plain_stores(&self) -> Option<MutexGuard<'_, ()>> {
        (self.discipline == Discipline::PerBitLock).then(|| self.lock())
    }

    /// The lock for a sync.
    pub(crate) fn lock_for_sync(&self) -> Option<MutexGuard<'_, ()>> {
        (self.discipline != Discipline::LockFree).then(|| self.lock())
    }

    /// The lock for a hint.
    pub(crate) fn lock_for_hint(&self) -> Option<MutexGuard<'_, ()>> {
        (self.discipline == Discipline::SliceLock).then(|| self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock()
    }
}
