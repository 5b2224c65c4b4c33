//! Arming chunks: a log is re-armed piece by piece, each just before its first page is read (law 3).
//!
//! Re-arming page by page would cost a system call a page; re-arming everything at the sync would
//! write-protect the guest's whole memory at once, and let each page be written again between its arming and
//! its sending, which makes it dirty once more for nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::log::{DirtyLog, LogError};
use crate::units::{BlockIndex, PAGE_SIZE, PageRange};
use crate::words::WORD_BITS;

/// How much of a block is armed at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmingChunk {
    pages: usize,
}

impl ArmingChunk {
    /// A chunk of `bytes`, rounded up to whole bitmap words (256 KiB).
    pub fn from_bytes(bytes: usize) -> Self {
        ArmingChunk {
            pages: bytes.div_ceil(PAGE_SIZE).max(1).next_multiple_of(WORD_BITS),
        }
    }

    /// The chunk's size in pages, a multiple of 64.
    pub fn pages(self) -> usize {
        self.pages
    }
}

impl Default for ArmingChunk {
    fn default() -> Self {
        ArmingChunk::from_bytes(16 << 20)
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
            pending: (0..pages.div_ceil(chunk.pages))
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
        let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        log.fetch(self.block, &mut fetched)?;
        let merged = merge(&fetched);
        if log.needs_arming() {
            let chunks = fetched.chunks(self.chunk.pages / WORD_BITS);
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

    /// Arms the chunk that `page` is in, if it has not been armed since the last fetch.
    pub(crate) fn arm(&self, log: &dyn DirtyLog, page: usize) -> Result<(), LogError> {
        let chunk = page / self.chunk.pages;
        if !self.pending[chunk].load(Ordering::Acquire) {
            return Ok(());
        }
        let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.pending[chunk].load(Ordering::Relaxed) {
            return Ok(()); // another thread armed it while we waited
        }
        let start = chunk * self.chunk.pages;
        let range = PageRange::new(start, start + self.chunk.pages).clamp_to(self.pages);
        let words = &mut fetched[start / WORD_BITS..range.end.0.div_ceil(WORD_BITS)];
        log.arm(self.block, range, words)?;
        words.fill(0);
        self.pending[chunk].store(false, Ordering::Release);
        Ok(())
    }
}
