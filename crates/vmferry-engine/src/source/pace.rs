//! How fast to send: the user's bandwidth limit.

use std::time::{Duration, Instant};

/// The user's bandwidth limit is kept over windows of this length.
const WINDOW: Duration = Duration::from_millis(100);

/// Keeps the stream below `max-bandwidth`.
#[derive(Debug)]
pub(super) struct RateLimiter {
    window_start: Instant,
    /// Bytes sent in this window; what goes beyond the limit is carried into the next.
    sent: u64,
}

/// What the limit allows now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allowance {
    /// So many bytes.
    Bytes(u64),
    /// Nothing for so long.
    Wait(Duration),
}

impl RateLimiter {
    pub(super) fn new(now: Instant) -> Self {
        RateLimiter {
            window_start: now,
            sent: 0,
        }
    }

    /// Takes note of `bytes` that were sent.
    pub(super) fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// What may be sent at `now`, at `limit` bytes a second.
    pub(super) fn allowance(&mut self, now: Instant, limit: Option<u64>) -> Allowance {
        let Some(limit) = limit else {
            self.window_start = now;
            self.sent = 0;
            return Allowance::Bytes(u64::MAX);
        };
        let budget = (limit / 10).max(1);
        let elapsed = now.saturating_duration_since(self.window_start);
        let windows = (elapsed.as_nanos() / WINDOW.as_nanos()) as u64;
        if windows > 0 {
            self.window_start += WINDOW * u32::try_from(windows).unwrap_or(u32::MAX);
            self.sent = self.sent.saturating_sub(budget.saturating_mul(windows));
        }
        match budget.checked_sub(self.sent) {
            None | Some(0) => Allowance::Wait((self.window_start + WINDOW).duration_since(now)),
            Some(left) => Allowance::Bytes(left),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_over_windows_and_overshoot_is_paid_back() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut limiter = RateLimiter::new(start);
        let limit = Some(1_000_000);
        assert_eq!(limiter.allowance(at(0), limit), Allowance::Bytes(100_000));
        limiter.sent(250_000);
        assert_eq!(
            limiter.allowance(at(40), limit),
            Allowance::Wait(Duration::from_millis(60))
        );
        assert!(matches!(
            limiter.allowance(at(150), limit),
            Allowance::Wait(_)
        ));
        assert_eq!(limiter.allowance(at(200), limit), Allowance::Bytes(50_000));
        // A long pause is no credit for a burst.
        assert_eq!(
            limiter.allowance(at(9_950), limit),
            Allowance::Bytes(100_000)
        );
        assert_eq!(
            limiter.allowance(at(9_950), None),
            Allowance::Bytes(u64::MAX)
        );
    }
}
