//! Tells a network where a guest is now: switches learn it from any frame that comes from the guest's address.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::config::MacAddress;

/// When a guest's interfaces announce themselves. The default is QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// How often: the first time at once.
    pub rounds: u32,
    /// From the first time to the second.
    pub initial: Duration,
    /// By how much each time between two is longer than the one before.
    pub step: Duration,
    /// The longest time between two.
    pub max: Duration,
}

impl Default for Announcement {
    fn default() -> Self {
        Announcement {
            rounds: 5,
            initial: Duration::from_millis(50),
            step: Duration::from_millis(100),
            max: Duration::from_millis(550),
        }
    }
}

impl Announcement {
    /// How long to wait when `done` rounds are over; none, if those were all.
    fn wait(&self, done: u32) -> Option<Duration> {
        let wait = match done {
            0 => Duration::ZERO,
            done => (self.initial + self.step * (done - 1)).min(self.max),
        };
        (done < self.rounds).then_some(wait)
    }
}

/// A timer that a thread can wait for beside other things.
pub(super) struct Timer(OwnedFd);

impl Timer {
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Timer(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Expires once, after `wait`.
    pub fn set(&self, wait: Duration) {
        // A time of zero would stop it.
        let wait = wait.max(Duration::from_nanos(1));
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let once = Itimerspec {
            it_interval: none,
            it_value: Timespec::try_from(wait).expect("no wait is as long as that"),
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)
            .expect("the descriptor is a timer's, and the time is valid");
    }

    /// Whether it has expired since the last call.
    pub fn expired(&self) -> bool {
        let mut count = [0; 8];
        rustix::io::read(&self.0, &mut count).is_ok()
    }

    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What is left of an announcement.
struct Plan {
    announcement: Announcement,
    done: u32,
}

/// Says when an interface should announce itself. The machine starts it, the device's thread does it.
#[derive(Clone)]
pub(crate) struct Announcer {
    timer: Arc<Timer>,
    plan: Arc<Mutex<Option<Plan>>>,
}

impl Announcer {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Announcer {
            timer: Arc::new(Timer::new()?),
            plan: Arc::new(Mutex::new(None)),
        })
    }

    fn plan(&self) -> MutexGuard<'_, Option<Plan>> {
        self.plan.lock().expect("no holder of the plan panics")
    }

    /// Begins; what is left of the announcement before is forgotten.
    pub fn start(&self, announcement: Announcement) {
        *self.plan() = Some(Plan {
            announcement,
            done: 0,
        });
        self.timer.set(Duration::ZERO);
    }

    pub(super) fn timer(&self) -> &Timer {
        &self.timer
    }

    /// Whether it is time for the next round, which counts as done then.
    pub(super) fn is_due(&self) -> bool {
        if !self.timer.expired() {
            return false;
        }
        let mut plan = self.plan();
        let Some(Plan { announcement, done }) = &mut *plan else {
            return false;
        };
        let due = *done < announcement.rounds;
        *done += 1;
        match announcement.wait(*done) {
            Some(wait) => self.timer.set(wait),
            None => *plan = None,
        }
        due
    }
}

/// A frame that says where `mac` is: a reverse ARP request (RFC 903) to all, by which nobody learns anything else.
pub(super) fn rarp(mac: MacAddress) -> [u8; 60] {
    const BROADCAST: [u8; 6] = [0xff; 6];
    const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
    // Hardware: Ethernet, 6 bytes; protocol: IPv4, 4 bytes; operation: request reverse.
    const REQUEST: [u8; 8] = [0, 1, 0x08, 0, 6, 4, 0, 3];
    const NO_IP: [u8; 4] = [0; 4];
    // The shortest frame that Ethernet has.
    let mut frame = [0; 60];
    let parts: [&[u8]; 8] = [
        &BROADCAST,
        &mac.bytes(),
        &ETHERTYPE_RARP,
        &REQUEST,
        &mac.bytes(),
        &NO_IP,
        &mac.bytes(),
        &NO_IP,
    ];
    let mut at = 0;
    for part in parts {
        frame[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest() {
        let announcement = Announcement {
            rounds: 4,
            initial: Duration::from_millis(50),
            step: Duration::from_millis(100),
            max: Duration::from_millis(200),
        };
        let waits: Vec<_> = (0..6).map(|done| announcement.wait(done)).collect();
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(waits, [ms(0), ms(50), ms(150), ms(200), None, None]);
    }

    #[test]
    fn an_announcement_has_its_rounds_and_ends() {
        let announcer = Announcer::new().unwrap();
        assert!(!announcer.is_due());
        let soon = Duration::from_millis(1);
        announcer.start(Announcement {
            rounds: 3,
            initial: soon,
            step: soon,
            max: soon,
        });
        let mut rounds = 0;
        for _ in 0..100 {
            rounds += u32::from(announcer.is_due());
            std::thread::sleep(soon);
        }
        assert_eq!(rounds, 3);
        let none = Announcement {
            rounds: 0,
            ..Announcement::default()
        };
        announcer.start(none);
        std::thread::sleep(soon);
        assert!(!announcer.is_due());
    }

    #[test]
    fn the_frame_comes_from_the_guest() {
        let mac = "52:54:00:12:34:56".parse().unwrap();
        let frame = rarp(mac);
        assert_eq!(frame[6..12], mac.bytes(), "its source");
        assert_eq!(frame[12..14], [0x80, 0x35], "its type");
        assert_eq!(frame[22..28], mac.bytes(), "the sender");
        assert_eq!(frame[32..38], mac.bytes(), "who is asked about");
        assert_eq!(frame[42..], [0; 18], "padding");
    }
}
