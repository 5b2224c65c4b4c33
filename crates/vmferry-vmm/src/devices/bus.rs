//! I/O ports: which device answers.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::{I8042Device, Trigger};

use super::SerialPort;
use crate::layout::{I8042_PORT, SERIAL_PORT};

/// Offset of the keyboard controller's command and status port.
const I8042_COMMAND: u16 = 4;

/// What a write to a port means for the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteEffect {
    Nothing,
    Reset,
}

impl WriteEffect {
    pub fn resets(self) -> bool {
        self == WriteEffect::Reset
    }
}

/// The reset line of the CPU, as the keyboard controller pulls it.
#[derive(Debug, Default)]
struct ResetLine(AtomicBool);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// The devices behind I/O ports.
pub(crate) struct Bus {
    pub serial: Arc<SerialPort>,
    i8042: Mutex<I8042Device<ResetLine>>,
}

impl Bus {
    pub fn new(serial: Arc<SerialPort>) -> Self {
        Bus {
            serial,
            i8042: Mutex::new(I8042Device::new(ResetLine::default())),
        }
    }

    /// A read by the guest; `data` holds one byte for each byte that it wants.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match port {
            _ if SerialPort::has(port) => self.serial.read((port - SERIAL_PORT) as u8, data),
            _ if is_i8042(port) => {
                let mut i8042 = self.i8042.lock().expect("the device does not panic");
                data.fill(i8042.read((port - I8042_PORT) as u8));
            }
            _ => {
                tracing::debug!(port, len = data.len(), "read of unknown I/O port");
                data.fill(0xff);
            }
        }
    }

    /// A write by the guest.
    pub fn port_write(&self, port: u16, data: &[u8]) -> WriteEffect {
        match port {
            _ if SerialPort::has(port) => self.serial.write((port - SERIAL_PORT) as u8, data),
            _ if is_i8042(port) => {
                let mut i8042 = self.i8042.lock().expect("the device does not panic");
                for byte in data {
                    let Ok(()) = i8042.write((port - I8042_PORT) as u8, *byte);
                }
                if i8042.reset_evt().0.swap(false, Ordering::Relaxed) {
                    return WriteEffect::Reset;
                }
            }
            _ => tracing::debug!(port, ?data, "write to unknown I/O port"),
        }
        WriteEffect::Nothing
    }
}

fn is_i8042(port: u16) -> bool {
    port == I8042_PORT || port == I8042_PORT + I8042_COMMAND
}
