//! Commands: what the source tells the destination between sections.

/// What a COMMAND section says.
///
/// QEMU counts its commands up from 1; vmferry's own begin at 0x7600 (`v` in the high byte), far from
/// QEMU's, whose reader refuses numbers that it does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The source reads a return path; the destination is to open its end. QEMU's number 1.
    OpenReturnPath,
    /// The destination is to answer [`crate::ReturnPathMessage::Pong`] with the same number. QEMU's 2.
    Ping(u32),
    /// The source's guest is paused; what follows is the last of it. QEMU's 11.
    SwitchoverStart,
    /// vmferry's 0x7601: the source has given the guest up; the destination is to run it.
    HandoverRun,
    /// vmferry's 0x7602: the source keeps the guest after all (it was cancelled, say); the destination is to
    /// forget its copy.
    HandoverKeep,
}

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const SWITCHOVER_START: u16 = 11;
const HANDOVER_RUN: u16 = 0x7601;
const HANDOVER_KEEP: u16 = 0x7602;

/// A command whose number and payload length have arrived.
pub(crate) enum Announced {
    /// It has no payload.
    Bare(Command),
    /// Its payload is one be32.
    WithNumber(fn(u32) -> Command),
}

/// Why the number and payload length of a COMMAND section are not those of a [`Command`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CommandError {
    /// The payload of this command has another length.
    Length { expected: u16 },
    /// A command of QEMU's that vmferry does not speak.
    Unsupported(&'static str),
    /// Neither QEMU's nor vmferry's.
    Unknown,
}

impl Command {
    /// The command's name, as in QEMU's documentation where it is QEMU's.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Command::OpenReturnPath => "OPEN_RETURN_PATH",
            Command::Ping(_) => "PING",
            Command::SwitchoverStart => "SWITCHOVER_START",
            Command::HandoverRun => "HANDOVER_RUN",
            Command::HandoverKeep => "HANDOVER_KEEP",
        }
    }

    /// Appends number, payload length and payload.
    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        let (number, payload) = match self {
            Command::OpenReturnPath => (OPEN_RETURN_PATH, None),
            Command::Ping(value) => (PING, Some(value)),
            Command::SwitchoverStart => (SWITCHOVER_START, None),
            Command::HandoverRun => (HANDOVER_RUN, None),
            Command::HandoverKeep => (HANDOVER_KEEP, None),
        };
        out.extend_from_slice(&number.to_be_bytes());
        match payload {
            None => out.extend_from_slice(&0u16.to_be_bytes()),
            Some(value) => {
                out.extend_from_slice(&4u16.to_be_bytes());
                out.extend_from_slice(&value.to_be_bytes());
            }
        }
    }

    /// Checks a command's number and payload length, before the payload is read.
    pub(crate) fn announced(number: u16, len: u16) -> Result<Announced, CommandError> {
        let unsupported = |name| Err(CommandError::Unsupported(name));
        let (announced, expected) = match number {
            OPEN_RETURN_PATH => (Announced::Bare(Command::OpenReturnPath), 0),
            PING => (Announced::WithNumber(Command::Ping), 4),
            SWITCHOVER_START => (Announced::Bare(Command::SwitchoverStart), 0),
            HANDOVER_RUN => (Announced::Bare(Command::HandoverRun), 0),
            HANDOVER_KEEP => (Announced::Bare(Command::HandoverKeep), 0),
            3 => return unsupported("POSTCOPY_ADVISE"),
            4 => return unsupported("POSTCOPY_LISTEN"),
            5 => return unsupported("POSTCOPY_RUN"),
            6 => return unsupported("POSTCOPY_RAM_DISCARD"),
            7 => return unsupported("PACKAGED"),
            8 => return unsupported("ENABLE_COLO"),
            9 => return unsupported("POSTCOPY_RESUME"),
            10 => return unsupported("RECV_BITMAP"),
            _ => return Err(CommandError::Unknown),
        };
        if len == expected {
            Ok(announced)
        } else {
            Err(CommandError::Length { expected })
        }
    }
}
