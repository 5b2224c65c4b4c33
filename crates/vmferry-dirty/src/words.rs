//! Page ranges as words of a bitmap.

use crate::units::PageRange;

/// Bits in a word of a bitmap.
pub(crate) const WORD_BITS: usize = u64::BITS as usize;

/// Calls `f` with every word that `range` touches and the mask of its bits there. Whole words are visited
/// once each.
pub(crate) fn for_each_mask(range: PageRange, mut f: impl FnMut(usize, u64)) {
    let (start, end) = (range.start.0, range.end.0);
    let mut at = start;
    while at < end {
        let (word, bit) = (at / WORD_BITS, at % WORD_BITS);
        let bits = (WORD_BITS - bit).min(end - at);
        f(word, mask(bit, bits));
        at += bits;
    }
}

/// `bits` ones (1 to 64) beginning at `bit`.
pub(crate) fn mask(bit: usize, bits: usize) -> u64 {
    (u64::MAX >> (WORD_BITS - bits)) << bit
}
