//! Reading a stream.

mod input;
mod phase;
mod ram;
mod sections;

use std::collections::HashSet;
use std::io::Read;

use self::input::Input;
use self::phase::{Channel, Phase, Switchover};
use crate::format::PAGE_SIZE;
use crate::{Command, DeviceState, RamLayout, StreamError};

/// What a stream says next.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The machine type of the source.
    Configuration {
        /// For example `microvm`.
        machine: String,
    },
    /// A command.
    Command(Command),
    /// A FULL section: the machine's description before RAM, a device after it.
    DeviceState(DeviceState),
    /// The RAM section has begun, and its blocks are those of the expected layout.
    RamSetup,
    /// The content of a page.
    Page {
        /// Index of the block in the expected layout.
        block: usize,
        /// Where in the block, in bytes: page-aligned, and the whole page lies in the block.
        offset: u64,
        /// The page.
        data: &'a [u8; PAGE_SIZE],
    },
    /// A page of zeros.
    ZeroPage {
        /// Index of the block in the expected layout.
        block: usize,
        /// Where in the block, in bytes: page-aligned, and the whole page lies in the block.
        offset: u64,
    },
    /// A PART of the RAM section is complete, or with `last` its END, and so all of RAM.
    RamPartEnd {
        /// No further page comes.
        last: bool,
    },
    /// The JSON that describes the stream's sections. On a two-way channel it says that all devices came.
    VmDescription(String),
    /// The stream is complete. On a one-way channel a [`Event::VmDescription`] may still follow.
    EndOfStream,
}

/// An [`Event`] that does not borrow the buffer yet.
enum Step {
    Configuration {
        machine: String,
    },
    Command(Command),
    DeviceState(DeviceState),
    RamSetup,
    /// `at` is where [`Input::consume`] found the page.
    Page {
        block: usize,
        offset: u64,
        at: usize,
    },
    ZeroPage {
        block: usize,
        offset: u64,
    },
    RamPartEnd {
        last: bool,
    },
    VmDescription(String),
    EndOfStream,
}

/// Reads a stream, one [`Event`] at a time.
///
/// It reads as much at a time as the reader gives, up to its buffer of 1 MiB, and hands pages out of that
/// buffer; the reader needs no buffer of its own. It never asks the reader for bytes while it can give an
/// event without them, so it can be used on a channel on which the sender waits for an answer.
///
/// Everything in the stream is taken for hostile: lengths are bounded by [`crate::limits`], pages by their
/// block, and the order of sections is that of the [crate documentation](crate).
pub struct Decoder<R> {
    input: Input<R>,
    layout: RamLayout,
    phase: Phase,
    channel: Channel,
    switchover: Switchover,
    /// Section id of `ram`, from its START on.
    ram_id: u32,
    /// Block of the RAM record before.
    last_block: Option<usize>,
    /// idstr and instance of the FULL sections that came.
    devices: HashSet<(String, u32)>,
    /// Bytes of state in them.
    device_bytes: usize,
}

impl<R: Read> Decoder<R> {
    /// A decoder for a stream that is to fill a guest with this RAM.
    pub fn new(reader: R, expected: RamLayout) -> Self {
        Decoder {
            input: Input::new(reader),
            layout: expected,
            phase: Phase::Header,
            channel: Channel::OneWay,
            switchover: Switchover::Ahead,
            ram_id: 0,
            last_block: None,
            devices: HashSet::new(),
            device_bytes: 0,
        }
    }

    /// The next event.
    ///
    /// # Errors
    ///
    /// See [`StreamError`]; after an error, nothing more can be read: [`StreamError::GivenUp`]. A stream
    /// that has nothing to add after [`Event::EndOfStream`] gives [`StreamError::UnexpectedEof`].
    #[expect(
        clippy::should_implement_trait,
        reason = "an Iterator cannot lend out its buffer"
    )]
    #[inline]
    pub fn next(&mut self) -> Result<Event<'_>, StreamError> {
        match self.step() {
            Ok(step) => Ok(self.event(step)),
            Err(error) => {
                self.phase = Phase::Failed;
                Err(error)
            }
        }
    }

    /// Bytes of the stream that the events so far took.
    pub fn consumed(&self) -> u64 {
        self.input.offset()
    }

    /// Bytes that were read from the reader for events to come.
    pub fn buffered(&self) -> usize {
        self.input.buffered()
    }

    #[inline]
    fn step(&mut self) -> Result<Step, StreamError> {
        match self.phase {
            Phase::PartRecords | Phase::EndRecords => self.ram_record(),
            Phase::Header => {
                self.header()?;
                self.section()
            }
            Phase::Failed => Err(StreamError::GivenUp {
                offset: self.input.offset(),
            }),
            _ => self.section(),
        }
    }

    #[inline]
    fn event(&self, step: Step) -> Event<'_> {
        match step {
            Step::Configuration { machine } => Event::Configuration { machine },
            Step::Command(command) => Event::Command(command),
            Step::DeviceState(state) => Event::DeviceState(state),
            Step::RamSetup => Event::RamSetup,
            Step::Page { block, offset, at } => Event::Page {
                block,
                offset,
                data: self.input.at(at),
            },
            Step::ZeroPage { block, offset } => Event::ZeroPage { block, offset },
            Step::RamPartEnd { last } => Event::RamPartEnd { last },
            Step::VmDescription(json) => Event::VmDescription(json),
            Step::EndOfStream => Event::EndOfStream,
        }
    }
}
