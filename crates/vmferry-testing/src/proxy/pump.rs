//! One direction: takes bytes, keeps them for as long as the link is to take, and passes them on.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};

use super::line::{Flow, Line};
use super::socket::{TICK, wait};
use super::{Link, Rate, Way};
use crate::random::Random;

/// The most that is taken at once.
const CHUNK: usize = 64 << 10;

/// The most that is under way on a link with a delay.
const LONG_LINK: usize = 4 << 20;

/// How far a throttled link may have fallen behind and still catch up.
const CATCH_UP: Duration = Duration::from_millis(50);

/// Passes on what goes this way, until the connection ends.
pub(super) fn pump(line: &Line, way: Way, link: Link) {
    Pump {
        line,
        way,
        link,
        queue: VecDeque::new(),
        queued: 0,
        finder: Finder::default(),
        free_at: Instant::now(),
        ended: false,
        random: Random::with_seed(0),
    }
    .run();
}

struct Pump<'a> {
    line: &'a Line,
    way: Way,
    link: Link,
    /// Bytes under way, and when they are due.
    queue: VecDeque<(Instant, Vec<u8>)>,
    /// The sum of their lengths.
    queued: usize,
    finder: Finder,
    /// When a throttled link has carried what it has been given.
    free_at: Instant,
    /// The sender has closed its end.
    ended: bool,
    random: Random,
}

impl Pump<'_> {
    fn run(mut self) {
        let (from, to) = self.line.ends(self.way);
        while !self.line.is_over() {
            if self.ended && self.queue.is_empty() {
                let _ = shutdown(to, Shutdown::Write);
                return;
            }
            let flow = self.line.flow(self.way);
            let now = Instant::now();
            let due = self.queue.front().map(|(due, _)| *due.max(&self.free_at));
            let is_due = due.is_some_and(|due| due <= now) && flow != Flow::Stalls;
            if is_due && flow == Flow::Vanishes {
                self.pass_on();
                continue;
            }
            let takes = !self.ended && flow != Flow::Stalls && self.queued < self.capacity();
            let mut sockets = Vec::with_capacity(2);
            if takes {
                sockets.push(PollFd::new(from, PollFlags::IN));
            }
            if is_due {
                sockets.push(PollFd::new(to, PollFlags::OUT));
            }
            let time = match due {
                Some(due) if due > now => TICK.min(due - now),
                _ => TICK,
            };
            wait(&mut sockets, time);
            let ready = |index: usize| {
                sockets
                    .get(index)
                    .is_some_and(|socket| !socket.revents().is_empty())
            };
            let (can_take, can_pass) = (takes && ready(0), is_due && ready(usize::from(takes)));
            if can_take {
                self.take();
            }
            if can_pass {
                self.pass_on();
            }
        }
    }

    /// How many bytes may be under way.
    fn capacity(&self) -> usize {
        match self.link {
            Link { delay, .. } if !delay.is_zero() => LONG_LINK,
            Link {
                rate: Some(rate), ..
            } => piece(rate),
            _ => CHUNK,
        }
    }

    fn take(&mut self) {
        let room = (self.capacity() - self.queued).min(CHUNK);
        let mut bytes = vec![0; room];
        match recv(
            self.line.ends(self.way).0,
            &mut bytes[..],
            RecvFlags::DONTWAIT,
        ) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Ok((0, _)) | Err(_) => self.ended = true,
            Ok((len, _)) => {
                bytes.truncate(len);
                self.finder.look(self.line, self.way, &bytes);
                self.queued += len;
                self.queue
                    .push_back((Instant::now() + self.link.delay, bytes));
            }
        }
    }

    fn pass_on(&mut self) {
        let Some((_, bytes)) = self.queue.front_mut() else {
            return;
        };
        let len = match self.link.rate {
            Some(rate) => piece(rate).min(bytes.len()),
            None => bytes.len(),
        };
        let done = self.line.pass(self.way, &bytes[..len]);
        bytes.drain(..done);
        if bytes.is_empty() {
            self.queue.pop_front();
        }
        self.queued -= done;
        if let Some(rate) = self.link.rate {
            let average = done as f64 / rate.bytes_per_second as f64;
            let swing = self.random.up_to(Duration::from_secs(2)).as_secs_f64() - 1.0;
            let time = Duration::from_secs_f64(average * (1.0 + rate.jitter * swing));
            let now = Instant::now();
            self.free_at = self.free_at.max(now.checked_sub(CATCH_UP).unwrap_or(now)) + time;
        }
    }
}

/// What a throttled link carries at once: 5 ms of it.
fn piece(rate: Rate) -> usize {
    (rate.bytes_per_second as usize / 200).clamp(1, CHUNK)
}

/// Finds the texts that faults wait for, also where they come in several pieces.
#[derive(Default)]
struct Finder {
    /// Bytes that were looked at.
    seen: u64,
    /// The last of them, in which a text may have begun.
    tail: Vec<u8>,
}

impl Finder {
    fn look(&mut self, line: &Line, way: Way, new: &[u8]) {
        let first = self.seen - self.tail.len() as u64;
        self.seen += new.len() as u64;
        let texts = line.texts(way);
        let Some(longest) = texts.iter().map(|text| text.len()).max() else {
            self.tail.clear();
            return;
        };
        self.tail.extend_from_slice(new);
        for text in texts {
            let place = self.tail.windows(text.len()).position(|part| part == text);
            if let Some(place) = place {
                line.found(way, text, first + place as u64);
            }
        }
        let keep = self.tail.len().min(longest - 1);
        self.tail.drain(..self.tail.len() - keep);
    }
}
