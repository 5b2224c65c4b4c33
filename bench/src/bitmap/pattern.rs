//! Which pages of a guest are dirty.

use std::fmt;

/// Pages in a cluster: 2 MiB of guest memory.
const CLUSTER: usize = 512;

/// Words of a pattern before it repeats itself: those of 256 GiB.
const PERIOD: usize = 1 << 20;

/// How dirty pages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Each page is dirty or not for itself.
    Scattered,
    /// In runs of 2 MiB.
    Clustered,
}

impl Shape {
    /// Both.
    pub const ALL: [Shape; 2] = [Shape::Scattered, Shape::Clustered];
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Shape::Scattered => "scattered",
            Shape::Clustered => "clustered",
        })
    }
}

/// A share of dirty pages, and how they lie.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// How many of 100 pages are dirty.
    pub percent: f64,
    /// How they lie.
    pub shape: Shape,
}

impl Pattern {
    /// The bitmap's words; the same ones in every run.
    pub fn words(self, words: usize) -> Vec<u64> {
        let share = self.percent / 100.0;
        let mut random = fastrand::Rng::with_seed(0x5eed);
        let period = words.min(PERIOD);
        let mut pattern = vec![0; period];
        match self.shape {
            _ if share >= 1.0 => pattern.fill(u64::MAX),
            Shape::Scattered => {
                for page in 0..period * 64 {
                    if random.f64() < share {
                        pattern[page / 64] |= 1 << (page % 64);
                    }
                }
            }
            Shape::Clustered => {
                let gap = CLUSTER as f64 * (1.0 - share) / share;
                let mut page = 0;
                loop {
                    page += (gap * (0.5 + random.f64())) as usize;
                    for dirty in (page..page + CLUSTER).take_while(|page| page / 64 < period) {
                        pattern[dirty / 64] |= 1 << (dirty % 64);
                    }
                    page += CLUSTER;
                    if page / 64 >= period {
                        break;
                    }
                }
            }
        }
        let mut all = Vec::with_capacity(words);
        while all.len() < words {
            all.extend_from_slice(&pattern[..period.min(words - all.len())]);
        }
        all
    }
}

/// Set bits of all words.
pub fn dirty_pages(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_as_dense_as_they_say() {
        for shape in Shape::ALL {
            for percent in [1.0, 10.0, 50.0, 100.0] {
                let words = Pattern { percent, shape }.words(PERIOD / 8 + 5);
                let share = dirty_pages(&words) as f64 / (words.len() * 64) as f64;
                assert!(
                    (share * 100.0 / percent - 1.0).abs() < 0.1,
                    "{shape} {percent} {share}"
                );
            }
        }
    }
}
