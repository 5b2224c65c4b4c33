//! What the guest finds beside RAM and KVM's own devices.

mod backend;
mod bus;
pub(crate) mod events;
mod serial;
mod terminal;

pub(crate) use backend::{Backend, BackendEvents, GuestEnd, Input, Outbox};
pub(crate) use bus::{Bus, MmioDevice, MmioRange, WriteEffect};
pub(crate) use events::EventDevice;
pub(crate) use serial::SerialPort;
