//! Arming chunks: a log is re-armed piece by piece, each just before its first page is read (law 3).
//!
//! Re-arming page by page would cost a system call a page; re-arming everything at the sync would
//! write-protect the guest's whole memory at once, and let each page be written again between its arming and
//! its sending, which makes it dirty once more for nothing.

use std::ops::Range;

use crate::log::{DirtyLog, LogError};
use crate::sync::{AtomicBool, Mutex, Ordering};
use crate::units::{BlockIndex, PAGE_SIZE, PageRange};
use crate::words::WORD_BITS;

/// How much of a block is armed at a time: a power of two, at least one word of the bitmap (256 KiB).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmingChunk {
    shift: u32,
}

impl ArmingChunk {
    /// A chunk of `bytes`, rounded up to what is possible.
    pub fn from_bytes(bytes: usize) -> Self {
        let pages = bytes.div_ceil(PAGE_SIZE).clamp(WORD_BITS, 1 << 40);
        ArmingChunk {
            shift: pages.next_power_of_two().trailing_zeros(),
        }
    }

    /// The chunk's size in pages.
    pub fn pages(self) -> usize {
        1 << self.shift
    }

    /// The chunk's size in bytes.
    pub fn bytes(self) -> usize {
        self.pages() * PAGE_SIZE
    }

    /// The chunks that `range` touches.
    fn touched_by(self, range: PageRange) -> Range<usize> {
        match range.is_empty() {
            true => 0..0,
            false => range.start.0 >> self.shift..((range.end.0 - 1) >> self.shift) + 1,
        }
    }
}

impl Default for ArmingChunk {
    /// 64 MiB.
    ///
    /// Arming costs a system call a chunk, and flushes the vCPUs' TLBs. On a guest of 4 GiB that rewrote 1 GiB of it
    /// at random (KVM/PVM), arming a pass took 22.8 ms in chunks of 1 MiB, 3.2 ms in chunks of 16 MiB, 1.0 ms in
    /// chunks of 64 MiB and 0.5 ms in chunks of 1 GiB; the guest stood still for up to 15, 3.7, 2.0 and 1.1 ms at a
    /// time. The larger the chunk, the longer its last pages wait between their arming and their sending, and the
    /// more of them are written meanwhile and have to be sent again. 64 MiB are sent in some 50 ms.
    fn default() -> Self {
        ArmingChunk::from_bytes(64 << 20)
    }
}

/// Which pages of a block were fetched as written but not armed since.
pub(crate) struct BlockArming {
    block: BlockIndex,
    pages: usize,
    chunk: ArmingChunk,
    /// Fetched and not armed, one bit a page.
    fetched: Mutex<Box<[u64]>>,
    /// For each chunk, whether `fetched` has a bit there. Cleared with Release after the arming, read with
    /// Acquire before a page is: who sees a chunk armed reads its pages after they were write-protected.
    pending: Box<[AtomicBool]>,
}

impl BlockArming {
    pub(crate) fn new(block: BlockIndex, pages: usize, chunk: ArmingChunk) -> Self {
        BlockArming {
            block,
            pages,
            chunk,
            fetched: Mutex::new(vec![0; pages.div_ceil(WORD_BITS)].into()),
            pending: (0..pages.div_ceil(chunk.pages()))
                .map(|_| AtomicBool::new(false))
                .collect(),
        }
    }

    /// Fetches the log and shows the words to `merge`. Bits stay here until they are armed, or go at once
    /// if the log needs no arming.
    pub(crate) fn fetch<T>(
        &self,
        log: &dyn DirtyLog,
        merge: impl FnOnce(&[u64]) -> T,
    ) -> Result<T, LogError> {
        let mut fetched = self.fetched.lock();
        log.fetch(self.block, &mut fetched)?;
        let merged = merge(&fetched);
        if log.needs_arming() {
            let chunks = fetched.chunks(self.chunk.pages() / WORD_BITS);
            for (words, pending) in chunks.zip(&self.pending) {
                if words.iter().any(|&w| w != 0) {
                    pending.store(true, Ordering::Release);
                }
            }
        } else {
            fetched.fill(0);
        }
        Ok(merged)
    }

    /// Whether there is something to arm in the chunks of `range`.
    pub(crate) fn is_pending(&self, range: PageRange) -> bool {
        self.chunk
            .touched_by(range)
            .any(|chunk| self.pending[chunk].load(Ordering::Acquire))
    }

    /// Arms the chunks of `range`, cut to the block, as far as they have not been armed since the last fetch.
    pub(crate) fn arm(&self, log: &dyn DirtyLog, range: PageRange) -> Result<(), LogError> {
        for chunk in self.chunk.touched_by(range.clamp_to(self.pages)) {
            if self.pending[chunk].load(Ordering::Acquire) {
                self.arm_chunk(log, chunk)?;
            }
        }
        Ok(())
    }

    fn arm_chunk(&self, log: &dyn DirtyLog, chunk: usize) -> Result<(), LogError> {
        let mut fetched = self.fetched.lock();
        if !self.pending[chunk].load(Ordering::Relaxed) {
            return Ok(()); // another thread armed it while we waited
        }
        let start = chunk * self.chunk.pages();
        let range = PageRange::new(start, start + self.chunk.pages()).clamp_to(self.pages);
        let words = &mut fetched[start / WORD_BITS..range.end.0.div_ceil(WORD_BITS)];
        log.arm(self.block, range, words)?;
        words.fill(0);
        self.pending[chunk].store(false, Ordering::Release);
        Ok(())
    }
}
