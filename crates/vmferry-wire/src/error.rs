//! What can be wrong with a stream.

use std::{fmt, io};

use crate::LayoutMismatch;
use crate::format::{MAGIC, PAGE_SIZE, RAM_VERSION, VERSION};

/// Why a stream cannot be decoded further. `offset` is in bytes from the stream's beginning, and names the
/// first byte of the item that was being read.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Reading failed; the kind is that of the source.
    #[error("could not read {reading} at byte {offset} of the stream: {source}")]
    Io {
        /// Where the bytes ran out.
        offset: u64,
        /// What was being read.
        reading: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// The stream ends too early.
    #[error(
        "the stream ends at byte {offset}, {place}; the sender gave up or lost its connection: see its log"
    )]
    UnexpectedEof {
        /// Where it ends.
        offset: u64,
        /// What was missing.
        place: EofPlace,
    },
    /// Not a migration stream.
    #[error(
        "the stream begins with {found:#010x}, a migration stream with {MAGIC:#010x} (QEVM); check that the \
         other end is a migration source and that both ends agree on TLS"
    )]
    BadMagic {
        /// The first four bytes.
        found: u32,
    },
    /// A migration stream, but of another version.
    #[error("the stream has version {found}, and only version {VERSION} is supported")]
    BadVersion {
        /// Its version.
        found: u32,
    },
    /// A section where it must not be.
    #[error(
        "{found} at byte {offset} of the stream, where {expected} was expected; the stream is damaged or its sender speaks another protocol"
    )]
    UnexpectedSection {
        /// Where it begins.
        offset: u64,
        /// What came.
        found: String,
        /// What could have come.
        expected: &'static str,
    },
    /// A PART or END section of nothing that was started.
    #[error(
        "a section with id {found} at byte {offset} of the stream continues one that was never started; the RAM section has id {ram}"
    )]
    UnknownSectionId {
        /// Where it begins.
        offset: u64,
        /// Its id.
        found: u32,
        /// The only id that could have come.
        ram: u32,
    },
    /// No footer where the section should end.
    #[error(
        "{section} does not end at byte {offset} of the stream: {found:#04x} instead of its footer; sender and receiver disagree about its content"
    )]
    MissingFooter {
        /// Where it should have been.
        offset: u64,
        /// The section.
        section: String,
        /// The byte that came.
        found: u8,
    },
    /// A footer, but of another section.
    #[error(
        "the footer of {section} at byte {offset} of the stream has id {found} instead of {expected}; the stream is damaged"
    )]
    WrongFooter {
        /// Where it is.
        offset: u64,
        /// The section.
        section: String,
        /// Its id.
        expected: u32,
        /// The footer's id.
        found: u32,
    },
    /// A length beyond its limit; see [`crate::limits`].
    #[error(
        "{what} at byte {offset} of the stream claims {len} bytes, and {limit} are allowed; the stream is damaged or its sender is not vmferry"
    )]
    TooLong {
        /// Where the length is.
        offset: u64,
        /// What it is the length of.
        what: &'static str,
        /// The claim, in bytes.
        len: u64,
        /// The limit, in bytes.
        limit: usize,
    },
    /// More FULL sections than [`crate::limits::DEVICE_SECTIONS`].
    #[error("one device section too many at byte {offset} of the stream: {limit} are allowed")]
    TooManyDevices {
        /// Where it begins.
        offset: u64,
        /// How many may come.
        limit: usize,
    },
    /// A name or text that is not printable UTF-8.
    #[error(
        "{what} at byte {offset} of the stream is not printable text: {shown:?}; the stream is damaged"
    )]
    BadText {
        /// Where it is.
        offset: u64,
        /// What it is the name of.
        what: &'static str,
        /// As much of it as can be shown.
        shown: String,
    },
    /// A section of a kind of machine that is not vmferry's.
    #[error(
        "section {idstr:?} at byte {offset} of the stream is none of vmferry's; QEMU's device states cannot be loaded"
    )]
    ForeignSection {
        /// Where it begins.
        offset: u64,
        /// Its name.
        idstr: String,
    },
    /// The same device twice.
    #[error(
        "device section {idstr:?}, instance {instance}, comes a second time at byte {offset} of the stream; the stream is damaged"
    )]
    DeviceTwice {
        /// Where the second one begins.
        offset: u64,
        /// Its name.
        idstr: String,
        /// Which of several devices of that name.
        instance: u32,
    },
    /// A RAM section of another version or instance.
    #[error(
        "the RAM section at byte {offset} of the stream has version {version}, instance {instance}; only version {RAM_VERSION}, instance 0 is supported"
    )]
    RamVersion {
        /// Where it begins.
        offset: u64,
        /// Its version.
        version: u32,
        /// Its instance.
        instance: u32,
    },
    /// The source's RAM is not ours.
    #[error(transparent)]
    Layout(#[from] LayoutMismatch),
    /// A kind of RAM record that vmferry does not speak.
    #[error(
        "RAM record {name} at byte {offset} of the stream is not supported; switch that capability off on the source"
    )]
    UnsupportedRecord {
        /// Where it begins.
        offset: u64,
        /// QEMU's name of it.
        name: &'static str,
    },
    /// No RAM record looks like this.
    #[error("{word:#018x} at byte {offset} of the stream is no RAM record; the stream is damaged")]
    UnknownRecord {
        /// Where it begins.
        offset: u64,
        /// Its first word.
        word: u64,
    },
    /// A record that continues a block, but no block came before it.
    #[error(
        "the RAM record at byte {offset} of the stream continues a block, but none was named; the stream is damaged"
    )]
    NoBlock {
        /// Where it begins.
        offset: u64,
    },
    /// A record for a block that the RAM section's START did not list.
    #[error(
        "the RAM record at byte {offset} of the stream is for block {name:?}, which does not exist; the stream is damaged"
    )]
    UnknownBlock {
        /// Where it begins.
        offset: u64,
        /// The block's name, as it can be shown.
        name: String,
    },
    /// A page that does not lie in its block.
    #[error(
        "the RAM record at byte {offset} of the stream is for a page of {PAGE_SIZE} bytes at {page:#x} in block {block:?} of {len:#x} bytes; the stream is damaged"
    )]
    PageOutsideBlock {
        /// Where the record begins.
        offset: u64,
        /// The block's name.
        block: String,
        /// Where in the block the page would be, in bytes.
        page: u64,
        /// The block's length in bytes.
        len: u64,
    },
    /// A page filled with one byte that is not zero.
    #[error(
        "the RAM record at byte {offset} of the stream fills a page with {fill:#04x}; only zero pages are supported"
    )]
    FilledPage {
        /// Where the record begins.
        offset: u64,
        /// The fill byte.
        fill: u8,
    },
    /// A command that vmferry does not speak.
    #[error(
        "command {name} ({number:#06x}) at byte {offset} of the stream is not supported; switch that capability off on the source"
    )]
    UnsupportedCommand {
        /// Where its section begins.
        offset: u64,
        /// QEMU's name of it, or "unknown".
        name: &'static str,
        /// Its number.
        number: u16,
    },
    /// A command with a payload of a length that it never has.
    #[error(
        "command {number:#06x} at byte {offset} of the stream has {len} bytes, expected {expected}; the stream is damaged"
    )]
    CommandLength {
        /// Where its section begins.
        offset: u64,
        /// Its number.
        number: u16,
        /// Announced length, in bytes.
        len: u16,
        /// Length it should have, in bytes.
        expected: u16,
    },
    /// The decoder was asked for more after it had reported an error.
    #[error("the stream was given up at byte {offset}, after an earlier error")]
    GivenUp {
        /// How far it was read.
        offset: u64,
    },
}

/// What was missing where a stream ended too early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EofPlace {
    /// It ended cleanly between two sections.
    SectionBoundary {
        /// What could have come next.
        expected: &'static str,
    },
    /// It ended in the middle of something.
    Inside(&'static str),
}

impl fmt::Display for EofPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EofPlace::SectionBoundary { expected } => {
                write!(f, "between two sections, where {expected} was expected")
            }
            EofPlace::Inside(what) => write!(f, "in the middle of {what}"),
        }
    }
}
