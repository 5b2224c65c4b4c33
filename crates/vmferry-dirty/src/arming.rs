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
///
/// # What may run at once
///
/// One thread fetches while others arm and take pages. A page that was fetched must not be read before it has been
/// armed (law 3), and arming must not forget a write that came after the page was read (law 1). Both hold because
///
/// - a fetch marks a chunk as pending *before* it sets the chunk's first bit in the bitmap. Bits are set with Release
///   and taken with Acquire, so whoever takes one sees the chunk as pending, unless it has been armed since;
/// - whoever sees a pending chunk arms it under the lock of `fetched`. A fetch holds that lock until all its bits are in
///   the bitmap, so nobody arms a part of what it has found, and nothing is armed that the bitmap does not know of;
/// - a chunk stays pending until the log says that it is armed. Whoever sees it as no longer pending reads its pages
///   after that.
pub(crate) struct BlockArming {
    block: BlockIndex,
    pages: usize,
    chunk: ArmingChunk,
    /// Fetched and not armed, one bit a page. The lock is held for a whole fetch, and for the arming of a chunk.
    fetched: Mutex<Box<[u64]>>,
    /// For each chunk, whether `fetched` has a bit there. Changed only under the lock of `fetched`.
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

    /// Fetches the log and shows the words to `merge`, which sets their bits in the bitmap with Release. The bits stay
    /// here until they are armed, or go at once if the log needs no arming.
    ///
    /// `merge` is called even if the fetch fails. The log may have reported a part of the pages by then, and a page
    /// that is here must be in the bitmap as well: the next arming of its chunk makes the log forget it.
    pub(crate) fn fetch<T>(
        &self,
        log: &dyn DirtyLog,
        merge: impl FnOnce(&[u64]) -> T,
    ) -> Result<T, LogError> {
        let mut fetched = self.fetched.lock();
        let result = log.fetch(self.block, &mut fetched);
        if log.needs_arming() {
            let chunks = fetched.chunks(self.chunk.pages() / WORD_BITS);
            for (words, pending) in chunks.zip(&self.pending) {
                if words.iter().any(|&w| w != 0) {
                    // Relaxed: `merge` publishes it together with the bits.
                    pending.store(true, Ordering::Relaxed);
                }
            }
        }
        let merged = merge(&fetched);
        if !log.needs_arming() {
            fetched.fill(0);
        }
        result.map(|()| merged)
    }

    /// Whether there is something to arm in the chunks of `range`.
    pub(crate) fn is_pending(&self, range: PageRange) -> bool {
        self.chunk
            .touched_by(range)
            .any(|chunk| self.is_chunk_pending(chunk))
    }

    /// Arms the chunks of `range`, cut to the block, as far as they have not been armed since the last fetch.
    pub(crate) fn arm(&self, log: &dyn DirtyLog, range: PageRange) -> Result<(), LogError> {
        for chunk in self.chunk.touched_by(range.clamp_to(self.pages)) {
            if self.is_chunk_pending(chunk) {
                self.arm_chunk(log, chunk)?;
            }
        }
        Ok(())
    }

    fn is_chunk_pending(&self, chunk: usize) -> bool {
        // Acquire: who sees here that another thread has armed the chunk reads the chunk's pages after that.
        self.pending[chunk].load(Ordering::Acquire)
    }

    fn arm_chunk(&self, log: &dyn DirtyLog, chunk: usize) -> Result<(), LogError> {
        let mut fetched = self.fetched.lock();
        if !self.is_chunk_pending(chunk) {
            return Ok(()); // another thread armed it while we waited
        }
        let start = chunk * self.chunk.pages();
        let range = PageRange::new(start, start + self.chunk.pages()).clamp_to(self.pages);
        let words = &mut fetched[start / WORD_BITS..range.end.0.div_ceil(WORD_BITS)];
        log.arm(self.block, range, words)?;
        words.fill(0);
        // Release, and only now: see `is_chunk_pending`.
        self.pending[chunk].store(false, Ordering::Release);
        Ok(())
    }
}
