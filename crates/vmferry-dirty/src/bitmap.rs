//! The dirty bitmap of one RAM block: storage, and operations on single words.

use crate::sync::{AtomicU64, Ordering};
use crate::units::PageRange;
use crate::words::{WORD_BITS, for_each_mask};

/// One bit for every page of a RAM block. Set: the page must still be sent.
///
/// Every operation is atomic on a word and returns which bits it changed, so that whoever changes a bit, and
/// nobody else, accounts for it: that is what keeps the count exact (law 2) without a lock.
///
/// # Ordering
///
/// - Bits are *taken* with Acquire and *set* with Release: a taker that sees a bit also sees what was
///   written to the page before the bit was set, so the page it then reads is no older than the bit (law 1).
/// - Looks ahead of a change are Relaxed: they only skip words, and a bit that a look misses is still
///   there for the next pass.
#[derive(Debug)]
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    pages: usize,
}

impl DirtyBitmap {
    /// A bitmap for `pages` pages, all clean.
    pub fn new(pages: usize) -> Self {
        DirtyBitmap {
            words: (0..pages.div_ceil(WORD_BITS))
                .map(|_| AtomicU64::new(0))
                .collect(),
            pages,
        }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Number of words: `pages / 64`, rounded up.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    /// Whether a page is dirty.
    pub fn is_dirty(&self, page: usize) -> bool {
        page < self.pages && self.load(page / WORD_BITS) >> (page % WORD_BITS) & 1 == 1
    }

    /// Number of dirty pages, by counting. Exact only while nobody changes the bitmap.
    pub fn count(&self) -> u64 {
        (0..self.words())
            .map(|w| u64::from(self.load(w).count_ones()))
            .sum()
    }

    /// Calls `f` with every run of dirty pages, in order. Takes nothing; what changes meanwhile may be seen or
    /// not.
    pub fn visit(&self, mut f: impl FnMut(PageRange)) {
        let mut run = PageRange::new(0, 0);
        let mut word = self.skip_clean(0);
        while word < self.words() {
            let (mut at, mut bits) = (word * WORD_BITS, self.load(word));
            while bits != 0 {
                let gap = bits.trailing_zeros();
                let ones = (bits >> gap).trailing_ones();
                let start = at + gap as usize;
                if run.end.0 != start {
                    if !run.is_empty() {
                        f(run);
                    }
                    run = PageRange::new(start, start);
                }
                run.end.0 += ones as usize;
                at += (gap + ones) as usize;
                bits = bits.checked_shr(gap + ones).unwrap_or(0);
            }
            word = self.skip_clean(word + 1);
        }
        if !run.is_empty() {
            f(run);
        }
    }

    #[inline]
    pub(crate) fn load(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Relaxed)
    }

    /// Index of the first word at or after `word` that is not zero; one past the last if there is none.
    #[inline]
    pub(crate) fn skip_clean(&self, word: usize) -> usize {
        // A cache line at a time: loads of atomics are not vectorised, but eight of them, one branch, and memory
        // that is fetched ahead are as fast as a loop with vectors.
        const LINE: usize = 8;
        let mut at = word;
        while let Some(line) = self.words.get(at..at + LINE) {
            prefetch(self.words.as_ptr().wrapping_add(at + PREFETCH_WORDS));
            let line: [u64; LINE] = std::array::from_fn(|i| line[i].load(Ordering::Relaxed));
            if line.iter().fold(0, |or, word| or | word) != 0 {
                // Which one, without a branch for each: nobody could foretell it.
                let dirty = |i: usize| u32::from(line[i] != 0) << i;
                let dirty = (0..LINE).fold(0, |or, i| or | dirty(i));
                return at + dirty.trailing_zeros() as usize;
            }
            at += LINE;
        }
        while at < self.words.len() && self.load(at) == 0 {
            at += 1;
        }
        at
    }

    /// Clears the bits of `mask`; returns those that were set.
    #[inline]
    pub(crate) fn take(&self, word: usize, mask: u64) -> u64 {
        let word = &self.words[word];
        if mask == u64::MAX {
            word.swap(0, Ordering::Acquire)
        } else {
            word.fetch_and(!mask, Ordering::Acquire) & mask
        }
    }

    /// Like [`take`](Self::take), for a caller that holds the lock under which all changes are made: no
    /// read-modify-write is needed then, and the lock orders everything.
    pub(crate) fn take_locked(&self, word: usize, mask: u64) -> u64 {
        let word = &self.words[word];
        let old = word.load(Ordering::Relaxed);
        word.store(old & !mask, Ordering::Relaxed);
        old & mask
    }

    /// Sets the bits of `mask`; returns those that were clear.
    pub(crate) fn set(&self, word: usize, mask: u64) -> u64 {
        mask & !self.words[word].fetch_or(mask, Ordering::Release)
    }

    /// Sets a range, cut to the block; returns how many of its bits were clear.
    pub(crate) fn set_range(&self, range: PageRange) -> u64 {
        let mut new = 0;
        for_each_mask(range.clamp_to(self.pages), |word, mask| {
            new += u64::from(self.set(word, mask).count_ones());
        });
        new
    }

    /// Clears a range, cut to the block; returns how many of its bits were set.
    pub(crate) fn clear_range(&self, range: PageRange) -> u64 {
        let mut gone = 0;
        for_each_mask(range.clamp_to(self.pages), |word, mask| {
            if self.load(word) & mask != 0 {
                gone += u64::from(self.take(word, mask).count_ones());
            }
        });
        gone
    }
}

/// How far ahead of a scan the processor is told to fetch: 4 KiB. Its own prefetchers stop at the end of each page.
const PREFETCH_WORDS: usize = 512;

/// Has the processor fetch what is at `address`, which may be anywhere, beyond the bitmap as well.
#[inline]
fn prefetch(address: *const AtomicU64) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction, and it never faults, whatever the address is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
