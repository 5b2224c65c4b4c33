//! One type per unit, so that a page number is never mistaken for a byte offset.

use std::fmt;
use std::ops::Range;

/// Bytes in a page: the granule of dirty tracking and of the migration stream on x86-64.
pub const PAGE_SIZE: usize = 4096;

/// Number of a page inside one RAM block (not a guest frame number: a block may sit anywhere in the
/// guest's address space, or in two places around a hole).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub usize);

impl PageIndex {
    /// Offset in bytes of the page's first byte from the start of its block.
    pub fn offset(self) -> usize {
        self.0 * PAGE_SIZE
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// Position of a RAM block in the virtual machine's list of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub usize);

/// A half-open range of pages `[start, end)` of one RAM block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// First page of the range.
    pub start: PageIndex,
    /// First page after the range.
    pub end: PageIndex,
}

impl PageRange {
    /// The range `[start, end)`; empty when `end <= start`.
    pub fn new(start: usize, end: usize) -> Self {
        PageRange {
            start: PageIndex(start),
            end: PageIndex(end.max(start)),
        }
    }

    /// Number of pages in the range.
    pub fn len(self) -> usize {
        self.end.0 - self.start.0
    }

    /// Whether the range holds no page.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The part of the range that lies inside a block of `pages` pages.
    pub fn clamp_to(self, pages: usize) -> Self {
        PageRange::new(self.start.0.min(pages), self.end.0.min(pages))
    }

    /// The page numbers, for iteration.
    pub fn indices(self) -> Range<usize> {
        self.start.0..self.end.0
    }
}
