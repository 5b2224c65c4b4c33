//! How long the guest may stand still before it is the destination's.

use std::time::{Duration, Instant};

use crate::error::MigrationError;
use crate::params::Parameters;

/// The bound of one pause. At its end the source takes its guest back, unless it has given it away.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standstill {
    since: Instant,
    /// The part of the time since then that does not count.
    pardoned: Duration,
    bound: Duration,
    limit: Duration,
}

impl Standstill {
    /// The guest stands still since `since`.
    pub(super) fn begin(since: Instant, parameters: &Parameters) -> Self {
        Standstill {
            since,
            pardoned: Duration::ZERO,
            bound: parameters.pause_bound(),
            limit: parameters.downtime_limit,
        }
    }

    /// It may stand still for so much longer.
    pub(super) fn extend(&mut self, time: Duration) {
        self.pardoned += time;
    }

    /// How long it has stood still, as far as that counts.
    fn time(&self) -> Duration {
        self.since.elapsed().saturating_sub(self.pardoned)
    }

    /// How long it may still do so.
    pub(super) fn left(&self) -> Duration {
        self.bound.saturating_sub(self.time())
    }

    /// Fails when the time is over. `what` completes "the destination has ...".
    pub(super) fn check(&self, what: &'static str) -> Result<(), MigrationError> {
        let time = self.time();
        if time < self.bound {
            return Ok(());
        }
        Err(MigrationError::PauseTooLong {
            time,
            what,
            limit: self.limit,
        })
    }
}
