//! Receiving one stream: RAM, devices, and the guest itself.

use std::time::{Duration, Instant};

use vmferry_dirty::{PAGE_SIZE, PageIndex};
use vmferry_wire::{
    Command, Decoder, DeviceState, Event, RamLayout, ReturnPathMessage, StreamError,
};

use super::Shared;
use super::memory::Memory;
use super::populate::Populator;
use super::reader::StreamReader;
use crate::error::{CONNECTION_LOST, MigrationError};
use crate::run_state;
use crate::seam::{Activity, Guest, GuestError};
use crate::status::Status;
use crate::transport::Channel;
use crate::wait::Wait;

/// Time between two updates of the figures.
const UPDATE_INTERVAL: Duration = Duration::from_millis(50);

/// How long the source gets to read why its guest was refused.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What the source does with a guest that is loaded here.
enum Decision {
    /// It has given the guest up.
    Run,
    /// It goes on with it.
    Keep,
}

/// One incoming stream.
pub(super) struct Receiver<'a> {
    guest: &'a dyn Guest,
    channel: &'a Channel,
    shared: &'a Shared,
    stream: Decoder<StreamReader<'a>>,
    memory: Memory<'a>,
    /// The source reads a return path: nothing runs before it says so.
    two_way: bool,
    /// When the source's guest was paused, as far as can be seen from here.
    paused_since: Option<Instant>,
    /// The machine's description came, and fits.
    described: bool,
    devices: Vec<DeviceState>,
    activity: Activity,
}

impl<'a> Receiver<'a> {
    pub(super) fn new(
        guest: &'a dyn Guest,
        channel: &'a Channel,
        shared: &'a Shared,
        populator: Populator<'a>,
    ) -> Result<Self, MigrationError> {
        let ram = guest.ram();
        let layout = RamLayout::new(ram.iter().map(|b| (b.name(), b.len() as u64)))?;
        shared.update(|info| info.ram.total = layout.total());
        Ok(Receiver {
            guest,
            channel,
            shared,
            stream: Decoder::new(StreamReader::new(channel, &shared.waits), layout),
            memory: Memory::new(ram, populator),
            two_way: false,
            paused_since: None,
            described: false,
            devices: Vec::new(),
            activity: Activity::Running,
        })
    }

    /// Receives the guest and starts it, or says why not.
    pub(super) fn run(mut self) -> Result<(), MigrationError> {
        let result = match self.receive() {
            Ok(()) => self.take_over(),
            // The guest is at its source, and what has come of it is of no use.
            Err(error) => {
                self.memory.forget();
                Err(error)
            }
        };
        if self.two_way {
            self.say_goodbye(&result);
        }
        result
    }

    /// Tells the source how it ended. The source may be gone, and then there is nobody to tell.
    fn say_goodbye(&self, result: &Result<(), MigrationError>) {
        let shut = match result {
            // The guest runs here, whether or not the source hears of it.
            Ok(()) => ReturnPathMessage::Shut(0),
            // Neither word would be true.
            Err(MigrationError::Undecided { .. }) => return,
            Err(error) => {
                let _ = self.answer(&ReturnPathMessage::Error(error.to_string()));
                ReturnPathMessage::Shut(1)
            }
        };
        let _ = self.answer(&shut);
        self.channel.close_after_last_words(LAST_WORDS);
    }

    /// Reads the stream up to the point where the guest is complete here.
    fn receive(&mut self) -> Result<(), MigrationError> {
        let mut updated = Instant::now();
        let mut pages_in_part = 0;
        loop {
            // Pages first: they are nearly everything.
            match self.stream.next()? {
                Event::Page {
                    block,
                    offset,
                    data,
                } => {
                    let page = PageIndex(offset as usize / PAGE_SIZE);
                    self.memory.page(block, page, data);
                    pages_in_part += 1;
                }
                Event::ZeroPage { block, offset } => {
                    let page = PageIndex(offset as usize / PAGE_SIZE);
                    self.memory.zero_page(block, page);
                    pages_in_part += 1;
                }
                Event::RamPartEnd { last } => {
                    // So the source says that a pass is over.
                    if std::mem::take(&mut pages_in_part) == 0 && !last {
                        self.memory.pass_ends();
                    }
                    if updated.elapsed() >= UPDATE_INTERVAL {
                        updated = Instant::now();
                        self.publish();
                    }
                }
                Event::Configuration { .. } | Event::RamSetup => {}
                Event::Command(command) => self.command(command)?,
                Event::DeviceState(state) => self.device(state)?,
                Event::VmDescription(_) if self.two_way => return Ok(()),
                Event::VmDescription(_) => {}
                Event::EndOfStream => return Ok(()),
            }
        }
    }

    fn command(&mut self, command: Command) -> Result<(), MigrationError> {
        match command {
            Command::OpenReturnPath => self.two_way = true,
            Command::Ping(number) => self.answer(&ReturnPathMessage::Pong(number))?,
            Command::SwitchoverStart => {
                self.paused_since = Some(Instant::now());
                self.memory.switch_over();
                self.shared.enter(Status::Device);
            }
            // The decoder lets them pass only where `take_over` waits for them.
            Command::HandoverRun | Command::HandoverKeep => {}
        }
        Ok(())
    }

    fn device(&mut self, state: DeviceState) -> Result<(), MigrationError> {
        if self.paused_since.is_none() {
            self.guest.check_description(&state)?;
            self.described = true;
        } else if state.idstr == run_state::IDSTR {
            self.activity = run_state::decode(&state)?;
        } else {
            self.devices.push(state);
        }
        Ok(())
    }

    /// Loads the devices, asks for the guest, and runs it (law 7: not before the source has given it up).
    fn take_over(&mut self) -> Result<(), MigrationError> {
        self.publish();
        let paused_since = match self.paused_since {
            Some(since) if self.described => since,
            _ => {
                let why = "the stream ended without the machine's description or without a paused guest: \
                           is the other side a vmferry of the same version?";
                return Err(GuestError::new(why).into());
            }
        };
        let loading = self.shared.waits.begin(Wait::Machine);
        // Loading may write to guest memory.
        self.memory.complete();
        self.guest.load_devices(&self.devices)?;
        if !self.two_way {
            self.guest.check_snapshot()?;
        }
        drop(loading);
        if self.two_way {
            self.answer(&ReturnPathMessage::HandoverLoaded)?;
            match self.wait_for_decision() {
                Ok(Decision::Run) => {}
                Ok(Decision::Keep) => return Err(MigrationError::Kept),
                // The source may have given the guest up, with its word lost on the way; or not. Nobody
                // may run it before its user has looked, and nobody may throw it away.
                Err(lost) => {
                    self.guest.start_in_doubt(paused_since.elapsed())?;
                    return Err(MigrationError::Undecided {
                        what: CONNECTION_LOST,
                        peer: "source",
                        why: lost.to_string(),
                    });
                }
            }
        }
        let _starting = self.shared.waits.begin(Wait::Machine);
        self.guest.start(self.activity, paused_since.elapsed())?;
        self.shared
            .update(|info| info.downtime = Some(paused_since.elapsed()));
        Ok(())
    }

    fn wait_for_decision(&mut self) -> Result<Decision, StreamError> {
        let _waiting = self.shared.waits.begin(Wait::Decision);
        loop {
            match self.stream.next()? {
                Event::Command(Command::HandoverRun) => return Ok(Decision::Run),
                Event::Command(Command::HandoverKeep) => return Ok(Decision::Keep),
                _ => {}
            }
        }
    }

    fn answer(&self, message: &ReturnPathMessage) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let piece = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: the piece is `bytes`, which lives until the end of the function. A few bytes on an
        // otherwise idle direction of the socket are taken at once or never.
        let written = unsafe { self.channel.write_pieces(&[piece]) };
        let source = match written {
            Ok(n) if n == bytes.len() => return Ok(()),
            Ok(_) => std::io::ErrorKind::WriteZero.into(),
            Err(error) => error,
        };
        Err(MigrationError::Connection {
            peer: "source",
            source,
        })
    }

    fn publish(&self) {
        let (normal, duplicate) = (self.memory.normal(), self.memory.zero());
        self.shared.update(|info| {
            info.ram.transferred = self.stream.consumed();
            info.ram.normal = normal;
            info.ram.duplicate = duplicate;
        });
    }
}
