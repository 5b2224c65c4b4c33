//! Many runs of dirty pages at one go.

use crate::units::{BlockIndex, PageIndex, PageRange};
use crate::words::WORD_BITS;

/// Runs of dirty pages that were taken together: all of one block, in order, at most
/// [`Batch::MAX_PAGES`] pages. Whoever has it must send the pages or give them back.
///
/// A caller keeps one and lets [`Slice::next_batch`](crate::Slice::next_batch) fill it again and again.
#[derive(Debug)]
pub struct Batch {
    block: BlockIndex,
    pages: usize,
    len: usize,
    /// The first `len` are the runs. There is room for a word's worth of them beyond [`Self::MAX_PAGES`], as
    /// `push` works in steps.
    runs: Box<[PageRange; Batch::MAX_PAGES + WORD_BITS]>,
}

impl Batch {
    /// Most pages in a batch: a megabyte of guest memory.
    pub const MAX_PAGES: usize = 256;

    /// An empty batch.
    pub fn new() -> Self {
        Batch {
            block: BlockIndex(0),
            pages: 0,
            len: 0,
            runs: Box::new([PageRange::new(0, 0); Self::MAX_PAGES + WORD_BITS]),
        }
    }

    /// The block that the pages belong to.
    pub fn block(&self) -> BlockIndex {
        self.block
    }

    /// The runs, in order, no two of them adjacent.
    pub fn runs(&self) -> &[PageRange] {
        &self.runs[..self.len]
    }

    /// Number of pages in all runs.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Empties it, for pages of `block`.
    pub(crate) fn restart(&mut self, block: BlockIndex) {
        (self.block, self.pages, self.len) = (block, 0, 0);
    }

    /// Adds the pages of `bits` in word `word`, which lies behind all words added before; there are `pages` of
    /// them. Together they must not be more than [`Self::MAX_PAGES`].
    #[inline(always)]
    pub(crate) fn push(&mut self, word: usize, mut bits: u64, pages: u32) {
        let base = word * WORD_BITS;
        self.pages += pages as usize;
        // A run that goes on from the word before.
        if bits & 1 == 1
            && let Some(last) = self.runs[..self.len].last_mut()
            && last.end.0 == base
        {
            last.end.0 += bits.trailing_ones() as usize;
            bits &= bits.wrapping_add(1);
        }
        // The first and the last bit of every run. All runs are then found without looking at their
        // lengths, four at a time: how many there are, and how long they are, no processor can guess, and a
        // wrong guess costs as much as ten runs. What is written behind the last run is written over later.
        let (mut starts, mut ends) = (bits & !(bits << 1), bits & !(bits >> 1));
        let count = starts.count_ones() as usize;
        let room: &mut [PageRange; WORD_BITS] = (&mut self.runs[self.len..][..WORD_BITS])
            .try_into()
            .expect("len is at most MAX_PAGES");
        for step in room[..count.next_multiple_of(4)].chunks_exact_mut(4) {
            for run in step {
                *run = PageRange {
                    start: PageIndex(base + starts.trailing_zeros() as usize),
                    end: PageIndex(base + 1 + ends.trailing_zeros() as usize),
                };
                starts &= starts.wrapping_sub(1);
                ends &= ends.wrapping_sub(1);
            }
        }
        self.len += count;
    }
}

impl Default for Batch {
    fn default() -> Self {
        Batch::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_in_words_and_across_them() {
        let mut batch = Batch::new();
        batch.restart(BlockIndex(3));
        for (word, bits) in [
            (1, 0b1011 | 1 << 63),
            (2, 0b1_0011),
            (4, u64::MAX),
            (5, u64::MAX),
            (6, 1 << 63),
        ] {
            batch.push(word, bits, bits.count_ones());
        }
        let expected = [
            (64, 66),
            (67, 68),
            (127, 130),
            (132, 133),
            (256, 384),
            (447, 448),
        ];
        assert_eq!(
            batch.runs(),
            expected.map(|(start, end)| PageRange::new(start, end))
        );
        assert_eq!((batch.block(), batch.pages()), (BlockIndex(3), 136));
        batch.restart(BlockIndex(0));
        assert!(batch.is_empty());
        batch.push(0, 0x5555_5555_5555_5555, 32);
        assert_eq!(batch.runs().len(), 32);
    }
}
