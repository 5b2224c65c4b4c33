//! Sections other than RAM's, and which of them may come when.

use std::io::Read;

use super::phase::{Channel, Phase, Switchover};
use super::{Decoder, Step};
use crate::command::{Announced, CommandError};
use crate::format::{FOOTER, MAGIC, OWN_PREFIX, RAM, SectionKind, VERSION};
use crate::{Command, DeviceState, StreamError, limits, text};

const HEADER: &str = "the stream header";
const CONFIGURATION: &str = "the CONFIGURATION section";
const COMMAND: &str = "a COMMAND section";
const DEVICE: &str = "a device section";
const DESCRIPTION: &str = "the VMDESCRIPTION section";

impl<R: Read> Decoder<R> {
    /// Magic and version.
    pub(super) fn header(&mut self) -> Result<(), StreamError> {
        let found = self.input.u32(HEADER)?;
        if found != MAGIC {
            return Err(StreamError::BadMagic { found });
        }
        let found = self.input.u32(HEADER)?;
        if found != VERSION {
            return Err(StreamError::BadVersion { found });
        }
        self.phase = Phase::Configuration;
        Ok(())
    }

    /// The next section, or the beginning of its records if it is a part of RAM.
    pub(super) fn section(&mut self) -> Result<Step, StreamError> {
        let offset = self.input.offset();
        let byte = self.input.section_byte(self.phase.expected(self.channel))?;
        let Some(kind) = SectionKind::from_byte(byte) else {
            return Err(self.unexpected(offset, format!("unknown section {byte:#04x}")));
        };
        match (kind, self.phase) {
            (SectionKind::Configuration, Phase::Configuration) => self.configuration(),
            (
                SectionKind::Command,
                Phase::Setup | Phase::Ram | Phase::Devices | Phase::Described,
            ) => self.command(offset),
            (SectionKind::Full, Phase::Setup | Phase::Devices) => self.device(offset),
            (SectionKind::Start, Phase::Setup) => self.start(offset),
            (SectionKind::Part, Phase::Ram) => self.continue_ram(offset, Phase::PartRecords),
            (SectionKind::End, Phase::Ram) => self.continue_ram(offset, Phase::EndRecords),
            (SectionKind::VmDescription, Phase::Devices | Phase::Ended) => self.description(),
            (SectionKind::Eof, _) => self.eof(offset),
            _ => Err(self.unexpected(offset, kind.to_string())),
        }
    }

    fn unexpected(&self, offset: u64, found: String) -> StreamError {
        StreamError::UnexpectedSection {
            offset,
            found,
            expected: self.phase.expected(self.channel),
        }
    }

    /// The footer of the section with this id; `section` names it for errors.
    pub(super) fn footer(
        &mut self,
        id: u32,
        section: impl Fn() -> String,
    ) -> Result<(), StreamError> {
        let offset = self.input.offset();
        let found = self.input.u8("a section footer")?;
        if found != FOOTER {
            return Err(StreamError::MissingFooter {
                offset,
                section: section(),
                found,
            });
        }
        let found = self.input.u32("a section footer")?;
        if found != id {
            return Err(StreamError::WrongFooter {
                offset,
                section: section(),
                expected: id,
                found,
            });
        }
        Ok(())
    }

    /// A be32 length, compared with its limit.
    fn length(&mut self, what: &'static str, limit: usize) -> Result<usize, StreamError> {
        let offset = self.input.offset();
        let len = self.input.u32(what)?;
        match usize::try_from(len) {
            Ok(len) if len <= limit => Ok(len),
            _ => Err(StreamError::TooLong {
                offset,
                what,
                len: len.into(),
                limit,
            }),
        }
    }

    fn configuration(&mut self) -> Result<Step, StreamError> {
        let len = self.length(CONFIGURATION, limits::MACHINE_NAME)?;
        let offset = self.input.offset();
        let name = self.input.bytes(len, CONFIGURATION)?;
        let machine = printable(offset, "the machine type", &name)?;
        self.phase = Phase::Setup;
        Ok(Step::Configuration { machine })
    }

    /// id and idstr of a START or FULL section.
    fn section_name(&mut self) -> Result<(u32, String), StreamError> {
        let id = self.input.u32("a section header")?;
        let offset = self.input.offset();
        let name = self.input.short("a section header")?;
        let name = printable(offset, "the name of a section", name)?;
        Ok((id, name))
    }

    fn start(&mut self, offset: u64) -> Result<Step, StreamError> {
        let (id, idstr) = self.section_name()?;
        if idstr != RAM {
            return Err(StreamError::ForeignSection { offset, idstr });
        }
        self.ram_setup(offset, id)
    }

    fn continue_ram(&mut self, offset: u64, records: Phase) -> Result<Step, StreamError> {
        let found = self.input.u32("a section header")?;
        if found != self.ram_id {
            return Err(StreamError::UnknownSectionId {
                offset,
                found,
                ram: self.ram_id,
            });
        }
        self.phase = records;
        self.ram_record()
    }

    fn device(&mut self, offset: u64) -> Result<Step, StreamError> {
        let (id, idstr) = self.section_name()?;
        if !idstr.starts_with(OWN_PREFIX) {
            return Err(StreamError::ForeignSection { offset, idstr });
        }
        if self.devices.len() == limits::DEVICE_SECTIONS {
            return Err(StreamError::TooManyDevices {
                offset,
                limit: limits::DEVICE_SECTIONS,
            });
        }
        let instance_id = self.input.u32(DEVICE)?;
        if !self.devices.insert((idstr.clone(), instance_id)) {
            return Err(StreamError::DeviceTwice {
                offset,
                idstr,
                instance: instance_id,
            });
        }
        let version_id = self.input.u32(DEVICE)?;
        let limit = limits::DEVICE_STATE.min(limits::ALL_DEVICE_STATES - self.device_bytes);
        let len = self.length(DEVICE, limit)?;
        self.device_bytes += len;
        let data = self.input.bytes(len, DEVICE)?;
        self.footer(id, || format!("device section {idstr:?}"))?;
        Ok(Step::DeviceState(DeviceState {
            idstr,
            instance_id,
            version_id,
            data,
        }))
    }

    fn command(&mut self, offset: u64) -> Result<Step, StreamError> {
        let number = self.input.u16(COMMAND)?;
        let len = self.input.u16(COMMAND)?;
        let command = match Command::announced(number, len) {
            Ok(Announced::Bare(command)) => command,
            Ok(Announced::WithNumber(command)) => command(self.input.u32(COMMAND)?),
            Err(CommandError::Length { expected }) => {
                return Err(StreamError::CommandLength {
                    offset,
                    number,
                    len,
                    expected,
                });
            }
            Err(CommandError::Unsupported(name)) => {
                return Err(StreamError::UnsupportedCommand {
                    offset,
                    name,
                    number,
                });
            }
            Err(CommandError::Unknown) => {
                return Err(StreamError::UnsupportedCommand {
                    offset,
                    name: "unknown",
                    number,
                });
            }
        };
        match (command, self.phase, self.channel, self.switchover) {
            (Command::OpenReturnPath, Phase::Setup, Channel::OneWay, _) => {
                self.channel = Channel::TwoWay;
            }
            (Command::Ping(_), _, Channel::TwoWay, _) => {}
            (Command::SwitchoverStart, Phase::Ram, _, Switchover::Ahead) => {
                self.switchover = Switchover::Started;
            }
            (Command::HandoverRun, Phase::Described, Channel::TwoWay, _) => {
                self.phase = Phase::HandedOver;
            }
            (Command::HandoverKeep, Phase::Described, Channel::TwoWay, _) => {
                self.phase = Phase::Complete;
            }
            _ => return Err(self.unexpected(offset, format!("command {}", command.name()))),
        }
        Ok(Step::Command(command))
    }

    fn description(&mut self) -> Result<Step, StreamError> {
        let len = self.length(DESCRIPTION, limits::VM_DESCRIPTION)?;
        let offset = self.input.offset();
        let json = self.input.bytes(len, DESCRIPTION)?;
        let Ok(json) = String::from_utf8(json) else {
            return Err(StreamError::BadText {
                offset,
                what: DESCRIPTION,
                shown: String::new(),
            });
        };
        self.phase = if self.phase == Phase::Ended {
            Phase::Complete
        } else {
            Phase::Described
        };
        Ok(Step::VmDescription(json))
    }

    fn eof(&mut self, offset: u64) -> Result<Step, StreamError> {
        self.phase = match (self.phase, self.channel) {
            (Phase::Devices, Channel::OneWay) => Phase::Ended,
            (Phase::Described, Channel::OneWay) | (Phase::HandedOver, _) => Phase::Complete,
            _ => return Err(self.unexpected(offset, SectionKind::Eof.to_string())),
        };
        Ok(Step::EndOfStream)
    }
}

/// A name that can be shown, or an error with what of it can be.
fn printable(offset: u64, what: &'static str, bytes: &[u8]) -> Result<String, StreamError> {
    match std::str::from_utf8(bytes) {
        Ok(name) if text::is_name(name) => Ok(name.to_owned()),
        _ => Err(StreamError::BadText {
            offset,
            what,
            shown: text::one_line(bytes),
        }),
    }
}
