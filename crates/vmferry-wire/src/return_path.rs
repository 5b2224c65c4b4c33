//! The return path: what the destination tells the source.

use std::io::{self, Read};

use crate::{limits, text};

/// One message of the return path: be16 type, be16 length, payload.
///
/// QEMU counts its types up from 1; vmferry's own begin at 0x7600, as its [`crate::Command`]s do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReturnPathMessage {
    /// The last message; 0 means that all went well. QEMU's type 1.
    Shut(u32),
    /// The answer to [`crate::Command::Ping`], with its number. QEMU's type 2.
    Pong(u32),
    /// vmferry's 0x7601: everything is loaded; may I run the guest?
    HandoverLoaded,
    /// vmferry's 0x7602: why the destination gives up, in a sentence for the source's user; `Shut` follows.
    /// It is made fit to be shown, and cut to [`limits::ERROR_SENTENCE`] bytes, on both ends.
    Error(String),
}

const SHUT: u16 = 1;
const PONG: u16 = 2;
const HANDOVER_LOADED: u16 = 0x7601;
const ERROR: u16 = 0x7602;

/// Why the return path cannot be read on. Nothing more can be read from it.
#[derive(Debug, thiserror::Error)]
pub enum ReturnPathError {
    /// Reading failed; the kind is that of the source.
    #[error("could not read the destination's answer: {0}")]
    Io(#[from] io::Error),
    /// The channel ended between two messages.
    #[error(
        "the destination closed the channel without a last word; look for the reason in its log"
    )]
    Closed,
    /// The channel ended in the middle of a message.
    #[error(
        "the destination closed the channel in the middle of a message; look for the reason in its log"
    )]
    Truncated,
    /// A message of QEMU's that vmferry does not speak.
    #[error(
        "the destination sent {name} (type {number:#06x}), which vmferry does not support; switch that \
         capability off on the destination"
    )]
    Unsupported {
        /// QEMU's name of it.
        name: &'static str,
        /// Its type.
        number: u16,
    },
    /// Neither QEMU's nor vmferry's.
    #[error(
        "the destination sent a message of unknown type {number:#06x}; is it a newer vmferry, or no vmferry?"
    )]
    Unknown {
        /// Its type.
        number: u16,
    },
    /// The payload has a length that this message never has.
    #[error(
        "the destination sent a message of type {number:#06x} with {len} bytes, expected {expected}{}",
        if *.number == ERROR { " at most" } else { "" }
    )]
    Length {
        /// Its type.
        number: u16,
        /// Announced length, in bytes.
        len: u16,
        /// Length it should have, or the longest it may have, in bytes.
        expected: u16,
    },
}

impl ReturnPathMessage {
    /// Appends the message to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut header = |number: u16, len: u16| {
            out.extend_from_slice(&number.to_be_bytes());
            out.extend_from_slice(&len.to_be_bytes());
        };
        match self {
            ReturnPathMessage::Shut(status) => {
                header(SHUT, 4);
                out.extend_from_slice(&status.to_be_bytes());
            }
            ReturnPathMessage::Pong(value) => {
                header(PONG, 4);
                out.extend_from_slice(&value.to_be_bytes());
            }
            ReturnPathMessage::HandoverLoaded => header(HANDOVER_LOADED, 0),
            ReturnPathMessage::Error(sentence) => {
                let sentence = text::one_line(sentence.as_bytes());
                let sentence = text::truncate(&sentence, limits::ERROR_SENTENCE);
                // At most ERROR_SENTENCE bytes, far below 2^16.
                header(ERROR, sentence.len() as u16);
                out.extend_from_slice(sentence.as_bytes());
            }
        }
    }

    /// Reads one message. Needs no buffer around `reader`: messages are few and small.
    ///
    /// # Errors
    ///
    /// See [`ReturnPathError`]; after an error, nothing more can be read.
    pub fn read_from(reader: &mut impl Read) -> Result<Self, ReturnPathError> {
        let mut header = [0; 4];
        match fill(reader, &mut header)? {
            0 => return Err(ReturnPathError::Closed),
            4 => {}
            _ => return Err(ReturnPathError::Truncated),
        }
        let [t0, t1, l0, l1] = header;
        let number = u16::from_be_bytes([t0, t1]);
        let len = u16::from_be_bytes([l0, l1]);
        let exactly = |expected| {
            if len == expected {
                Ok(())
            } else {
                Err(ReturnPathError::Length {
                    number,
                    len,
                    expected,
                })
            }
        };
        let unsupported = |name| Err(ReturnPathError::Unsupported { name, number });
        match number {
            SHUT => {
                exactly(4)?;
                Ok(ReturnPathMessage::Shut(read_u32(reader)?))
            }
            PONG => {
                exactly(4)?;
                Ok(ReturnPathMessage::Pong(read_u32(reader)?))
            }
            HANDOVER_LOADED => {
                exactly(0)?;
                Ok(ReturnPathMessage::HandoverLoaded)
            }
            ERROR => {
                let mut sentence = [0; limits::ERROR_SENTENCE];
                let Some(sentence) = sentence.get_mut(..usize::from(len)) else {
                    return Err(ReturnPathError::Length {
                        number,
                        len,
                        expected: limits::ERROR_SENTENCE as u16,
                    });
                };
                read_all(reader, sentence)?;
                // What is shown in place of a bad byte is longer than it, hence the second cut.
                let sentence = text::one_line(sentence);
                let sentence = text::truncate(&sentence, limits::ERROR_SENTENCE);
                Ok(ReturnPathMessage::Error(sentence.to_owned()))
            }
            3 => unsupported("REQ_PAGES_ID (post-copy)"),
            4 => unsupported("REQ_PAGES (post-copy)"),
            5 => unsupported("RECV_BITMAP (post-copy recovery)"),
            6 => unsupported("RESUME_ACK (post-copy recovery)"),
            7 => unsupported("SWITCHOVER_ACK"),
            _ => Err(ReturnPathError::Unknown { number }),
        }
    }
}

fn read_u32(reader: &mut impl Read) -> Result<u32, ReturnPathError> {
    let mut bytes = [0; 4];
    read_all(reader, &mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_all(reader: &mut impl Read, buf: &mut [u8]) -> Result<(), ReturnPathError> {
    if fill(reader, buf)? == buf.len() {
        Ok(())
    } else {
        Err(ReturnPathError::Truncated)
    }
}

/// Reads until `buf` is full or the reader ends; how many bytes came.
fn fill(reader: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match reader.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}
