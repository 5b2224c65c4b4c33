//! The serial port: a 16550 whose bytes go to and come from a back end.

use std::io;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, BackendEvents, GuestEnd, Input, Outbox};
use crate::config::SerialConfig;
use crate::error::MachineError;
use crate::layout::SERIAL_PORT;

/// Registers of the port.
const REGISTERS: u16 = 8;

/// The port's interrupt line, an event that KVM listens to.
#[derive(Clone)]
pub(crate) struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Deref for Interrupt {
    type Target = EventFd;

    fn deref(&self) -> &EventFd {
        &self.0
    }
}

/// Tells the back end when the guest has read everything.
pub(super) struct Drained(Arc<Outbox>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.wake();
    }
}

type Uart = Serial<Interrupt, Drained, GuestEnd>;

/// The serial port.
pub(crate) struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    interrupt: Interrupt,
    outbox: Arc<Outbox>,
    _backend: Backend,
}

/// The back end's way to the guest.
struct ToUart(Arc<Mutex<Uart>>);

impl ToUart {
    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.0.lock().expect("the device does not panic")
    }
}

impl Input for ToUart {
    fn room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    fn add(&self, bytes: &[u8]) -> usize {
        // An error means that the FIFO is full or the port is in loopback mode: nothing was taken.
        self.lock().enqueue_raw_bytes(bytes).unwrap_or(0)
    }
}

impl SerialPort {
    /// The port with its back end at work. `events` learns what the back end's user does.
    pub fn new(config: &SerialConfig, events: BackendEvents) -> Result<Self, MachineError> {
        let failed = |source| MachineError::Os {
            action: "create the serial port's events".into(),
            source,
        };
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
        let interrupt = Interrupt(Arc::new(interrupt));
        let outbox = Arc::new(Outbox::new().map_err(failed)?);
        let uart = Uart::with_events(
            interrupt.clone(),
            Drained(outbox.clone()),
            GuestEnd(outbox.clone()),
        );
        let uart = Arc::new(Mutex::new(uart));
        let input = Box::new(ToUart(uart.clone()));
        let backend = Backend::start("serial port", config, outbox.clone(), input, events)?;
        Ok(SerialPort {
            uart,
            interrupt,
            outbox,
            _backend: backend,
        })
    }

    /// Whether `port` is one of the serial port's registers.
    pub fn has(port: u16) -> bool {
        (SERIAL_PORT..SERIAL_PORT + REGISTERS).contains(&port)
    }

    /// What KVM should listen to for the port's interrupt.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().expect("the device does not panic")
    }

    pub fn read(&self, register: u8, data: &mut [u8]) {
        let mut uart = self.uart();
        data.fill_with(|| uart.read(register));
    }

    pub fn write(&self, register: u8, data: &[u8]) {
        let mut uart = self.uart();
        for byte in data {
            if let Err(error) = uart.write(register, *byte) {
                tracing::warn!(%error, "the serial port could not serve a write");
            }
        }
    }

    /// Whether input reaches the guest. While it stands still, input waits outside, so that a guest which
    /// leaves has lost none.
    pub fn accept_input(&self, accept: bool) {
        self.outbox.accept_input(accept);
    }

    /// The port's registers and what it has not yet handed to the guest.
    pub fn state(&self) -> SerialState {
        self.uart().state()
    }

    /// Puts the port into a saved state. An interrupt that was pending is raised again: it may have been on
    /// its way when the interrupt controllers were saved.
    pub fn set_state(&self, state: &SerialState) -> Result<(), MachineError> {
        let mut uart = self.uart();
        let restored = Uart::from_state(
            state,
            self.interrupt.clone(),
            Drained(self.outbox.clone()),
            GuestEnd(self.outbox.clone()),
        )
        .map_err(|e| MachineError::Misfit(format!("the serial port refused its state: {e}")))?;
        *uart = restored;
        Ok(())
    }
}
