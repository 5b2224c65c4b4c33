//! Waiting for something that another thread or process does.

use std::time::{Duration, Instant};

/// How long anything may take that a test is not about. Generous, because the host may be slow and busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Waits until `look` finds something.
///
/// # Panics
///
/// It finds nothing within [`PATIENCE`]. The message says that `what` did not come.
#[track_caller]
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < end,
            "waited {PATIENCE:?} in vain for {what}"
        );
        std::thread::sleep(POLL);
    }
}

/// Waits until `condition` holds.
///
/// # Panics
///
/// It does not hold within [`PATIENCE`]. The message says that `what` did not come.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    eventually(what, || condition().then_some(()));
}
