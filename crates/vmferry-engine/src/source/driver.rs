//! The phases of an outgoing migration, in order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_dirty::DirtyTracker;
use vmferry_wire::{Command, DeviceState, Encoder, RamLayout};

use super::bandwidth::BandwidthMeter;
use super::pace::RateLimiter;
use super::return_path::ReturnPath;
use super::shared::Shared;
use super::standstill::Standstill;
use super::writer::{Flushed, StreamWriter};
use crate::error::MigrationError;
use crate::hints::{Questions, Tracked};
use crate::seam::{Activity, Departure, Guest, GuestError, GuestLog, PauseError};
use crate::status::Status;
use crate::transport::{Channel, ChannelKind, Outgoing, TransportError, Uri};
use crate::wait::Wait;

/// The machine type in the stream's configuration section.
pub(crate) const MACHINE_TYPE: &str = "microvm";

/// How often is looked, while waiting for something else, whether the user has cancelled or the destination is gone.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// What the migration has done to the guest so far, and so what a failure has to undo.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hold {
    /// It is its user's.
    None,
    /// Paused for the switch-over since then.
    Paused {
        was: Activity,
        since: Instant,
        /// How long it may stand still, if it would run otherwise.
        bound: Option<Standstill>,
    },
}

/// One outgoing migration. Each phase is a method; they are called in the order of [`Driver::migrate`].
pub(super) struct Driver<'a> {
    pub(super) guest: &'a Arc<dyn Guest>,
    pub(super) shared: &'a Shared,
    pub(super) channel: &'a Channel,
    pub(super) writer: StreamWriter,
    pub(super) return_path: Option<ReturnPath>,
    pub(super) limiter: RateLimiter,
    pub(super) meter: BandwidthMeter,
    pub(super) hold: Hold,
    /// Number of a PING that is put into the stream, but not all written.
    pub(super) pinging: Option<u32>,
}

impl<'a> Driver<'a> {
    /// Runs a migration from the connection to the end, and puts the guest back if it fails.
    pub(super) fn run(
        guest: &Arc<dyn Guest>,
        uri: &Uri,
        shared: &Shared,
    ) -> Result<(), MigrationError> {
        let result = shared.conclude(Self::connect_and_migrate(guest, uri, shared));
        match &result {
            Ok(()) | Err(MigrationError::Cancelled) => {}
            Err(error) => tracing::error!(%uri, "migration failed: {error}"),
        }
        result
    }

    fn connect_and_migrate(
        guest: &Arc<dyn Guest>,
        uri: &Uri,
        shared: &Shared,
    ) -> Result<(), MigrationError> {
        let timeout = shared.parameters().peer_timeout;
        let outgoing = Outgoing::open(uri, timeout, &shared.cancel, &shared.waits)?;
        let channel = outgoing.channel();
        let return_path = match channel.kind() {
            ChannelKind::Socket => {
                Some(
                    ReturnPath::open(channel).map_err(|source| MigrationError::Resources {
                        what: "listen to the destination",
                        source,
                    })?,
                )
            }
            ChannelKind::Pipe | ChannelKind::File => None,
        };
        let layout = RamLayout::new(guest.ram().iter().map(|b| (b.name(), b.len() as u64)))?;
        shared.update(|info| info.ram.total = layout.total());
        let mut driver = Driver {
            guest,
            shared,
            channel,
            writer: StreamWriter::new(Encoder::new(layout)),
            return_path,
            limiter: RateLimiter::new(Instant::now()),
            meter: BandwidthMeter::new(),
            hold: Hold::None,
            pinging: None,
        };
        let result = driver.migrate();
        let hold = driver.hold;
        let departure = match driver.return_path {
            Some(_) => Departure::HandedOver,
            None => Departure::Written,
        };
        let result = match (result, driver.return_path.take()) {
            (Err(error), Some(return_path)) => Err(return_path.explain(error)),
            // A one-way stream: what was written must also arrive (on a disk, in a command that succeeds).
            (Ok(()), None) => match outgoing.finish(&shared.waits) {
                Ok(()) => {
                    shared.give_away();
                    Ok(())
                }
                // The command had all of the guest, and may have started it elsewhere before it was ended.
                Err(error) if shared.cancel.is_cancelled() && matches!(uri, Uri::Exec(_)) => {
                    Err(MigrationError::Undecided {
                        what: "the migration was cancelled",
                        peer: "destination",
                        why: error.to_string(),
                    })
                }
                Err(error) => Err(error.into()),
            },
            // Nobody is connected to it: what failed is the disk or the pipe.
            (Err(MigrationError::Connection { source, .. }), None) => Err(TransportError {
                action: "write to",
                uri: uri.clone(),
                source,
            }
            .into()),
            (result, _) => result,
        };
        Self::settle(&**guest, shared, hold, result.map(|()| departure))
    }

    /// Puts the guest where the outcome wants it (law 7): a guest that was not given away goes on.
    fn settle(
        guest: &dyn Guest,
        shared: &Shared,
        hold: Hold,
        result: Result<Departure, MigrationError>,
    ) -> Result<(), MigrationError> {
        let Hold::Paused { was, since, .. } = hold else {
            return result.map(drop);
        };
        let failure = match result {
            Ok(departure) => {
                guest.left(departure);
                shared.update(|info| info.downtime = Some(since.elapsed()));
                return Ok(());
            }
            Err(failure) => failure,
        };
        let resumed = match failure {
            MigrationError::Undecided { .. } => guest.resume_in_doubt(),
            _ => guest.resume(was),
        };
        Err(match resumed {
            Ok(()) => failure,
            Err(why) => {
                tracing::error!("cannot continue the guest after a failed migration: {why}");
                let failure = Box::new(failure);
                MigrationError::NotResumed { failure, why }
            }
        })
    }

    fn migrate(&mut self) -> Result<(), MigrationError> {
        self.open_stream()?;
        let tracked = Tracked::new(self.start_tracking()?);
        tracked.during(|tracker| {
            self.open_ram()?;
            self.precopy(tracker, self.questions(&tracked))?;
            self.pause(tracker)?;
            self.wait_before_switchover()?;
            self.send_the_rest(tracker)?;
            self.hand_over()
        })
    }

    /// Somebody to ask for free pages, if the guest has that and the user wants it.
    fn questions(&self, tracked: &Arc<Tracked>) -> Option<Questions<'a>> {
        let wanted = self.shared.parameters().free_page_hints;
        let hinting = self.guest.free_page_hinting().filter(|_| wanted)?;
        Some(Questions::new(hinting, tracked.clone()))
    }

    /// Header, configuration, and what the destination must look like.
    fn open_stream(&mut self) -> Result<(), MigrationError> {
        let two_way = self.return_path.is_some();
        self.writer.put(|e, out| {
            e.stream_header(out);
            e.configuration(out, MACHINE_TYPE)
        })?;
        if two_way {
            self.writer.command(Command::OpenReturnPath);
        }
        let description: DeviceState = self.guest.describe()?;
        self.writer.device(&description)?;
        self.flush_all()
    }

    fn start_tracking(&mut self) -> Result<DirtyTracker, MigrationError> {
        let sizes: Vec<usize> = self.guest.ram().iter().map(|b| b.pages()).collect();
        let parameters = self.shared.parameters();
        let (discipline, chunk) = (parameters.discipline, parameters.arming_chunk);
        let start = Instant::now();
        let tracker = DirtyTracker::start(
            Arc::new(GuestLog::new(self.guest.clone())),
            &sizes,
            discipline,
            chunk,
        )?;
        self.shared.update(|info| {
            info.tracking.sync += start.elapsed();
            info.discipline = Some(discipline);
            info.ram.dirty_sync_count = 1;
            info.ram.remaining = info.ram.total;
        });
        self.shared.pass(1);
        Ok(tracker)
    }

    fn open_ram(&mut self) -> Result<(), MigrationError> {
        self.writer.put(|e, out| e.ram_start(out));
        self.flush_all()?;
        self.shared.enter(Status::Active);
        self.shared
            .update(|info| info.setup_time = self.shared.started.elapsed());
        Ok(())
    }

    /// Stops the guest for the switch-over. One that does not come to a stand within the downtime limit goes on, and so does
    /// pre-copy, before the next attempt.
    fn pause(&mut self, tracker: &DirtyTracker) -> Result<(), MigrationError> {
        const ATTEMPTS: u32 = 5;
        /// A busy host may take so long to stop vCPUs that wait for nothing.
        const SHORTEST_LIMIT: Duration = Duration::from_millis(100);
        let mut attempt = 1;
        loop {
            let since = Instant::now();
            let limit = self.shared.parameters().downtime_limit.max(SHORTEST_LIMIT);
            let waiting = self.shared.waits.begin(Wait::Standstill);
            let paused = self.guest.pause(limit);
            drop(waiting);
            match paused {
                Ok(was) => {
                    let parameters = self.shared.parameters();
                    let bound = match was {
                        Activity::Running => Some(Standstill::begin(since, &parameters)),
                        Activity::Paused => None,
                    };
                    self.hold = Hold::Paused { was, since, bound };
                    return Ok(());
                }
                Err(PauseError::Busy(why)) if attempt < ATTEMPTS => {
                    tracing::warn!(attempt, why, "the guest does not stand still yet");
                }
                Err(PauseError::Busy(why)) => {
                    return Err(GuestError(format!(
                        "{why} ({ATTEMPTS} attempts; a higher downtime-limit gives it more time)"
                    ))
                    .into());
                }
                Err(PauseError::Guest(error)) => return Err(error.into()),
            }
            attempt += 1;
            // It has stood still for nothing: now it has its time, before it does again.
            self.idle(Wait::NextAttempt, Instant::now(), limit)?;
            self.precopy(tracker, None)?;
        }
    }

    fn wait_before_switchover(&mut self) -> Result<(), MigrationError> {
        if self.shared.parameters().pause_before_switchover {
            self.shared.enter(Status::PreSwitchover);
            let (shared, start) = (self.shared, Instant::now());
            let _waiting = shared.waits.begin(Wait::Continue);
            while !shared.wait_to_proceed(CHECK_INTERVAL) {
                self.check()?;
            }
            // The user wanted this time.
            if let Hold::Paused {
                bound: Some(bound), ..
            } = &mut self.hold
            {
                bound.extend(start.elapsed());
            }
        }
        self.shared.enter(Status::Device);
        Ok(())
    }

    /// Writes everything that waits to be written, whatever time it takes.
    pub(super) fn flush_all(&mut self) -> Result<(), MigrationError> {
        match self.flush(None)? {
            Flushed::All => Ok(()),
            Flushed::Partly => {
                unreachable!("without a deadline, flushing ends with everything written")
            }
        }
    }

    /// Writes what waits to be written until `deadline`, and takes note of how fast that went.
    pub(super) fn flush(&mut self, deadline: Option<Instant>) -> Result<Flushed, MigrationError> {
        let (before, start) = (self.writer.written(), Instant::now());
        let timeout: Duration = self.shared.parameters().peer_timeout;
        let flushed = self
            .writer
            .flush(self.channel, deadline, timeout, &self.shared.waits)?;
        let bytes = self.writer.written() - before;
        self.meter.wrote(bytes, start);
        self.limiter.sent(bytes);
        if flushed == Flushed::All
            && let Some(number) = self.pinging.take()
        {
            self.meter.pinged(number, Instant::now());
        }
        Ok(flushed)
    }

    /// Fails if the user has cancelled or the destination has given up.
    pub(super) fn check(&mut self) -> Result<(), MigrationError> {
        if self.shared.cancel.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        match &self.return_path {
            Some(return_path) => return_path.check(&mut self.meter),
            None => Ok(()),
        }
    }

    /// How long the guest that was paused for the switch-over may stand still.
    pub(super) fn bound(&self) -> Option<Standstill> {
        match self.hold {
            Hold::Paused { bound, .. } => bound,
            Hold::None => None,
        }
    }
}
