//! The downtime as the guest felt it.
//!
//! `dirtier` notes the longest time between two turns of its main loop in each second, by its own clock.
//! The second in which it moved has the downtime in it: not only the time for which its vCPU was
//! stopped, but also what came before the stop and after the start and kept it from running.
//!
//! The guest's clock may stand still while it moves: where the time-stamp counter can be offset, a
//! destination may let it go on from where it was. That time is lost for the guest's own account, so
//! it is measured from outside, by when the heartbeats arrive: each is due at a whole second of the
//! guest's clock. The sum of the two is the downtime whatever the clock does, and so the same
//! measure for every VMM.

use std::time::{Duration, Instant};

use crate::serial::Beat;

/// Heartbeats on the source before a move, so that the host and the guest agree on a second.
pub const BEATS_BEFORE: usize = 2;

/// Heartbeats on the destination that are waited for. The first, with the gap, may itself come late.
pub const BEATS_AFTER: usize = 4;

/// How exactly the arrival of heartbeats tells the guest's time: it looks at its clock once a
/// millisecond at least, and a line takes a moment to be printed. Less than this is no lost time.
const CLOCK_NOISE: Duration = Duration::from_millis(3);

/// A move as the guest felt it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Felt {
    /// The longest gap that the guest noticed in the second of the move.
    pub gap: Duration,
    /// How far its clock fell behind the host's.
    pub clock_lost: Duration,
    /// The longest gap of any second before the move.
    pub before: Duration,
}

impl Felt {
    /// Reads it off the heartbeats of the source and of the destination; none if they are too few.
    ///
    /// `stopped` is for how long the vCPU was stopped: the gap cannot be shorter, and that tells the
    /// first heartbeat computed on the destination from one that was computed on the source but could
    /// no longer be printed there.
    pub fn new(source: &[Beat], destination: &[Beat], stopped: Duration) -> Option<Self> {
        if source.len() < BEATS_BEFORE || destination.len() < BEATS_AFTER {
            return None;
        }
        let gap = |beat: &Beat| Duration::from_micros(beat.heartbeat.gap_us);
        let epoch = source[0].at;
        let clock_lost = clock_offset(epoch, destination)? - clock_offset(epoch, source)?;
        let clock_lost = Duration::try_from_secs_f64(clock_lost)
            .ok()
            .filter(|lost| *lost > CLOCK_NOISE)
            .unwrap_or_default();
        let mut moved = gap(&destination[0]);
        if moved + clock_lost + CLOCK_NOISE < stopped {
            moved = moved.max(gap(&destination[1]));
        }
        Some(Felt {
            gap: moved,
            clock_lost,
            before: source.iter().map(gap).max()?,
        })
    }

    /// For how long the guest did not run.
    pub fn downtime(&self) -> Duration {
        self.gap + self.clock_lost
    }
}

/// The host's time less the guest's, in seconds. Heartbeats come late and never early, so the smallest
/// difference is the one to take.
fn clock_offset(epoch: Instant, beats: &[Beat]) -> Option<f64> {
    let offsets = beats.iter().map(|beat| {
        let host = beat.at.saturating_duration_since(epoch).as_secs_f64();
        host - beat.heartbeat.t as f64
    });
    offsets.min_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmferry_guests::Heartbeat;

    /// Heartbeats at `t` and `ms` (after the first one) with their `gap_us`.
    fn beats(epoch: Instant, of: &[(u64, u64, u64)]) -> Vec<Beat> {
        let beat = |&(t, ms, gap_us)| Beat {
            at: epoch + Duration::from_millis(ms),
            heartbeat: Heartbeat {
                t,
                gap_us,
                ..Heartbeat::default()
            },
        };
        of.iter().map(beat).collect()
    }

    const STOPPED: Duration = Duration::from_millis(20);

    fn felt(source: &[(u64, u64, u64)], destination: &[(u64, u64, u64)]) -> Option<Felt> {
        let epoch = Instant::now();
        Felt::new(&beats(epoch, source), &beats(epoch, destination), STOPPED)
    }

    const SOURCE: &[(u64, u64, u64)] = &[(1, 1000, 900), (2, 2000, 90_000), (3, 3001, 800)];

    #[test]
    fn the_gap_of_the_move_counts_and_no_other() {
        let after = [
            (4, 4000, 25_000),
            (5, 5001, 99_000),
            (6, 6000, 9),
            (7, 7000, 9),
        ];
        let felt = felt(SOURCE, &after).unwrap();
        assert_eq!(felt.downtime(), Duration::from_millis(25));
        assert_eq!(felt.clock_lost, Duration::ZERO);
        assert_eq!(felt.before, Duration::from_millis(90));
    }

    #[test]
    fn a_heartbeat_left_over_from_the_source_is_not_the_move() {
        let after = [
            (3, 3001, 800),
            (4, 4000, 25_000),
            (5, 5001, 7),
            (6, 6000, 9),
        ];
        let felt = felt(&SOURCE[..2], &after).unwrap();
        assert_eq!(felt.downtime(), Duration::from_millis(25));
    }

    #[test]
    fn a_clock_that_stood_still_is_made_up_for() {
        let after = [(4, 4019, 3_000), (5, 5020, 700), (6, 6019, 9), (7, 7020, 9)];
        let felt = felt(SOURCE, &after).unwrap();
        assert_eq!(felt.clock_lost.as_millis(), 19);
        assert_eq!(felt.downtime().as_millis(), 22);
    }

    #[test]
    fn too_few_heartbeats_say_nothing() {
        assert_eq!(felt(SOURCE, &[(4, 4000, 25_000)]), None);
    }
}
