//! What the guest finds beside RAM and KVM's own devices.

mod backend;
mod bus;
mod serial;
mod terminal;

pub(crate) use bus::Bus;
pub(crate) use serial::SerialPort;
