//! I/O ports and registers in memory: which device answers.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::{I8042Device, Trigger};

use super::SerialPort;
use crate::layout::{I8042_PORT, SERIAL_PORT};

/// Offset of the keyboard controller's command and status port.
const I8042_COMMAND: u16 = 4;

/// What a write to a register means for the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteEffect {
    Nothing,
    Reset,
    PowerOff,
}

/// A device whose registers are in the guest's address space.
pub(crate) trait MmioDevice: Send + Sync {
    /// A read by the guest; `data` holds one byte for each byte that it wants.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// A write by the guest.
    fn write(&self, offset: u64, data: &[u8]) -> WriteEffect;
}

/// Where a device's registers are.
pub(crate) struct MmioRange {
    pub start: u64,
    pub len: u64,
    pub device: Arc<dyn MmioDevice>,
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

/// The devices behind I/O ports and registers in memory.
pub(crate) struct Bus {
    pub serial: Arc<SerialPort>,
    i8042: Mutex<I8042Device<ResetLine>>,
    mmio: MmioTable,
}

impl Bus {
    pub fn new(serial: Arc<SerialPort>, mmio: Vec<MmioRange>) -> Self {
        Bus {
            serial,
            i8042: Mutex::new(I8042Device::new(ResetLine::default())),
            mmio: MmioTable::new(mmio),
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

    /// A read by the guest of a register in memory.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.mmio.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => {
                tracing::debug!(address, len = data.len(), "read of unknown MMIO");
                data.fill(0xff);
            }
        }
    }

    /// A write by the guest to a register in memory.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> WriteEffect {
        match self.mmio.find(address, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => {
                tracing::debug!(address, ?data, "write to unknown MMIO");
                WriteEffect::Nothing
            }
        }
    }
}

fn is_i8042(port: u16) -> bool {
    port == I8042_PORT || port == I8042_PORT + I8042_COMMAND
}

/// Ranges in ascending order, none of which overlap.
struct MmioTable(Vec<MmioRange>);

impl MmioTable {
    fn new(mut ranges: Vec<MmioRange>) -> Self {
        ranges.sort_by_key(|range| range.start);
        let apart = |pair: &[MmioRange]| pair[0].start + pair[0].len <= pair[1].start;
        assert!(ranges.windows(2).all(apart), "two devices share registers");
        MmioTable(ranges)
    }

    /// The device that has all of the `len` bytes at `address`, and their offset in it.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn MmioDevice, u64)> {
        let behind = self.0.partition_point(|range| range.start <= address);
        let range = &self.0[behind.checked_sub(1)?];
        let offset = address - range.start;
        let end = offset.checked_add(len as u64)?;
        (end <= range.len).then_some((&*range.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Number(u8);

    impl MmioDevice for Number {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }

        fn write(&self, _: u64, _: &[u8]) -> WriteEffect {
            WriteEffect::Nothing
        }
    }

    #[test]
    fn an_address_finds_the_one_device_that_has_all_of_it() {
        let range = |start, len, number| MmioRange {
            start,
            len,
            device: Arc::new(Number(number)),
        };
        let table = MmioTable::new(vec![range(0x3000, 0x10, 40), range(0x1000, 0x200, 20)]);
        let at = |address, len| {
            let (device, offset) = table.find(address, len)?;
            let mut byte = [0];
            device.read(offset, &mut byte);
            Some(byte[0])
        };
        assert_eq!(at(0x1000, 4), Some(20));
        assert_eq!(at(0x1008, 8), Some(28));
        assert_eq!(at(0x300c, 4), Some(52));
        for (address, len) in [
            (0xfff, 1),
            (0x11fe, 4),
            (0x1200, 1),
            (0x2000, 4),
            (0x3010, 1),
        ] {
            assert_eq!(at(address, len), None, "{address:#x}");
        }
        assert_eq!(at(u64::MAX, 8), None);
    }
}
