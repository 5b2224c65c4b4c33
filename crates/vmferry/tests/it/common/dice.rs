//! Random moments that can be repeated: `VMFERRY_SEED=...` with the number that a failed test has shown.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::say;

/// SplitMix64.
pub struct Dice(u64);

impl Dice {
    /// A new seed, or the one asked for; said aloud either way.
    pub fn new(test: &str) -> Self {
        let seed = match std::env::var("VMFERRY_SEED") {
            Ok(seed) => seed.parse().expect("VMFERRY_SEED is a number"),
            Err(_) => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .expect("it is after 1970")
                .subsec_nanos()
                .into(),
        };
        say(&format!("{test}: VMFERRY_SEED={seed}"));
        Dice(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A time below `limit`.
    pub fn below(&mut self, limit: Duration) -> Duration {
        let nanos = u64::try_from(limit.as_nanos()).expect("times of tests are short");
        Duration::from_nanos(self.next() % nanos.max(1))
    }
}
