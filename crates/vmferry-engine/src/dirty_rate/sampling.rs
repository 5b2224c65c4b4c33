//! Measuring by the content of some pages: costs the guest nothing, and uses no log.

use std::time::{Duration, Instant};

use vmferry_dirty::{PAGE_SIZE, PageIndex};

use super::{DirtyRateError, Rate, check, per_second, wait};
use crate::cancel::CancelToken;
use crate::ram::RamBlock;

const PAGES_IN_GIB: u64 = (1 << 30) / PAGE_SIZE as u64;

/// Compares pages with what they held before, and takes the share that changed for that of the whole block.
pub(super) fn measure(
    ram: &[RamBlock],
    pages_per_gib: u64,
    rng: &mut fastrand::Rng,
    time: Duration,
    cancel: &CancelToken,
) -> Result<Rate, DirtyRateError> {
    let mut reader = Reader {
        content: [0; PAGE_SIZE],
        cancel,
    };
    let first = Instant::now();
    let mut samples = Vec::with_capacity(ram.len());
    for block in ram {
        let hashes = choose(block.pages(), pages_per_gib, rng)
            .map(|page| Ok((page, reader.hash(block, page)?)))
            .collect::<Result<Vec<_>, DirtyRateError>>()?;
        samples.push((block, hashes));
    }
    wait(time.saturating_sub(first.elapsed()), cancel)?;
    // Every page is read as long after its first reading as every other: the order and the speed are the same.
    let elapsed = first.elapsed();
    let mut dirtied = 0.0;
    for (block, hashes) in samples {
        let mut changed = 0;
        for &(page, before) in &hashes {
            changed += usize::from(reader.hash(block, page)? != before);
        }
        dirtied += block.pages() as f64 * changed as f64 / hashes.len().max(1) as f64;
    }
    Ok(Rate {
        pages_per_second: per_second(dirtied, elapsed),
        per_vcpu: None,
    })
}

/// Chooses pages of a block: one at random out of each of so many equal parts. So none is chosen twice, and no part
/// of the block is left out.
fn choose(
    pages: usize,
    pages_per_gib: u64,
    rng: &mut fastrand::Rng,
) -> impl Iterator<Item = PageIndex> {
    let pages = pages as u64;
    let wanted = u128::from(pages) * u128::from(pages_per_gib);
    let parts = wanted
        .div_ceil(u128::from(PAGES_IN_GIB))
        .clamp(u128::from(pages.min(1)), u128::from(pages)) as u64;
    let start = move |part: u64| (u128::from(part) * u128::from(pages) / u128::from(parts)) as u64;
    (0..parts).map(move |part| PageIndex(rng.u64(start(part)..start(part + 1)) as usize))
}

/// Reads pages while the guest may write to them.
struct Reader<'a> {
    content: [u8; PAGE_SIZE],
    cancel: &'a CancelToken,
}

impl Reader<'_> {
    /// A page's hash, as it is at the moment.
    fn hash(&mut self, block: &RamBlock, page: PageIndex) -> Result<u32, DirtyRateError> {
        check(self.cancel)?;
        block.read_page(page, &mut self.content);
        Ok(crc32fast::hash(&self.content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(pages: usize, pages_per_gib: u64) -> Vec<usize> {
        let mut rng = fastrand::Rng::with_seed(7);
        choose(pages, pages_per_gib, &mut rng)
            .map(|page| page.0)
            .collect()
    }

    #[test]
    fn as_many_as_asked_for_all_over_the_block() {
        let gib = PAGES_IN_GIB as usize;
        for (pages, per_gib, expected) in [
            (gib, 512, 512),
            (gib / 4, 512, 128),
            (gib + 1, 512, 513),
            (3, 128, 1),
            (1, 16384, 1),
            (0, 512, 0),
            (10, u64::MAX, 10),
            (10, 0, 1),
        ] {
            let chosen = chosen(pages, per_gib);
            assert_eq!(
                chosen.len(),
                expected,
                "{per_gib} of {pages} pages: {chosen:?}"
            );
            for (part, page) in chosen.iter().enumerate() {
                let bounds = part * pages / expected..(part + 1) * pages / expected;
                assert!(bounds.contains(page), "{page} in {bounds:?}");
            }
        }
    }

    #[test]
    fn not_the_same_pages_every_time() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut once = || choose(1 << 18, 512, &mut rng).collect::<Vec<_>>();
        assert_ne!(once(), once());
    }
}
