//! How fast to send, and how fast sending is.

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

/// Measures what the channel takes, from the time that writing to it took.
///
/// The user's bandwidth limit does not show in it: waiting for the next window is not writing. That is
/// right, because the limit does not hold for the switch-over, whose length this is to foretell.
#[derive(Debug, Default)]
pub(super) struct BandwidthMeter {
    bytes: u64,
    busy: Duration,
    /// Of the last measurement that was long enough.
    rate: u64,
}

impl BandwidthMeter {
    /// Writing `bytes` took `busy`.
    pub(super) fn wrote(&mut self, bytes: u64, busy: Duration) {
        /// Short bursts vanish in the socket's buffer and say nothing.
        const ENOUGH: Duration = Duration::from_millis(5);
        self.bytes += bytes;
        self.busy += busy;
        if self.busy >= ENOUGH || self.rate == 0 {
            self.rate = (self.bytes as f64 / self.busy.as_secs_f64().max(1e-6)) as u64;
        }
        // A measurement fades: what was sent a while ago counts less than what is sent now.
        if self.busy >= 20 * ENOUGH {
            self.bytes /= 2;
            self.busy /= 2;
        }
    }

    /// Bytes a second; 0 while nothing was written.
    pub(super) fn rate(&self) -> u64 {
        self.rate
    }

    /// How long `bytes` will take.
    pub(super) fn time_for(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.rate.max(1) as f64)
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

    #[test]
    fn bandwidth_is_bytes_over_time_spent_writing() {
        let mut meter = BandwidthMeter::default();
        for _ in 0..100 {
            meter.wrote(1_000_000, Duration::from_millis(1));
        }
        assert!((900_000_000..1_100_000_000).contains(&meter.rate()));
        assert_eq!(meter.time_for(meter.rate()).as_millis(), 1000);
    }
}
