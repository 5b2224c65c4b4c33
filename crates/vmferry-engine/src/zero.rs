//! Is this page all zeros? Asked of every page that is sent, so it runs at the speed of memory.
//!
//! Most pages that are not zero show it in their first bytes; a zero page has to be read to its end, with
//! the widest loads that the processor has.

use vmferry_dirty::PAGE_SIZE;

/// Whether all [`PAGE_SIZE`] bytes at `page` are zero.
///
/// The guest may write to the page meanwhile. Then the answer is that of some mixture of old and new bytes,
/// which is good enough: the write is in the dirty log, and the page will be looked at again.
///
/// # Safety
///
/// `page` is page-aligned, and the page is mapped and readable.
pub(crate) unsafe fn is_zero_page(page: *const u8) -> bool {
    debug_assert!((page as usize).is_multiple_of(PAGE_SIZE));
    // SAFETY: aligned and readable by this function's contract. Volatile, because the guest may write.
    if unsafe { page.cast::<u64>().read_volatile() } != 0 {
        return false;
    }
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F; the page is as this function's contract says.
            return unsafe { x86::is_zero_avx512(page) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2; the page is as this function's contract says.
            return unsafe { x86::is_zero_avx2(page) };
        }
    }
    // SAFETY: the page is as this function's contract says.
    unsafe { is_zero_words(page) }
}

/// Bytes that are looked at between two decisions to go on.
const STEP: usize = 256;

/// # Safety
///
/// As for [`is_zero_page`].
unsafe fn is_zero_words(page: *const u8) -> bool {
    const WORDS: usize = STEP / 8;
    let words = page.cast::<u64>();
    (0..PAGE_SIZE / STEP).all(|step| {
        (0..WORDS).fold(0, |or, i| {
            // SAFETY: step * WORDS + i is below PAGE_SIZE / 8.
            or | unsafe { words.add(step * WORDS + i).read_volatile() }
        }) == 0
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, __m512i, _mm256_load_si256, _mm256_or_si256, _mm256_testz_si256,
        _mm512_load_si512, _mm512_or_si512, _mm512_test_epi64_mask,
    };

    use super::{PAGE_SIZE, STEP};

    /// # Safety
    ///
    /// As for [`super::is_zero_page`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn is_zero_avx2(page: *const u8) -> bool {
        const LANES: usize = STEP / size_of::<__m256i>();
        let lanes = page.cast::<__m256i>();
        (0..PAGE_SIZE / STEP).all(|step| {
            // SAFETY: aligned, and every index is below PAGE_SIZE / 32.
            let load = |i| unsafe { _mm256_load_si256(lanes.add(step * LANES + i)) };
            let or = (1..LANES).fold(load(0), |or, i| _mm256_or_si256(or, load(i)));
            _mm256_testz_si256(or, or) == 1
        })
    }

    /// # Safety
    ///
    /// As for [`super::is_zero_page`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn is_zero_avx512(page: *const u8) -> bool {
        const LANES: usize = STEP / size_of::<__m512i>();
        let lanes = page.cast::<__m512i>();
        (0..PAGE_SIZE / STEP).all(|step| {
            // SAFETY: aligned, and every index is below PAGE_SIZE / 64.
            let load = |i| unsafe { _mm512_load_si512(lanes.add(step * LANES + i)) };
            let or = (1..LANES).fold(load(0), |or, i| _mm512_or_si512(or, load(i)));
            _mm512_test_epi64_mask(or, or) == 0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE]);

    /// A way to ask.
    type Ask = fn(*const u8) -> bool;

    /// All ways that this processor can go.
    fn ways() -> Vec<(&'static str, Ask)> {
        // SAFETY: the test asks about a live page only.
        let chosen: Ask = |p| unsafe { is_zero_page(p) };
        // SAFETY: as above.
        let words: Ask = |p| unsafe { is_zero_words(p) };
        let mut ways = vec![("chosen", chosen), ("words", words)];
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above, and the processor has the feature.
            ways.push(("avx2", |p| unsafe { x86::is_zero_avx2(p) }));
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: as above, and the processor has the feature.
            ways.push(("avx512", |p| unsafe { x86::is_zero_avx512(p) }));
        }
        ways
    }

    #[test]
    fn one_bit_anywhere_makes_a_page_not_zero() {
        let mut page = Box::new(Page([0; PAGE_SIZE]));
        for (name, is_zero) in ways() {
            assert!(is_zero(page.0.as_ptr()), "{name}");
            for at in 0..PAGE_SIZE {
                page.0[at] = 1 << (at % 8);
                assert!(!is_zero(page.0.as_ptr()), "{name} missed byte {at}");
                page.0[at] = 0;
            }
        }
    }
}
