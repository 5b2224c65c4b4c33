//! ACPI's generic event device: how the machine tells the guest that its power button was pressed, and how the
//! guest powers the machine off or resets it.
//!
//! | offset | register |
//! |---|---|
//! | 0 | event selector, 4 bytes: a bit for each event since the last read, which clears them |
//! | 0x200 | sleep control, 1 byte |
//! | 0x201 | sleep status, 1 byte |
//! | 0x202 | reset, 1 byte |
//!
//! Places and values are those of QEMU's microvm. The guest learns them from the tables in `acpi`.

use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use super::bus::{MmioDevice, WriteEffect};
use crate::error::MachineError;

/// Bytes from the first register to the end of the last.
pub(crate) const LEN: u64 = 0x203;
pub(crate) const SELECTOR: u64 = 0;
pub(crate) const SLEEP_CONTROL: u64 = 0x200;
pub(crate) const SLEEP_STATUS: u64 = 0x201;
pub(crate) const RESET: u64 = 0x202;

/// Event: the power button was pressed.
pub(crate) const POWER_BUTTON: u32 = 1 << 1;
/// The sleep type that means power-off, as the tables' `\_S5` has it.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
/// What the guest writes to the reset register.
pub(crate) const RESET_VALUE: u8 = 0x42;

/// Sleep control: go to sleep now.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Sleep control: the sleep type is in these bits.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// The device.
pub(crate) struct EventDevice {
    selector: Mutex<u32>,
    interrupt: EventFd,
}

impl EventDevice {
    pub fn new() -> Result<Self, MachineError> {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| {
            MachineError::Os {
                action: "create the power button's event".into(),
                source,
            }
        })?;
        Ok(EventDevice {
            selector: Mutex::new(0),
            interrupt,
        })
    }

    /// What KVM should listen to for the device's interrupt.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Events that the guest has not read yet.
    pub fn selector(&self) -> u32 {
        *self.selector.lock().expect("no holder panics")
    }

    /// Puts the device into a saved state. An interrupt that may have been on its way is raised again.
    pub fn set_selector(&self, events: u32) {
        *self.selector.lock().expect("no holder panics") = events;
        if events != 0 {
            self.raise();
        }
    }

    /// Tells the guest that its power button was pressed.
    pub fn press_power_button(&self) {
        *self.selector.lock().expect("no holder panics") |= POWER_BUTTON;
        self.raise();
    }

    fn raise(&self) {
        // It can only fail when the counter is full, and then the interrupt is on its way.
        let _ = self.interrupt.write(1);
    }
}

impl MmioDevice for EventDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == SELECTOR && data.len() == 4 {
            let mut selector = self.selector.lock().expect("no holder panics");
            data.copy_from_slice(&selector.to_le_bytes());
            *selector = 0;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> WriteEffect {
        match (offset, data) {
            (SLEEP_CONTROL, [control]) if control & SLEEP_ENABLE != 0 => {
                let kind = control >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                if kind == SLEEP_TYPE_OFF {
                    return WriteEffect::PowerOff;
                }
                tracing::warn!(
                    kind,
                    "the guest asks for a sleep state that it was not offered"
                );
            }
            (RESET, [RESET_VALUE]) => return WriteEffect::Reset,
            // Guests clear the wake status before they sleep.
            (SLEEP_CONTROL | SLEEP_STATUS, [_]) => {}
            _ => tracing::debug!(offset, ?data, "write to no register of the event device"),
        }
        WriteEffect::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(device: &EventDevice) -> u32 {
        let mut data = [0xff; 4];
        device.read(SELECTOR, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_press_is_seen_once_and_survives_a_move() {
        let device = EventDevice::new().unwrap();
        assert_eq!(selector(&device), 0);
        device.press_power_button();
        assert_eq!(device.interrupt().read().unwrap(), 1);

        let there = EventDevice::new().unwrap();
        there.set_selector(device.selector());
        assert_eq!(there.interrupt().read().unwrap(), 1);
        assert_eq!(selector(&there), POWER_BUTTON);
        assert_eq!(selector(&there), 0);
        there.set_selector(0);
        assert!(
            there.interrupt().read().is_err(),
            "there is nothing to tell"
        );
    }

    #[test]
    fn only_the_right_values_power_off_and_reset() {
        let device = EventDevice::new().unwrap();
        let off = SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT;
        assert_eq!(
            device.write(SLEEP_CONTROL, &[off | SLEEP_ENABLE]),
            WriteEffect::PowerOff
        );
        assert_eq!(device.write(RESET, &[RESET_VALUE]), WriteEffect::Reset);
        for (offset, data) in [
            (SLEEP_CONTROL, &[off][..]),
            (SLEEP_CONTROL, &[1 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE]),
            (SLEEP_CONTROL, &[off | SLEEP_ENABLE, 0]),
            (SLEEP_STATUS, &[0x80]),
            (RESET, &[0]),
            (0x100, &[0x42]),
        ] {
            assert_eq!(device.write(offset, data), WriteEffect::Nothing);
        }
    }
}
