//! virtio-console: one port, which leads where serial ports can lead, too.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

use super::{Broken, Kicks, Kind, Requests, VirtioDevice, signal};
use crate::config::SerialConfig;
use crate::devices::{Backend, BackendEvents, GuestEnd, Input, Outbox};
use crate::error::MachineError;

/// The queue for bytes to the guest.
const RECEIVE: usize = 0;
const QUEUE_SIZES: &[u16] = &[64, 64];
/// Input that may wait for the guest.
const INBOX_BYTES: usize = 4096;
/// The most that one request may say; no back end would take more at once.
const MOST_OUTPUT: u64 = 1 << 20;
/// Bytes copied at once from the guest.
const CHUNK: usize = 4096;

/// Input that the guest has not taken.
#[derive(Default)]
struct Inbox(Mutex<VecDeque<u8>>);

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.lock().expect("no holder of the inbox panics")
    }
}

/// The back end's way to the guest.
struct ToInbox {
    inbox: Arc<Inbox>,
    kick: Arc<EventFd>,
}

impl Input for ToInbox {
    fn room(&self) -> usize {
        INBOX_BYTES.saturating_sub(self.inbox.lock().len())
    }

    fn add(&self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        self.inbox.lock().extend(&bytes[..taken]);
        if taken > 0 {
            signal(&self.kick);
        }
        taken
    }
}

/// Says whether the back end may hand input over: not while the guest stands still, so that a guest which leaves has
/// lost none.
pub(crate) struct InputGate(Arc<Outbox>);

impl InputGate {
    pub fn accept_input(&self, accept: bool) {
        self.0.accept_input(accept);
    }
}

/// The device.
pub(crate) struct Console {
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    _backend: Backend,
}

impl Console {
    /// Queues of the device.
    pub const QUEUES: usize = QUEUE_SIZES.len();

    /// The console with its back end at work. `events` learns what the back end's user does.
    pub fn new(
        config: &SerialConfig,
        kicks: &Kicks,
        events: BackendEvents,
    ) -> Result<(Self, InputGate), MachineError> {
        let outbox = Arc::new(Outbox::new().map_err(|source| MachineError::Os {
            action: "create the console's events".into(),
            source,
        })?);
        let inbox = Arc::new(Inbox::default());
        let input = Box::new(ToInbox {
            inbox: inbox.clone(),
            kick: kicks.of(RECEIVE),
        });
        let backend = Backend::start("console", config, outbox.clone(), input, events)?;
        let console = Console {
            inbox,
            outbox: outbox.clone(),
            _backend: backend,
        };
        Ok((console, InputGate(outbox)))
    }

    fn give_input(&self, requests: &mut Requests<'_>) -> Result<(), Broken> {
        loop {
            let mut inbox = self.inbox.lock();
            if inbox.is_empty() {
                return Ok(());
            }
            let Some(chain) = requests.next()? else {
                return Ok(());
            };
            if chain.writable.len() == 0 {
                return Err(chain.short("input"));
            }
            let given = chain
                .writable
                .write(requests.memory, 0, inbox.make_contiguous());
            inbox.drain(..given);
            drop(inbox);
            self.outbox.wake();
            requests.complete(&chain, given as u32)?;
        }
    }

    fn take_output(&self, requests: &mut Requests<'_>) -> Result<(), Broken> {
        while let Some(chain) = requests.next()? {
            let mut bytes = [0; CHUNK];
            let mut offset = 0;
            while offset < MOST_OUTPUT {
                let len = chain.readable.read(requests.memory, offset, &mut bytes);
                if len == 0 {
                    break;
                }
                // Never fails and never waits: what finds no room is dropped, as on a serial line.
                let _ = GuestEnd(self.outbox.clone()).write(&bytes[..len]);
                offset += len as u64;
            }
            requests.complete(&chain, 0)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn serve(&mut self, index: usize, requests: &mut Requests<'_>) -> Result<(), Broken> {
        match index {
            RECEIVE => self.give_input(requests),
            _ => self.take_output(requests),
        }
    }

    /// Input that the guest has not taken goes with it.
    fn save(&self) -> Vec<u8> {
        self.inbox.lock().iter().copied().collect()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        if state.len() > INBOX_BYTES {
            return Err(MachineError::Misfit(format!(
                "it has {} bytes of input, {INBOX_BYTES} are possible",
                state.len()
            )));
        }
        *self.inbox.lock() = state.to_vec().into();
        Ok(())
    }
}
