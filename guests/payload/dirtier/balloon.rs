//! The balloon: tells the VMM, when it asks, which pages are free (virtio 1.2, section 5.5.6.7).
//!
//! The VMM asks by a number in the device's configuration, which it takes back when it cannot use an answer any more.
//! The answer is this number, then free pages, then STOP. What a free page holds may be lost until it is written to
//! again; that may be at any time, also before the device has looked at the hint.

use core::sync::atomic::{AtomicU64, Ordering};

use super::answer::Answer;
use super::page::BYTES;
use super::rt::clock::Frequency;
use super::rt::try_lock::TryLock;
use super::rt::virtio::queue::{Queue, Rings};
use super::rt::virtio::registers::Device;

/// The balloon's number among the kinds of devices.
const KIND: u32 = 5;
/// With its statistics the hints' queue has the same number under every VMM.
const STATS_VQ: u64 = 1 << 1;
const FREE_PAGE_HINT: u64 = 1 << 3;
const HINTS: u32 = 3;
/// Offset of the VMM's question in the configuration.
const FREE_PAGE_HINT_CMD_ID: usize = 8;

/// How often is looked for a question: it is an exit to the VMM.
const POLL_US: u64 = 1000;
/// The device is notified of so many hints at once, or at the next look for a question. Some of the pages are in use
/// again by then, and some hints come too late to count.
const AT_ONCE: u32 = 16;
/// Kept free in the queue for the end of an answer and the beginning of the next.
const FOR_WORDS: usize = 2;

static RINGS: Rings = Rings::new();

/// See the module's documentation. All vCPUs use it; one that finds it in use does without.
pub struct Balloon {
    driver: TryLock<Driver>,
    /// When the next look at the question is due.
    next_poll: AtomicU64,
    poll_ticks: u64,
    /// Questions answered.
    rounds: AtomicU64,
}

struct Driver {
    device: Device,
    queue: Queue,
    answer: Answer,
    /// Hints that the device has not been notified of.
    unnoticed: u32,
}

impl Balloon {
    /// Begins to drive the device. An error says why it cannot. To be called once.
    pub fn start(tsc: Frequency) -> Result<Self, &'static str> {
        let device = Device::find(KIND).ok_or("there is none")?;
        device.negotiate(STATS_VQ | FREE_PAGE_HINT)?;
        device.set_up_queue(HINTS, &RINGS)?;
        device.begin();
        Ok(Self {
            driver: TryLock::new(Driver {
                device,
                queue: Queue::new(&RINGS),
                answer: Answer::default(),
                unnoticed: 0,
            }),
            next_poll: AtomicU64::new(0),
            poll_ticks: tsc.ticks_us(POLL_US),
            rounds: AtomicU64::new(0),
        })
    }

    /// Looks at times whether there is a question, and begins and ends the answer.
    pub fn listen(&self, now: u64) {
        if now < self.next_poll.load(Ordering::Relaxed) {
            return;
        }
        self.driver.try_with(|driver| {
            self.next_poll.store(now + self.poll_ticks, Ordering::Relaxed);
            if driver.queue.room() < FOR_WORDS {
                return;
            }
            let question = driver.device.config(FREE_PAGE_HINT_CMD_ID);
            let before = driver.answer;
            for word in driver.answer.to(question) {
                driver.queue.tell(word);
            }
            driver.notify();
            if driver.answer != before && driver.answer.is_under_way() {
                self.rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
    }

    /// Tells that a page is free, if that is of use now. Returns whether it did.
    ///
    /// # Safety
    ///
    /// Until it is written to again, nobody minds what the page at `address` holds.
    pub unsafe fn hint(&self, address: u64) -> bool {
        let told = self.driver.try_with(|driver| {
            let told = driver.answer.is_under_way() && driver.queue.room() > FOR_WORDS;
            if told {
                // SAFETY: the caller's promise.
                unsafe { driver.queue.offer(address, BYTES as u32) };
                driver.unnoticed += 1;
                if driver.unnoticed == AT_ONCE {
                    driver.notify();
                }
            }
            told
        });
        told == Some(true)
    }

    /// Questions answered so far.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }
}

impl Driver {
    fn notify(&mut self) {
        self.unnoticed = 0;
        if self.queue.wants_notification() {
            self.device.notify(HINTS);
        }
    }
}
