//! Random choices that can be repeated: a test prints its seed, and `VMFERRY_SEED` sets it.

use std::time::{Duration, UNIX_EPOCH};

use crate::host::say;

/// Random choices that follow from a seed.
#[derive(Debug)]
pub struct Random(fastrand::Rng);

impl Random {
    /// Begins with the seed in `VMFERRY_SEED`, or else with one from the clock. Prints the seed with the name of the test.
    ///
    /// # Panics
    ///
    /// `VMFERRY_SEED` is not a number.
    pub fn new(test: &str) -> Self {
        let seed = match std::env::var("VMFERRY_SEED") {
            Ok(seed) => seed.parse().expect("VMFERRY_SEED is a number"),
            Err(_) => UNIX_EPOCH
                .elapsed()
                .unwrap_or_default()
                .subsec_nanos()
                .into(),
        };
        say(&format!("{test}: VMFERRY_SEED={seed}"));
        Random::with_seed(seed)
    }

    /// Begins with a seed of the caller's.
    pub fn with_seed(seed: u64) -> Self {
        Random(fastrand::Rng::with_seed(seed))
    }

    /// Makes another one, whose choices follow from this one's.
    pub fn split(&mut self) -> Self {
        Random(self.0.fork())
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0.u64(..end)
    }

    /// One of `choices`, of which there is one at least.
    pub fn one_of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.0.usize(..choices.len())]
    }

    /// A time that is shorter than `limit`.
    pub fn up_to(&mut self, limit: Duration) -> Duration {
        limit.mul_f64(self.0.f64())
    }
}
