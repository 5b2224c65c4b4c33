//! Which page of the working set is next.

use super::params::Pattern;
use super::random::Random;

/// Chooses one page after the other.
pub struct Order {
    pattern: Pattern,
    pages: usize,
    random: Random,
    /// Next page, in the sequential pattern.
    cursor: usize,
}

impl Order {
    /// Chooses among so many pages.
    pub fn new(pattern: Pattern, pages: usize, random: Random) -> Self {
        Self {
            pattern,
            pages,
            random,
            cursor: 0,
        }
    }

    /// The next page. There must be one.
    pub fn next(&mut self) -> usize {
        let pages = self.pages as u64;
        match self.pattern {
            Pattern::Sequential => {
                let index = self.cursor;
                self.cursor = (index + 1) % self.pages;
                index
            }
            Pattern::Random => self.random.below(pages) as usize,
            Pattern::Hot => {
                let limit = if self.random.below(10) == 0 {
                    pages
                } else {
                    pages.div_ceil(10)
                };
                self.random.below(limit) as usize
            }
        }
    }
}
