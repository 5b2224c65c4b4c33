//! Guest memory as it fills, and what of it turns out not to be needed.
//!
//! Pages that the source's guest does not use do not arrive, or arrive as zeros. A region in which no page holds data is
//! given back to the kernel, if it was populated: when the stream has left it behind, when the source says that a pass is
//! over, and at the latest before the guest runs. Only the receiving thread writes guest memory and gives it back, and it
//! knows what it has written, so that no page with data is ever given back (law 1).

use vmferry_dirty::{PAGE_SIZE, PageIndex, PageRange};

use super::populate::{Populator, REGION_PAGES, Region};
use crate::ram::RamBlock;

/// Guest memory while a stream arrives.
pub(super) struct Memory<'a> {
    ram: &'a [RamBlock],
    populator: Populator<'a>,
    /// One bit for each page that holds data. The others are zero, as the seam promises, and a page of zeros need not be
    /// written there: memory that the guest never used stays free.
    holds_data: Vec<Vec<u64>>,
    /// Where the last page has arrived.
    here: Region,
    /// Regions before this one lie behind the stream, in its first pass.
    front: Region,
    normal: u64,
    zero: u64,
}

impl<'a> Memory<'a> {
    pub(super) fn new(ram: &'a [RamBlock], populator: Populator<'a>) -> Self {
        let words = |block: &RamBlock| vec![0; block.pages().div_ceil(64)];
        Memory {
            ram,
            populator,
            holds_data: ram.iter().map(words).collect(),
            here: Region::default(),
            front: Region::default(),
            normal: 0,
            zero: 0,
        }
    }

    /// Pages that have arrived with data.
    pub(super) fn normal(&self) -> u64 {
        self.normal
    }

    /// Pages that have arrived as zeros.
    pub(super) fn zero(&self) -> u64 {
        self.zero
    }

    /// A page arrives with data.
    #[inline]
    pub(super) fn page(&mut self, block: usize, page: PageIndex, data: &[u8; PAGE_SIZE]) {
        let region = self.arrive(block, page);
        if region == self.front {
            // Asked for once: the regions of later passes were populated in the first one.
            self.front.number += 1;
            self.populator.data_arrives(region);
        }
        self.holds_data[block][page.0 / 64] |= 1 << (page.0 % 64);
        self.ram[block].write_page(page, data);
        self.normal += 1;
    }

    /// A page arrives as zeros.
    #[inline]
    pub(super) fn zero_page(&mut self, block: usize, page: PageIndex) {
        self.arrive(block, page);
        let word = &mut self.holds_data[block][page.0 / 64];
        let bit = 1 << (page.0 % 64);
        if *word & bit != 0 {
            *word &= !bit;
            self.ram[block].write_zeros(page);
        }
        self.zero += 1;
    }

    /// The source has sent what was dirty when it began the pass. What has not come by now is not needed.
    pub(super) fn pass_ends(&mut self) {
        let end = Region {
            block: self.ram.len(),
            number: 0,
        };
        self.leave_behind(end);
    }

    /// Nothing is populated any more.
    pub(super) fn switch_over(&self) {
        self.populator.stop();
    }

    /// All pages have arrived: gives back what is populated and was not needed.
    pub(super) fn complete(&mut self) {
        self.populator.stop();
        self.populator.finish();
        self.give_back(self.populator.regions_from(Region::default()));
    }

    /// Gives back all memory of a guest that has not arrived and will not run here.
    pub(super) fn forget(&mut self) {
        self.populator.stop();
        self.populator.finish();
        for block in self.ram {
            block.release(PageRange::new(0, block.pages()));
        }
    }

    #[inline]
    fn arrive(&mut self, block: usize, page: PageIndex) -> Region {
        let region = Region {
            block,
            number: page.0 / REGION_PAGES,
        };
        if region != self.here {
            let left = std::mem::replace(&mut self.here, region);
            self.give_back(std::iter::once(left));
            self.leave_behind(region);
        }
        region
    }

    /// The stream has come to a region: gives back what it has passed over for the first time.
    fn leave_behind(&mut self, region: Region) {
        if region > self.front {
            let front = std::mem::replace(&mut self.front, region);
            let passed = self.populator.regions_from(front);
            self.give_back(passed.take_while(|&passed| passed < region));
        }
    }

    /// Gives back those regions that are populated and hold no data, adjacent ones together.
    fn give_back(&self, regions: impl Iterator<Item = Region>) {
        let mut run: Option<(usize, PageRange)> = None;
        for region in regions {
            let range = region.range(self.ram);
            if self.has_data(region.block, range) || !self.populator.take_back(region) {
                continue;
            }
            run = match run {
                Some((block, run)) if (block, run.end) == (region.block, range.start) => {
                    Some((block, PageRange::new(run.start.0, range.end.0)))
                }
                before => {
                    self.release(before);
                    Some((region.block, range))
                }
            };
        }
        self.release(run);
    }

    fn release(&self, run: Option<(usize, PageRange)>) {
        if let Some((block, range)) = run {
            self.ram[block].release(range);
        }
    }

    /// Returns whether a page of `range` holds data. The range begins and ends with a word of the bitmap.
    fn has_data(&self, block: usize, range: PageRange) -> bool {
        let words = range.start.0 / 64..range.end.0.div_ceil(64);
        self.holds_data[block][words].iter().any(|&word| word != 0)
    }
}
