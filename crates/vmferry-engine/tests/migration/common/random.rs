//! Random numbers from a seed that is printed, so that a failure can be repeated.

use std::time::{Duration, SystemTime};

/// Xorshift: plenty for choosing moments.
pub struct Random(u64);

impl Random {
    /// From `VMFERRY_TEST_SEED`, or else from the clock.
    pub fn from_env(test: &str) -> Self {
        let seed = match std::env::var("VMFERRY_TEST_SEED") {
            Ok(seed) => seed.parse().expect("VMFERRY_TEST_SEED is a number"),
            Err(_) => SystemTime::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64,
        };
        println!("{test}: repeat with VMFERRY_TEST_SEED={seed}");
        Random(seed | 1)
    }

    /// Another one, which depends on this one's seed.
    pub fn split(&mut self) -> Self {
        Random(self.below(u64::MAX) | 1)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    pub fn up_to(&mut self, longest: Duration) -> Duration {
        Duration::from_nanos(self.below(longest.as_nanos() as u64))
    }
}
