//! Spreads events evenly over time.

/// Hands out events at a fixed rate, by the ticks of a clock. It falls behind by a tenth of a second at
/// most: what a longer pause would have brought is dropped, not made up for in a burst.
pub struct Pacer {
    pace: Pace,
    /// When the next event is due.
    next: u64,
    most_behind: u64,
}

enum Pace {
    Never,
    Always,
    Every {
        /// Ticks between two events, rounded down, ...
        ticks: u64,
        /// ... and what that leaves, in parts of a tick: this many `per_second`ths each.
        rest: u64,
        /// Parts not yet counted.
        carry: u64,
        per_second: u64,
    },
}

/// How many events a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rate {
    /// As many as there is time for.
    Unlimited,
    /// So many.
    PerSecond(u64),
}

impl Pacer {
    /// The first event is due at `now`; the clock has `hz` ticks a second.
    pub fn new(rate: Rate, hz: u64, now: u64) -> Self {
        let pace = match rate {
            Rate::Unlimited => Pace::Always,
            Rate::PerSecond(0) => Pace::Never,
            Rate::PerSecond(per_second) => Pace::Every {
                ticks: hz / per_second,
                rest: hz % per_second,
                carry: 0,
                per_second,
            },
        };
        Self {
            pace,
            next: now,
            most_behind: hz / 10,
        }
    }

    /// Whether an event is due at `now`; if so, it counts as handed out.
    pub fn take(&mut self, now: u64) -> bool {
        let (ticks, rest, carry, per_second) = match &mut self.pace {
            Pace::Never => return false,
            Pace::Always => return true,
            Pace::Every {
                ticks,
                rest,
                carry,
                per_second,
            } => (*ticks, *rest, carry, *per_second),
        };
        if now < self.next {
            return false;
        }
        self.next = self.next.max(now.saturating_sub(self.most_behind)) + ticks;
        *carry += rest;
        if *carry >= per_second {
            *carry -= per_second;
            self.next += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pacer: &mut Pacer, from: u64, to: u64) -> u64 {
        (from..to).filter(|&now| pacer.take(now)).count() as u64
    }

    #[test]
    fn keeps_its_rate() {
        for rate in [1, 3, 7, 999, 1000] {
            let mut pacer = Pacer::new(Rate::PerSecond(rate), 1000, 500);
            assert_eq!(events(&mut pacer, 500, 10_500), rate * 10, "{rate}");
        }
    }

    #[test]
    fn never_and_always() {
        let mut never = Pacer::new(Rate::PerSecond(0), 1000, 0);
        assert_eq!(events(&mut never, 0, 5000), 0);
        let mut always = Pacer::new(Rate::Unlimited, 1000, 0);
        assert_eq!(events(&mut always, 0, 5000), 5000);
    }

    #[test]
    fn forgets_a_long_pause() {
        let mut pacer = Pacer::new(Rate::PerSecond(100), 1000, 0);
        assert!(pacer.take(0));
        let mut burst = 0;
        while pacer.take(1_000_000) {
            burst += 1;
        }
        assert!((10..=12).contains(&burst), "{burst}");
    }
}
