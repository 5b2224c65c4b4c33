//! How fast the other side takes the stream.
//!
//! What matters for the pause is how fast the *destination* takes the guest's last pages. How fast our own writes go
//! says little about that: a burst vanishes in the sockets' buffers, and a user's bandwidth limit makes bursts of
//! everything. So the stream carries a PING now and then, which the destination answers when it has taken in all that
//! came before. Between two answers, or between the moment that it was given something to do and an answer, it was
//! busy; what it took in that time is its rate. Time in which it had nothing to do does not count:
//!
//! - everything was answered, and nothing was written since (the user's bandwidth limit did not allow more);
//! - the socket had run empty while the source looked for something to send (memory of zeros).
//!
//! The way of the first bytes to the destination and that of the answer back count: on a long way, a channel with pauses
//! between bursts seems slower than it is, never faster.
//!
//! A one-way channel answers nothing. There a whole pass is one measurement, to the moment that a file is on its disk,
//! with the time in which the user's limit allowed nothing: too low rather than too high.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How many PINGs may be under way. The destination's answers wait in a queue of bounded length.
pub(super) const MOST_PINGS: usize = 4;

/// The rate is the lower one of two averages over such times of work: the first follows a channel that becomes slower,
/// and the second remembers that it was slow a moment ago.
const MEMORIES: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(500)];

/// A PING under way.
#[derive(Clone, Copy, Debug)]
struct Ping {
    number: u32,
    /// Bytes of the stream up to it.
    position: u64,
}

/// Measures what the other side takes.
#[derive(Debug)]
pub(super) struct BandwidthMeter {
    pings: VecDeque<Ping>,
    /// Number and moment of the last PING.
    last_ping: Option<(u32, Instant)>,
    /// Bytes written when the last PING was.
    pinged: u64,
    /// Bytes written.
    written: u64,
    /// Bytes of which we know that the other side has taken them.
    taken: u64,
    /// Since when the other side has had something to do without an interruption, or has answered while it had.
    busy_since: Option<Instant>,
    /// The part of that time in which nothing was there for it to take.
    starved: Duration,
    averages: [Average; 2],
}

impl BandwidthMeter {
    pub(super) fn new() -> Self {
        BandwidthMeter {
            pings: VecDeque::with_capacity(MOST_PINGS),
            last_ping: None,
            pinged: 0,
            written: 0,
            taken: 0,
            busy_since: None,
            starved: Duration::ZERO,
            averages: MEMORIES.map(Average::over),
        }
    }

    /// `bytes` were written, beginning at `start`.
    pub(super) fn wrote(&mut self, bytes: u64, start: Instant) {
        self.written += bytes;
        if bytes > 0 && self.busy_since.is_none() {
            self.busy_since = Some(start);
        }
    }

    /// For `time` nothing was there for the other side to take.
    pub(super) fn starved(&mut self, time: Duration) {
        if self.busy_since.is_some() {
            self.starved += time;
        }
    }

    /// Whether it is time for another PING, because enough was written since the last one.
    pub(super) fn wants_ping(&self, now: Instant) -> bool {
        /// Closer together, they would tell nothing more, and cost the destination time.
        const BYTES: u64 = 1 << 20;
        const TIME: Duration = Duration::from_millis(5);
        let is_late = |(_, last): (u32, Instant)| now.saturating_duration_since(last) >= TIME;
        self.has_room_for_ping()
            && self.written - self.pinged >= BYTES
            && self.last_ping.is_none_or(is_late)
    }

    /// Whether something was written that no PING followed, and another PING is possible.
    pub(super) fn may_ping(&self) -> bool {
        self.has_room_for_ping() && self.written > self.pinged
    }

    /// Whether one more PING may be under way.
    pub(super) fn has_room_for_ping(&self) -> bool {
        self.pings.len() < MOST_PINGS
    }

    /// The number of the next PING.
    pub(super) fn next_ping(&self) -> u32 {
        self.last_ping
            .map_or(0, |(number, _)| number.wrapping_add(1))
    }

    /// PING `number` was written as the last thing so far.
    pub(super) fn pinged(&mut self, number: u32, now: Instant) {
        self.pings.push_back(Ping {
            number,
            position: self.written,
        });
        self.last_ping = Some((number, now));
        self.pinged = self.written;
    }

    /// The answer to PING `number` came at `now`. Returns whether one was expected.
    #[must_use]
    pub(super) fn ponged(&mut self, number: u32, now: Instant) -> bool {
        match self.pings.pop_front() {
            Some(ping) if ping.number == number => {
                self.took(ping.position, now);
                true
            }
            _ => false,
        }
    }

    /// How many PINGs are not answered yet.
    pub(super) fn unanswered(&self) -> usize {
        self.pings.len()
    }

    /// A one-way channel has taken all that was written.
    pub(super) fn took_all(&mut self, now: Instant) {
        self.took(self.written, now);
    }

    /// The other side has taken everything up to `position`.
    fn took(&mut self, position: u64, now: Instant) {
        let Some(since) = self.busy_since else {
            return;
        };
        let elapsed = now.saturating_duration_since(since);
        // What is taken off is an estimate. It never makes a channel more than ten times as fast.
        let busy = elapsed.saturating_sub(self.starved).max(elapsed / 10);
        let bytes = position - std::mem::replace(&mut self.taken, position);
        for average in &mut self.averages {
            average.add(bytes, busy);
        }
        self.starved = Duration::ZERO;
        self.busy_since = (self.written > position).then_some(now);
    }

    /// Bytes a second, at `now`. Before the first measurement is complete, it is what has come of it; `None` before
    /// anything was written.
    pub(super) fn rate(&self, now: Instant) -> Option<u64> {
        let measured = self.averages.iter().filter_map(Average::rate);
        measured
            .reduce(f64::min)
            .or_else(|| {
                let elapsed = now.saturating_duration_since(self.busy_since?);
                let busy = elapsed.saturating_sub(self.starved).max(elapsed / 10);
                Some(self.written as f64 / busy.as_secs_f64().max(1e-6))
            })
            .map(|rate| (rate as u64).max(1))
    }

    /// How long `bytes` will take, as far as is known at `now`.
    pub(super) fn time_for(&self, bytes: u64, now: Instant) -> Option<Duration> {
        let rate = self.rate(now)?;
        Some(Duration::from_secs_f64(bytes as f64 / rate as f64))
    }
}

/// A rate that fades: what was taken a while ago counts less than what is taken now.
#[derive(Clone, Copy, Debug)]
struct Average {
    memory: Duration,
    bytes: f64,
    seconds: f64,
}

impl Average {
    fn over(memory: Duration) -> Self {
        Average {
            memory,
            bytes: 0.0,
            seconds: 0.0,
        }
    }

    fn add(&mut self, bytes: u64, time: Duration) {
        let seconds = time.as_secs_f64();
        let fading = (-seconds / self.memory.as_secs_f64()).exp();
        self.bytes = self.bytes * fading + bytes as f64;
        self.seconds = self.seconds * fading + seconds;
    }

    fn rate(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.bytes / self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Sends `bursts` of `bytes` every 100 ms over a link that takes `rate` bytes a second and 10 ms each way.
    fn bursts(bursts: u64, bytes: u64, rate: u64) -> BandwidthMeter {
        let start = Instant::now();
        let mut meter = BandwidthMeter::new();
        for burst in 0..bursts {
            let now = start + ms(100 * burst);
            // It vanishes in the socket's buffer at once.
            meter.wrote(bytes, now);
            let number = meter.next_ping();
            meter.pinged(number, now);
            let work = Duration::from_secs_f64(bytes as f64 / rate as f64);
            assert!(meter.ponged(number, now + ms(20) + work));
        }
        meter
    }

    #[test]
    fn bursts_below_a_bandwidth_limit_tell_the_rate_of_the_link() {
        for rate in [25 * MB, 100 * MB, 1000 * MB] {
            let measured = bursts(50, 2 * MB, rate).rate(Instant::now()).unwrap();
            assert!(measured <= rate, "{measured} of {rate}");
            let slowest = 2 * MB * 1000 / (21 + 2 * MB * 1000 / rate);
            assert!(measured >= slowest, "{measured} of {rate}");
        }
    }

    #[test]
    fn a_full_pipe_is_measured_between_two_answers() {
        let start = Instant::now();
        let mut meter = BandwidthMeter::new();
        meter.wrote(MB, start);
        meter.pinged(0, start);
        for number in 1..20 {
            meter.wrote(MB, start);
            meter.pinged(number, start);
            // A round trip of 100 ms, and 40 ms for each megabyte.
            let answered = u64::from(number - 1);
            assert!(meter.ponged(number - 1, start + ms(100 + 40 * (answered + 1))));
        }
        let rate = meter.rate(start).unwrap();
        assert!((20 * MB..30 * MB).contains(&rate), "{rate}");
        assert_eq!(
            meter
                .time_for(25 * MB, start)
                .unwrap()
                .as_secs_f64()
                .round(),
            1.0
        );
    }

    #[test]
    fn a_link_that_was_slow_a_moment_ago_is_not_trusted() {
        let start = Instant::now();
        let mut meter = BandwidthMeter::new();
        let mut now = start;
        for (number, work) in [(0, 400), (1, 10), (2, 10), (3, 10)] {
            meter.wrote(MB, now);
            meter.pinged(number, now);
            now += ms(work);
            assert!(meter.ponged(number, now));
        }
        assert!(meter.rate(now).unwrap() < 15 * MB);
    }

    #[test]
    fn time_with_nothing_to_take_does_not_count() {
        let start = Instant::now();
        let mut meter = BandwidthMeter::new();
        meter.wrote(MB, start);
        meter.starved(ms(900));
        meter.took_all(start + ms(1000));
        assert_eq!(meter.rate(start).unwrap(), 10 * MB);
    }

    #[test]
    fn an_answer_to_no_question_is_noticed() {
        let mut meter = BandwidthMeter::new();
        assert!(!meter.ponged(0, Instant::now()));
        meter.wrote(1, Instant::now());
        meter.pinged(0, Instant::now());
        assert!(!meter.ponged(1, Instant::now()));
    }
}
