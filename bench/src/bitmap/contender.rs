//! Those who drain a bitmap: take every dirty page out of it, as runs.

use std::fmt;
use std::hint::black_box;
use std::num::NonZeroUsize;

use vm_memory::bitmap::AtomicBitmap;
use vmferry_dirty::{Batch, BlockIndex, Cursor, DirtySet, Discipline, PAGE_SIZE, PageRange};

/// The block that is drained; there is but one.
const BLOCK: BlockIndex = BlockIndex(0);

/// Something that can be filled with dirty pages and drained.
pub trait Drain {
    /// Marks the pages of `words` as dirty.
    fn fill(&mut self, words: &[u64]);
    /// Takes all dirty pages, from the first to the last, and shows their runs to somebody that the compiler
    /// knows nothing of. Returns how many pages there were.
    fn drain(&mut self) -> u64;
}

/// Whose bitmap it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// vmferry's.
    Vmferry(Discipline),
    /// `vm_memory`'s `AtomicBitmap`, used as Cloud Hypervisor does: a copy is taken word by word, and its bits are
    /// walked.
    AtomicBitmap,
    /// Plain words that nobody else may touch, without atomics, lock or count: what draining costs at least.
    PlainWords,
}

impl Contender {
    /// All, the one that the others are compared with first.
    pub const ALL: [Contender; 5] = [
        Contender::Vmferry(Discipline::LockFree),
        Contender::Vmferry(Discipline::SliceLock),
        Contender::Vmferry(Discipline::PerBitLock),
        Contender::AtomicBitmap,
        Contender::PlainWords,
    ];

    /// A clean bitmap of so many words.
    pub fn bitmap(self, words: usize) -> Box<dyn Drain> {
        match self {
            Contender::Vmferry(discipline) => {
                Box::new(DirtySet::new(&[words * u64::BITS as usize], discipline))
            }
            Contender::AtomicBitmap => {
                let page = NonZeroUsize::new(PAGE_SIZE).expect("a page has bytes");
                Box::new(AtomicBitmap::new(words * 64 * PAGE_SIZE, page))
            }
            Contender::PlainWords => Box::new(vec![0u64; words]),
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Contender::Vmferry(discipline) => discipline.as_str(),
            Contender::AtomicBitmap => "AtomicBitmap",
            Contender::PlainWords => "plain words",
        })
    }
}

impl Drain for DirtySet {
    fn fill(&mut self, words: &[u64]) {
        self.merge(BLOCK, words);
    }

    fn drain(&mut self) -> u64 {
        let (mut cursor, mut batch) = (Cursor::default(), Batch::new());
        let mut slice = self.slice(&mut cursor);
        let mut pages = 0;
        while slice.next_batch(&mut batch, Batch::MAX_PAGES) {
            black_box(batch.runs());
            pages += batch.pages() as u64;
        }
        pages
    }
}

impl Drain for AtomicBitmap {
    fn fill(&mut self, words: &[u64]) {
        for (word, &bits) in words.iter().enumerate() {
            for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                self.set_bit(word * 64 + bit);
            }
        }
    }

    fn drain(&mut self) -> u64 {
        let mut runs = Runs::default();
        for (word, bits) in self.get_and_reset().into_iter().enumerate() {
            for bit in 0..64 {
                if bits >> bit & 1 == 1 {
                    runs.add(word * 64 + bit, 1);
                }
            }
        }
        runs.end()
    }
}

impl Drain for Vec<u64> {
    fn fill(&mut self, words: &[u64]) {
        self.copy_from_slice(words);
    }

    fn drain(&mut self) -> u64 {
        let mut runs = Runs::default();
        for (word, all) in self.iter_mut().enumerate() {
            let mut bits = std::mem::take(all);
            while bits != 0 {
                let start = bits.trailing_zeros();
                let ones = (bits >> start).trailing_ones();
                runs.add(word * 64 + start as usize, ones as usize);
                bits &= bits.wrapping_add(1 << start);
            }
        }
        runs.end()
    }
}

/// Puts pages together into runs.
#[derive(Default)]
struct Runs {
    start: usize,
    end: usize,
    pages: u64,
}

impl Runs {
    fn add(&mut self, start: usize, pages: usize) {
        if start != self.end {
            self.hand_out();
            self.start = start;
        }
        self.end = start + pages;
    }

    fn hand_out(&mut self) {
        if self.start != self.end {
            self.pages += (self.end - self.start) as u64;
            black_box(PageRange::new(self.start, self.end));
        }
    }

    fn end(mut self) -> u64 {
        self.hand_out();
        self.pages
    }
}

/// Reads all words and does nothing else: no drain can be faster.
pub fn scan(words: &[u64]) -> u64 {
    // In pieces that keep several vector registers busy, and need no more than there are.
    let (pieces, rest) = black_box(words).as_chunks::<16>();
    let mut all = [0; 16];
    for piece in pieces {
        for (all, word) in all.iter_mut().zip(piece) {
            *all |= word;
        }
    }
    all.iter().chain(rest).fold(0, |all, word| all | word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::pattern::{Pattern, Shape, dirty_pages};

    #[test]
    fn all_contenders_find_all_pages() {
        for shape in Shape::ALL {
            let percent = 10.0;
            let words = Pattern { percent, shape }.words(1000);
            for contender in Contender::ALL {
                let mut bitmap = contender.bitmap(words.len());
                for _ in 0..2 {
                    bitmap.fill(&words);
                    assert_eq!(bitmap.drain(), dirty_pages(&words), "{contender}");
                    assert_eq!(bitmap.drain(), 0);
                }
            }
        }
    }
}
