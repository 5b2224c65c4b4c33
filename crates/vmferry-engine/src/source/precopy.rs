//! Pre-copy: passes over the dirty bitmap while the guest runs, in slices of bounded length.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use vmferry_dirty::{Batch, Cursor, DirtyTracker, PAGE_SIZE, PageIndex};
use vmferry_wire::Command;

use super::driver::{CHECK_INTERVAL, Driver, Hold};
use super::pace::Allowance;
use super::writer::Flushed;
use crate::error::MigrationError;
use crate::hints::Questions;
use crate::wait::Wait;

/// Law 5: a slice ends after this time, with or without a lock held.
pub(super) const MAX_WAIT: Duration = Duration::from_millis(50);

/// Pages in one RAM section of the stream, and between two looks at whether the slice is over. A megabyte, so that
/// what the search for zeros has read is still in the processor's cache when the kernel copies it.
const SECTION_PAGES: usize = Batch::MAX_PAGES;

/// Bytes that a page takes in the stream: its record and itself.
const PAGE_ON_WIRE: u64 = PAGE_SIZE as u64 + 8;

/// Below this, a shorter downtime is not worth another pass.
const GOOD_DOWNTIME: Duration = Duration::from_millis(1);

/// Why a slice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SliceEnd {
    /// No dirty page is left ahead of the cursor, and everything taken was written.
    PassDone,
    /// [`MAX_WAIT`] is over.
    TimeIsUp,
    /// The bandwidth limit allows nothing more for so long.
    RateLimit(Duration),
}

/// Whether the user's bandwidth limit holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// While the guest runs.
    Limited,
    /// During the switch-over, when the guest waits.
    Unlimited,
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default)]
struct Pages {
    normal: u64,
    zero: u64,
}

impl Driver<'_> {
    /// Copies RAM until what is left can be sent within the downtime limit. From each sync to the next the guest is
    /// asked for its free pages, if there are `questions`.
    pub(super) fn precopy(
        &mut self,
        tracker: &DirtyTracker,
        questions: Option<Questions<'_>>,
    ) -> Result<(), MigrationError> {
        let mut last_sync = Instant::now();
        /// So often is the pause prepared, however long that takes.
        const PREPARATIONS: u32 = 2;
        let mut prepared = 0;
        loop {
            let before = tracker.set().dirty_pages();
            if let Some(questions) = &questions {
                let start = Instant::now();
                questions.ask(tracker)?;
                self.shared
                    .update(|info| info.tracking.arming += start.elapsed());
            }
            self.pass(tracker, Pace::Limited)?;
            // A part without pages says that the pass is over: the destination gives back what it has prepared in vain
            // while the guest still runs.
            self.writer.put(|e, out| {
                e.ram_part(out);
                e.end_of_ram_records(out);
            });
            self.wait_until_received()?;
            if let Some(questions) = &questions {
                questions.stop();
                self.shared
                    .update(|info| info.ram.hinted = questions.spared());
            }
            self.sync(tracker)?;
            let dirty = tracker.set().dirty_pages();
            let elapsed = std::mem::replace(&mut last_sync, Instant::now()).elapsed();
            let now = Instant::now();
            let expected = self.meter.time_for(dirty * PAGE_ON_WIRE, now);
            let expected = expected.unwrap_or_default();
            self.shared.update(|info| {
                info.ram.dirty_pages_rate = per_second(dirty, elapsed);
                info.ram.pages_per_second = per_second(before, elapsed);
                info.expected_downtime = Some(expected);
            });
            tracing::debug!(
                dirty,
                ?expected,
                bandwidth = self.meter.rate(now),
                "pass done"
            );
            if expected <= self.shared.parameters().downtime_limit {
                // The limit is what the user bears, not what we aim for: go on as long as each pass makes
                // the rest much smaller. That is a handful of passes, each shorter than the one before.
                let shrinking = dirty <= before / 2;
                if expected <= GOOD_DOWNTIME || !shrinking {
                    if prepared == PREPARATIONS || self.prepare_pause()? <= GOOD_DOWNTIME {
                        return Ok(());
                    }
                    prepared += 1;
                }
            }
        }
    }

    /// Has the guest's machine do what shortens the pause. How long that took: the guest has gone on writing meanwhile.
    fn prepare_pause(&mut self) -> Result<Duration, MigrationError> {
        let start = Instant::now();
        let shared = self.shared;
        let _waiting = shared.waits.begin(Wait::PausePreparation);
        let guest = self.guest.clone();
        let (over, result) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("prepare-pause".to_owned())
            .spawn(move || over.send(guest.prepare_pause()))
            .map_err(|source| MigrationError::Resources {
                what: "start a thread that prepares the guest's pause",
                source,
            })?;
        loop {
            match result.recv_timeout(CHECK_INTERVAL) {
                Ok(result) => return Ok(result.map(|()| start.elapsed())?),
                // A user who cancels does not wait for storage that hangs; the thread ends when that comes back.
                Err(RecvTimeoutError::Timeout) => self.check()?,
                Err(RecvTimeoutError::Disconnected) => {
                    let panic = thread.join().expect_err("it has not sent its result");
                    std::panic::resume_unwind(panic);
                }
            }
        }
    }

    /// Waits until the destination has taken in all that was sent. What sits in the sockets' buffers when
    /// the guest is paused would be downtime; and only now is it known how fast the whole way is.
    fn wait_until_received(&mut self) -> Result<(), MigrationError> {
        if self.return_path.is_none() {
            self.meter.took_all(Instant::now());
            return Ok(());
        }
        let shared = self.shared;
        let _waiting = shared.waits.begin(Wait::Receipt);
        if !self.meter.has_room_for_ping() {
            self.wait_for_pongs()?;
        }
        self.put_ping();
        self.flush_all()?;
        self.wait_for_pongs()
    }

    fn wait_for_pongs(&mut self) -> Result<(), MigrationError> {
        let timeout = self.shared.parameters().peer_timeout;
        match &self.return_path {
            Some(return_path) => return_path.wait_for_pongs(&mut self.meter, timeout),
            None => Ok(()),
        }
    }

    /// Asks the destination to answer when it has taken in all that was put before.
    fn put_ping(&mut self) {
        let number = self.meter.next_ping();
        self.writer.command(Command::Ping(number));
        self.pinging = Some(number);
    }

    /// Fetches the dirty log into the bitmap.
    pub(super) fn sync(&mut self, tracker: &DirtyTracker) -> Result<(), MigrationError> {
        let start = Instant::now();
        tracker.sync()?;
        let mut number = 0;
        self.shared.update(|info| {
            info.tracking.sync += start.elapsed();
            info.ram.dirty_sync_count += 1;
            number = info.ram.dirty_sync_count;
        });
        self.shared.pass(number);
        Ok(())
    }

    /// Sends every page that is dirty in the bitmap, from its first block to its last.
    pub(super) fn pass(
        &mut self,
        tracker: &DirtyTracker,
        pace: Pace,
    ) -> Result<(), MigrationError> {
        let mut cursor = Cursor::default();
        loop {
            let end = self.slice(tracker, &mut cursor, pace)?;
            self.publish(tracker);
            self.check()?;
            if let (Some(bound), true) = (self.bound(), end != SliceEnd::PassDone) {
                bound.check("not taken all of its memory")?;
            }
            match end {
                SliceEnd::PassDone => return Ok(()),
                SliceEnd::TimeIsUp => {}
                SliceEnd::RateLimit(wait) => {
                    self.idle(Wait::BandwidthLimit, self.writer.last_progress(), wait)?;
                }
            }
        }
    }

    /// A slice of work: sends dirty pages from the cursor on, until one of the reasons of [`SliceEnd`].
    pub(super) fn slice(
        &mut self,
        tracker: &DirtyTracker,
        cursor: &mut Cursor,
        pace: Pace,
    ) -> Result<SliceEnd, MigrationError> {
        let deadline = Instant::now() + MAX_WAIT;
        // What the slice before could not write must go first, and needs no lock.
        if self.flush(Some(deadline))? == Flushed::Partly {
            return Ok(SliceEnd::TimeIsUp);
        }
        let mut slice = tracker.slice(cursor);
        let mut batch = Batch::new();
        loop {
            let allowed = match self.allowance(pace) {
                Allowance::Wait(wait) => {
                    if self.return_path.is_some() && self.meter.may_ping() {
                        self.put_ping();
                        if self.flush(Some(deadline))? == Flushed::Partly {
                            return Ok(SliceEnd::TimeIsUp);
                        }
                    }
                    return Ok(SliceEnd::RateLimit(wait));
                }
                Allowance::Bytes(bytes) => bytes / PAGE_ON_WIRE,
            };
            let allowed = usize::try_from(allowed).unwrap_or(SECTION_PAGES);
            let mut room = SECTION_PAGES.min(allowed.max(1));
            let mut sent = Pages::default();
            let mut taking = Duration::ZERO;
            let (mut more, arming_before) = (true, slice.arming_time());
            let working = Instant::now();
            self.writer.put(|e, out| e.ram_part(out));
            while more && room > 0 {
                let start = Instant::now();
                more = slice.next_batch(&mut batch, room)?;
                taking += start.elapsed();
                room -= batch.pages();
                self.put_batch(&batch, &mut sent);
            }
            self.writer.put(|e, out| e.end_of_ram_records(out));
            if self.return_path.is_some() && self.meter.wants_ping(Instant::now()) {
                self.put_ping();
            }
            if self.channel.unsent() == 0 {
                self.meter.starved(working.elapsed());
            }
            self.shared.update(|info| {
                let arming = slice.arming_time() - arming_before;
                info.tracking.arming += arming;
                info.tracking.bitmap += taking.saturating_sub(arming);
                info.ram.normal += sent.normal;
                info.ram.duplicate += sent.zero;
            });
            let flushed = self.flush(Some(deadline))?;
            if flushed == Flushed::Partly || Instant::now() >= deadline {
                return Ok(SliceEnd::TimeIsUp);
            }
            if !more {
                return Ok(SliceEnd::PassDone);
            }
            if self.shared.cancel.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
        }
    }

    fn allowance(&mut self, pace: Pace) -> Allowance {
        match pace {
            Pace::Limited => {
                let limit = self.shared.parameters().max_bandwidth;
                self.limiter.allowance(Instant::now(), limit)
            }
            Pace::Unlimited => Allowance::Bytes(u64::MAX),
        }
    }

    fn put_batch(&mut self, batch: &Batch, sent: &mut Pages) {
        let guest = self.guest;
        let index = batch.block().0;
        for page in batch.runs().iter().flat_map(|run| run.indices()) {
            let block = &guest.ram()[index];
            if block.is_zero(PageIndex(page)) {
                self.writer.zero_page(index, page);
                sent.zero += 1;
            } else {
                self.writer.page(index, block, page);
                sent.normal += 1;
            }
        }
    }

    /// Does nothing for `time`, unless something happens. That is part of a `wait` since `since`.
    pub(super) fn idle(
        &mut self,
        wait: Wait,
        since: Instant,
        time: Duration,
    ) -> Result<(), MigrationError> {
        let _waiting = self.shared.waits.go_on(wait, since);
        let end = Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            // Short steps, because the destination's words are heard by another thread.
            std::thread::sleep(left.min(Duration::from_millis(10)));
        }
    }

    /// Makes the figures current.
    pub(super) fn publish(&mut self, tracker: &DirtyTracker) {
        let written = self.writer.written();
        let remaining = tracker.set().dirty_pages() * PAGE_SIZE as u64;
        let paused = matches!(self.hold, Hold::Paused { .. });
        let now = Instant::now();
        let bandwidth = self.meter.rate(now);
        let rest = tracker.set().dirty_pages() * PAGE_ON_WIRE;
        let rest = self.meter.time_for(rest, now);
        self.shared.update(|info| {
            let new = written - info.ram.transferred;
            info.ram.transferred = written;
            match paused {
                true => info.ram.downtime_bytes += new,
                false => info.ram.precopy_bytes += new,
            }
            info.ram.remaining = remaining;
            info.bandwidth = bandwidth.unwrap_or(0);
            // From the first sync on, the last one tells more.
            if info.ram.dirty_sync_count == 1 {
                info.expected_downtime = rest;
            }
        });
    }
}

fn per_second(count: u64, time: Duration) -> u64 {
    (count as f64 / time.as_secs_f64().max(1e-6)) as u64
}
