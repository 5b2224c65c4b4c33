//! The serial port's registers and the input that the guest has not read.

use serde::{Deserialize, Serialize};
use vm_superio::SerialState;

use super::SectionKind;

/// The section of the serial port.
pub(crate) const SECTION: SectionKind = SectionKind {
    name: "vmferry/serial",
    version: 1,
};

/// [`SerialState`] in the stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SavedSerial {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl From<SerialState> for SavedSerial {
    fn from(state: SerialState) -> Self {
        SavedSerial {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }
}

impl From<SavedSerial> for SerialState {
    fn from(saved: SavedSerial) -> Self {
        SerialState {
            baud_divisor_low: saved.baud_divisor[0],
            baud_divisor_high: saved.baud_divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.input,
        }
    }
}
