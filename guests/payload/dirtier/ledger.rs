//! Which generation each page must have: what makes a lost page detectable.
//!
//! A page that a migration forgot still has a right checksum, of an older generation. So a vCPU keeps
//! the generation of each of its pages elsewhere, in a ledger. The ledger is guest memory too and may
//! be lost as well; for that, the sum of each of its own pages is kept in another place, and the sum of
//! those sums is the number of writes, which is kept in the vCPU's program itself. Being written all the
//! time, these places are unlikely to be lost together.

/// Generations in one page of the ledger.
pub const BLOCK: usize = 512;

/// The generations of the pages of one vCPU, counted from 0.
pub struct Ledger<'a> {
    generations: &'a mut [u64],
    sums: &'a mut [u64],
    writes: u64,
}

/// A sum that does not fit.
#[derive(PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// What it should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
}

impl<'a> Ledger<'a> {
    /// No page has been written yet. There is one sum for each [`BLOCK`] of generations.
    pub fn new(generations: &'a mut [u64], sums: &'a mut [u64]) -> Self {
        assert!(sums.len() == generations.len().div_ceil(BLOCK));
        generations.fill(0);
        sums.fill(0);
        Self {
            generations,
            sums,
            writes: 0,
        }
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.generations.len()
    }

    /// The generation that the page must have.
    pub fn generation(&self, page: usize) -> u64 {
        self.generations[page]
    }

    /// Enters one more write of the page; returns its new generation.
    pub fn advance(&mut self, page: usize) -> u64 {
        self.generations[page] = self.generations[page].wrapping_add(1);
        let sum = &mut self.sums[page / BLOCK];
        *sum = sum.wrapping_add(1);
        self.writes += 1;
        self.generations[page]
    }

    /// Checks one block of generations against its sum. A mismatch is reported once: the sum is made
    /// to fit.
    pub fn check_block(&mut self, block: usize) -> Result<(), Mismatch> {
        let end = self.generations.len().min((block + 1) * BLOCK);
        let found = sum(&self.generations[block * BLOCK..end]);
        settle(&mut self.sums[block], found)
    }

    /// Checks the sums against the number of writes, in the same way.
    pub fn check_sums(&mut self) -> Result<(), Mismatch> {
        let found = sum(self.sums);
        settle(&mut self.writes, found)
    }
}

fn sum(numbers: &[u64]) -> u64 {
    numbers
        .iter()
        .fold(0, |sum, &number| sum.wrapping_add(number))
}

fn settle(expected: &mut u64, found: u64) -> Result<(), Mismatch> {
    let was = core::mem::replace(expected, found);
    if was == found {
        Ok(())
    } else {
        Err(Mismatch {
            expected: was,
            found,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_writes() {
        let (mut generations, mut sums) = ([9; 600], [9; 2]);
        let mut ledger = Ledger::new(&mut generations, &mut sums);
        assert_eq!(ledger.advance(599), 1);
        assert_eq!(ledger.advance(599), 2);
        assert_eq!(ledger.advance(3), 1);
        assert_eq!((ledger.generation(599), ledger.generation(4)), (2, 0));
        assert_eq!(ledger.check_block(0), Ok(()));
        assert_eq!(ledger.check_block(1), Ok(()));
        assert_eq!(ledger.check_sums(), Ok(()));
    }

    #[test]
    fn a_lost_page_of_the_ledger_is_found_once() {
        let (mut generations, mut sums) = ([0; 600], [0; 2]);
        let mut ledger = Ledger::new(&mut generations, &mut sums);
        for page in 0..600 {
            ledger.advance(page);
        }
        let old = ledger.generations[..BLOCK].to_vec();
        ledger.advance(5);
        ledger.generations[..BLOCK].copy_from_slice(&old);
        let lost = Mismatch {
            expected: 513,
            found: 512,
        };
        assert_eq!(ledger.check_block(0), Err(lost));
        assert_eq!(ledger.check_block(0), Ok(()));
    }

    #[test]
    fn lost_sums_are_found() {
        let (mut generations, mut sums) = ([0; 600], [0; 2]);
        let mut ledger = Ledger::new(&mut generations, &mut sums);
        ledger.advance(0);
        ledger.sums.fill(0);
        let lost = Mismatch {
            expected: 1,
            found: 0,
        };
        assert_eq!(ledger.check_sums(), Err(lost));
        assert_eq!(ledger.check_sums(), Ok(()));
    }
}
