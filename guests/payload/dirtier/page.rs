//! One self-checking page: 512 words of 64 bits, little-endian.
//!
//! | word   | content                                                     |
//! |--------|-------------------------------------------------------------|
//! | 0      | [`MAGIC`]                                                   |
//! | 1      | page number, counted over the whole guest                   |
//! | 2      | generation: how often the page was written                  |
//! | 3      | the guest's seed                                            |
//! | 4      | checksum of all other words                                 |
//! | 5-7    | zero                                                        |
//! | 8-511  | body, made from seed, page number and generation            |
//!
//! A page is right if its header is the expected one *and* its checksum fits, so damage, another
//! page's content and an old generation are all found, and nothing but 4 KiB is read to find them.
//! Everything works on rows of eight words (one cache line), lane by lane, with additions, shifts and
//! exclusive ors only: that is what SSE2 has for 64-bit lanes.

use core::fmt;

use super::random::mix;

/// Bytes of a page.
pub const BYTES: usize = 4096;
/// `vmferry!` in memory.
const MAGIC: u64 = u64::from_le_bytes(*b"vmferry!");

const LANES: usize = 8;
const ROWS: usize = BYTES / 8 / LANES;

const PAGE: usize = 1;
const GENERATION: usize = 2;
const SEED: usize = 3;
const SUM: usize = 4;

/// What the body of a page looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fill {
    /// Zeroes.
    Zero,
    /// English words: compresses to about a fifth.
    Text,
    /// Does not compress.
    Random,
}

/// The words of [`Fill::Text`], eight bytes each.
const WORDS: [&[u8; 8]; 64] = [
    b"the boat",
    b" crosses",
    b" slowly ",
    b"and the ",
    b"harbour ",
    b"waits.\n ",
    b"A ferry ",
    b"carries ",
    b"people, ",
    b"cattle, ",
    b"letters ",
    b"and salt",
    b" across ",
    b"the wide",
    b" strait ",
    b"between ",
    b"islands.",
    b" No one ",
    b"on board",
    b" counts ",
    b"waves.\n ",
    b"Captain ",
    b"and crew",
    b" watch  ",
    b"the tide",
    b", which ",
    b"turns at",
    b" noon.  ",
    b"Ropes   ",
    b"creak;  ",
    b"engines ",
    b"hum low.",
    b" On deck",
    b" a child",
    b" sleeps ",
    b"beneath ",
    b"a blue  ",
    b"blanket.",
    b"\nBeyond ",
    b"the pier",
    b" lights ",
    b"glow in ",
    b"the fog,",
    b" one by ",
    b"one, and",
    b" gulls  ",
    b"follow. ",
    b"Nothing ",
    b"is lost ",
    b"on the  ",
    b"way, not",
    b" a page ",
    b"nor word",
    b", and at",
    b" last   ",
    b"it lands",
    b" softly.",
    b" Wheels ",
    b"roll off",
    b", doors ",
    b"close.\n\n",
    b"Then it ",
    b"returns ",
    b"empty.  ",
];

/// A page of memory.
#[repr(C, align(4096))]
pub struct Page(pub [[u64; LANES]; ROWS]);

/// What a page shall hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Its number.
    pub page: u64,
    /// How often it was written.
    pub generation: u64,
    /// The guest's seed.
    pub seed: u64,
}

impl Page {
    /// Nothing but zeroes.
    pub const ZERO: Self = Self([[0; LANES]; ROWS]);

    /// Writes every byte of the page.
    pub fn write(&mut self, identity: Identity, fill: Fill) {
        let Identity {
            page,
            generation,
            seed,
        } = identity;
        self.0[0] = [MAGIC, page, generation, seed, 0, 0, 0, 0];
        let body = &mut self.0[1..];
        match fill {
            Fill::Zero => body.fill([0; LANES]),
            Fill::Random => {
                let mut state = lanes(identity);
                for row in body {
                    step(&mut state);
                    *row = state;
                }
            }
            Fill::Text => {
                let mut state = lanes(identity);
                for (index, row) in body.iter_mut().enumerate() {
                    // Eight rows of six bits each come from one step.
                    let shift = index % 8 * 6;
                    if shift == 0 {
                        step(&mut state);
                    }
                    for (word, bits) in row.iter_mut().zip(state) {
                        *word = u64::from_le_bytes(*WORDS[(bits >> shift) as usize % WORDS.len()]);
                    }
                }
            }
        }
        self.0[0][SUM] = self.sum();
    }

    /// Whether the page holds what [`Page::write`] wrote for this identity.
    pub fn is(&self, identity: Identity) -> bool {
        let Identity {
            page,
            generation,
            seed,
        } = identity;
        self.0[0] == [MAGIC, page, generation, seed, self.sum(), 0, 0, 0]
    }

    /// The checksum of all words but the checksum's: in each lane the sum of its words and the sum of
    /// these sums (so that their order counts), then all of that mixed into one word, each number with
    /// another constant (so that lanes cannot change places). Damage goes unseen once in 2^64.
    fn sum(&self) -> u64 {
        let mut plain = self.0[0];
        plain[SUM] = 0;
        let mut ordered = plain;
        for row in &self.0[1..] {
            for lane in 0..LANES {
                plain[lane] = plain[lane].wrapping_add(row[lane]);
                ordered[lane] = ordered[lane].wrapping_add(plain[lane]);
            }
        }
        let mut sum = 0u64;
        for (index, number) in plain.into_iter().chain(ordered).enumerate() {
            let constant = MAGIC.wrapping_mul(2 * index as u64 + 1);
            sum = sum.wrapping_add(mix(number ^ constant));
        }
        sum
    }

    /// Says how the page differs from what it should hold, for a page that failed [`Page::is`].
    pub fn damage(&self, identity: Identity, fill: Fill) -> Damage {
        let mut wanted = Self::ZERO;
        wanted.write(identity, fill);
        let words = self.0.as_flattened().iter().zip(wanted.0.as_flattened());
        let first_bad_byte = words
            .enumerate()
            .find(|(_, (found, wanted))| found != wanted)
            .map(|(index, (found, wanted))| {
                index * 8 + (found ^ wanted).trailing_zeros() as usize / 8
            });
        Damage {
            expected: identity,
            expected_sum: wanted.0[0][SUM],
            page: self.0[0][PAGE],
            generation: self.0[0][GENERATION],
            seed: self.0[0][SEED],
            sum: self.0[0][SUM],
            computed: self.sum(),
            first_bad_byte,
        }
    }
}

/// The generator's start, one word for each lane, never zero.
fn lanes(identity: Identity) -> [u64; LANES] {
    let base = mix(mix(identity.seed) ^ identity.page) ^ identity.generation;
    core::array::from_fn(|lane| mix(base ^ ((lane as u64 + 1) << 56)) | 1)
}

/// Marsaglia's xorshift, in each lane.
fn step(state: &mut [u64; LANES]) {
    for x in state {
        *x ^= *x << 13;
        *x ^= *x >> 7;
        *x ^= *x << 17;
    }
}

/// What is wrong with a page; prints as the second half of a `CORRUPT` line.
#[derive(PartialEq, Eq, Debug)]
pub struct Damage {
    expected: Identity,
    expected_sum: u64,
    page: u64,
    generation: u64,
    seed: u64,
    sum: u64,
    computed: u64,
    /// Offset of the first byte that differs. `None` if by now none does.
    first_bad_byte: Option<usize>,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "expected gen={} sum={:#x} found page={} gen={} sum={:#x} computed={:#x} first_bad_byte=",
            self.expected.generation,
            self.expected_sum,
            self.page,
            self.generation,
            self.sum,
            self.computed
        )?;
        match self.first_bad_byte {
            Some(offset) => write!(f, "{offset}")?,
            None => write!(f, "none")?,
        }
        if self.seed != self.expected.seed {
            write!(f, " found_seed={}", self.seed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Fill; 3] = [Fill::Zero, Fill::Text, Fill::Random];

    fn identity(page: u64, generation: u64) -> Identity {
        Identity {
            page,
            generation,
            seed: 7,
        }
    }

    fn page(page: u64, generation: u64, fill: Fill) -> Box<Page> {
        let mut new = Box::new(Page::ZERO);
        new.write(identity(page, generation), fill);
        new
    }

    #[test]
    fn a_written_page_is_right() {
        for fill in ALL {
            assert!(page(123, 5, fill).is(identity(123, 5)));
            assert_eq!(
                page(123, 5, fill)
                    .damage(identity(123, 5), fill)
                    .first_bad_byte,
                None
            );
        }
    }

    #[test]
    fn any_flipped_bit_is_found() {
        for fill in ALL {
            let mut page = page(123, 5, fill);
            for bit in 0..BYTES * 8 {
                let word = &mut page.0.as_flattened_mut()[bit / 64];
                *word ^= 1 << (bit % 64);
                assert!(!page.is(identity(123, 5)), "bit {bit}, {fill:?}");
                let damage = page.damage(identity(123, 5), fill);
                assert_eq!(damage.first_bad_byte, Some(bit / 8));
                page.0.as_flattened_mut()[bit / 64] ^= 1 << (bit % 64);
            }
            assert!(page.is(identity(123, 5)));
        }
    }

    #[test]
    fn a_stale_page_is_found() {
        for fill in ALL {
            let page = page(123, 4, fill);
            assert!(page.is(identity(123, 4)));
            assert!(!page.is(identity(123, 5)));
            let damage = page.damage(identity(123, 5), fill);
            assert_eq!((damage.generation, damage.first_bad_byte), (4, Some(16)));
            assert_eq!(damage.sum, damage.computed);
            assert!(damage.to_string().starts_with("expected gen=5 sum=0x"));
        }
    }

    #[test]
    fn another_page_another_seed_and_no_page_are_found() {
        for fill in ALL {
            assert!(!page(124, 5, fill).is(identity(123, 5)));
            assert!(!page(123, 5, fill).is(Identity {
                seed: 8,
                ..identity(123, 5)
            }));
            assert!(!Page::ZERO.is(identity(0, 0)));
            assert!(!Page::ZERO.is(identity(123, 5)));
        }
    }

    #[test]
    fn half_old_half_new_is_found() {
        for fill in [Fill::Text, Fill::Random] {
            for rows in 1..ROWS {
                let mut torn = page(123, 5, fill);
                torn.0[rows..].copy_from_slice(&page(123, 4, fill).0[rows..]);
                assert!(!torn.is(identity(123, 5)), "{rows} rows new, {fill:?}");
            }
        }
    }

    #[test]
    fn rows_and_lanes_that_change_places_are_found() {
        for fill in [Fill::Text, Fill::Random] {
            for row in 1..ROWS - 1 {
                let mut swapped = page(123, 5, fill);
                swapped.0.swap(row, row + 1);
                assert!(!swapped.is(identity(123, 5)));
                let mut swapped = page(123, 5, fill);
                swapped.0[row].swap(2, 3);
                let same = swapped.0[row][2] == swapped.0[row][3];
                assert_eq!(swapped.is(identity(123, 5)), same);
            }
        }
    }

    #[test]
    fn bodies_differ_from_generation_to_generation() {
        for fill in [Fill::Text, Fill::Random] {
            let (a, b) = (page(1, 1, fill), page(1, 2, fill));
            let same = a.0[1..]
                .iter()
                .zip(&b.0[1..])
                .filter(|(a, b)| a == b)
                .count();
            assert_eq!(same, 0);
        }
    }
}
