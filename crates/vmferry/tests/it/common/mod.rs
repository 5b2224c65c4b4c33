//! What all tests share: processes that end with their test, and a guest whose own words are evidence.

pub mod command;
pub mod dice;
pub mod guest;
pub mod lab;
pub mod outcome;
pub mod proxy;
pub mod story;
pub mod vm;

use std::time::{Duration, Instant};

/// How long anything may take that is not about time. Generous: the host may be slow and busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often is looked whether it has happened.
const POLL: Duration = Duration::from_millis(10);

/// Waits until `look` finds something.
///
/// # Panics
///
/// It does not within [`PATIENCE`].
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(POLL);
    }
}

/// Says something that the test harness shows even if the test passes.
pub fn say(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}
