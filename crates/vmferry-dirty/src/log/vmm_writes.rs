//! The VMM's own writes to guest memory, which no hypervisor log sees.

use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

use super::{DirtyLog, LogError};
use crate::sync::{AtomicU64, Ordering};
use crate::units::{BlockIndex, PAGE_SIZE, PageRange};

/// One bit for every page of a RAM block that the VMM (a device, a kernel loader) has written.
///
/// Needs no arming: [`drain_into`](Self::drain_into) takes the bits, and a write after that sets them again.
#[derive(Debug)]
pub struct VmmWriteLog {
    words: Box<[AtomicU64]>,
    pages: usize,
}

impl VmmWriteLog {
    /// A log for a block of `pages` pages, none of them written.
    pub fn new(pages: usize) -> Self {
        VmmWriteLog {
            words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            pages,
        }
    }

    /// Marks `range` as written; what lies beyond the block's end is ignored. Call it after the bytes are
    /// in place.
    pub fn mark(&self, range: PageRange) {
        let range = range.clamp_to(self.pages);
        crate::words::for_each_mask(range, |word, mask| {
            // Release: whoever takes this bit (Acquire, below) also sees the bytes written before it was
            // set, so a page read after its bit was taken is never older than the bit.
            self.words[word].fetch_or(mask, Ordering::Release);
        });
    }

    /// Moves all bits into `into` (ORed), leaving none here.
    pub fn drain_into(&self, into: &mut [u64]) {
        for (from, to) in self.words.iter().zip(into) {
            // A plain look first: nearly all words are clear, and a swap costs twenty times a load. A bit
            // that this look misses belongs to the next sync.
            if from.load(Ordering::Relaxed) != 0 {
                *to |= from.swap(0, Ordering::Acquire);
            }
        }
    }

    fn is_marked(&self, page: usize) -> bool {
        page < self.pages && self.words[page / 64].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
    }
}

/// The [`VmmWriteLog`] of a block as the `vm_memory` bitmap of one of the block's memory regions: whatever is
/// written through `vm_memory` is then logged.
#[derive(Clone, Debug)]
pub struct VmmWrites {
    log: Arc<VmmWriteLog>,
    first_page: usize,
}

impl VmmWrites {
    /// The bitmap of a region that begins at page `first_page` of the block that `log` belongs to.
    pub fn new(log: Arc<VmmWriteLog>, first_page: usize) -> Self {
        VmmWrites { log, first_page }
    }
}

impl<'a> WithBitmapSlice<'a> for VmmWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for VmmWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len > 0 {
            let first = self.first_page + offset / PAGE_SIZE;
            let last = self.first_page + (offset + len - 1) / PAGE_SIZE;
            self.log.mark(PageRange::new(first, last + 1));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.is_marked(self.first_page + offset / PAGE_SIZE)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

/// A hypervisor's log together with the VMM's own writes, one [`VmmWriteLog`] a block.
pub struct WithVmmWrites<L> {
    hypervisor: L,
    vmm: Vec<Arc<VmmWriteLog>>,
}

impl<L: DirtyLog> WithVmmWrites<L> {
    /// Combines the two. `vmm[i]` belongs to RAM block `i`.
    pub fn new(hypervisor: L, vmm: Vec<Arc<VmmWriteLog>>) -> Self {
        WithVmmWrites { hypervisor, vmm }
    }
}

impl<L: DirtyLog> DirtyLog for WithVmmWrites<L> {
    fn start(&self) -> Result<(), LogError> {
        self.hypervisor.start()
    }

    fn stop(&self) -> Result<(), LogError> {
        self.hypervisor.stop()
    }

    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        self.hypervisor.fetch(block, into)?;
        self.vmm[block.0].drain_into(into);
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        self.hypervisor.needs_arming()
    }

    // A page that only the VMM wrote is armed in the hypervisor's log too. That forgets a guest's write
    // which came after the fetch, and is right: the page is dirty already and read after the arming.
    fn arm(&self, block: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError> {
        self.hypervisor.arm(block, range, pages)
    }

    // The VMM is no vCPU.
    fn written_per_vcpu(&self) -> Option<Vec<u64>> {
        self.hypervisor.written_per_vcpu()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_marks_every_page_it_touches() {
        let log = Arc::new(VmmWriteLog::new(200));
        let region = VmmWrites::new(log.clone(), 100);
        region.mark_dirty(PAGE_SIZE - 1, 2);
        region.mark_dirty(5 * PAGE_SIZE, 0);
        region.slice_at(10 * PAGE_SIZE).mark_dirty(7, PAGE_SIZE);
        assert!(region.dirty_at(0) && region.dirty_at(PAGE_SIZE));
        let mut words = [0; 4];
        log.drain_into(&mut words);
        assert_eq!(words, [0, 0b1100_0000_0011 << 36, 0, 0]);
        words = [0; 4];
        log.drain_into(&mut words);
        assert_eq!(words, [0; 4]);
    }

    #[test]
    fn writes_beyond_the_block_are_ignored() {
        let log = VmmWriteLog::new(70);
        log.mark(PageRange::new(69, 1000));
        let mut words = [0; 2];
        log.drain_into(&mut words);
        assert_eq!(words, [0, 1 << 5]);
    }
}
