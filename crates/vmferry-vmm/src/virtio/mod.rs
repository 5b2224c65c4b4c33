//! Virtio devices behind virtio-mmio (virtio 1.2, section 4.2).
//!
//! | module | idea |
//! |---|---|
//! | `queue`, `chain` | what the driver offers, checked before anything trusts it |
//! | `transport` | the registers of a slot and the device's life: reset, negotiation, running, broken |
//! | `slot` | a transport with its eventfds: what KVM and the device's thread hold of it |
//! | `threads` | one thread a device, and the gate that holds them all |
//! | `rng`, `console`, `blk`, `net`, `balloon` | devices |
//!
//! # Who may do what
//!
//! A device's state, its queues and their rings are behind one mutex: a vCPU takes it to read or write a register
//! (except those of the interrupt), the device's thread while it serves a batch of requests. A device may have requests
//! in flight, with the host, while nobody holds the mutex. Its thread does not come to the gate before they are given
//! back: while the machine stands still, all device threads wait there, and a request is either complete or still
//! in its ring. Nothing is in flight, so nothing in flight has to be saved. (The balloon keeps one request by design,
//! and saves it.)
//!
//! # Trust
//!
//! The driver is hostile. Every chain of descriptors is copied out of guest memory once and checked as a whole; a
//! device sees buffers that lie in RAM. What breaks the rules is [`Broken`]: the device says DEVICE_NEEDS_RESET and
//! stops, and nobody else notices. The same holds for state that comes from a stream.
//!
//! All guest memory is written through [`GuestMemory`](crate::memory::GuestMemory), whose log the migration reads.

mod balloon;
mod blk;
mod chain;
mod console;
#[cfg(any(test, fuzzing))]
mod driver;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod net;
mod queue;
mod rng;
mod slot;
#[cfg(test)]
mod tests;
mod threads;
mod transport;

use std::os::fd::RawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::error::MachineError;
use crate::memory::GuestMemory;

pub(crate) use balloon::{Balloon, BalloonPort};
pub use blk::DiskIo;
pub(crate) use blk::{Block, Comparison, Disk, Settled, check_raw};
pub(crate) use chain::{Broken, Chain};
pub(crate) use console::Console;
pub use net::Announcement;
pub(crate) use net::{Announcer, Network};
pub(crate) use queue::Requests;
pub(crate) use rng::Rng;
pub(crate) use threads::Devices;
pub(crate) use transport::SavedTransport;

/// What kind of device a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Block,
    Network,
    Console,
    Rng,
    Balloon,
}

impl Kind {
    /// The number that virtio has for it.
    pub fn id(self) -> u32 {
        match self {
            Kind::Block => virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK,
            Kind::Network => virtio_bindings::virtio_ids::VIRTIO_ID_NET,
            Kind::Console => virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE,
            Kind::Rng => virtio_bindings::virtio_ids::VIRTIO_ID_RNG,
            Kind::Balloon => virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON,
        }
    }

    /// Its name, for humans and threads.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Block => "virtio-blk",
            Kind::Network => "virtio-net",
            Kind::Console => "virtio-console",
            Kind::Rng => "virtio-rng",
            Kind::Balloon => "virtio-balloon",
        }
    }
}

/// A device behind a transport. All methods are called under the slot's mutex.
pub(crate) trait VirtioDevice: Send {
    fn kind(&self) -> Kind;

    /// The features that the device itself offers, beside those of the transport.
    fn features(&self) -> u64 {
        0
    }

    /// The largest size of each queue, a power of two each.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device's configuration; what lies behind its end reads as zero.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// A number that changes with the configuration.
    fn config_generation(&self) -> u32 {
        0
    }

    /// The driver writes to the configuration. Most devices have none that it may write.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let device = self.kind().name();
        tracing::debug!(device, offset, ?data, "no configuration to write");
    }

    /// The driver has chosen these features and starts to use the queues. After a migration it is called before
    /// [`load`](Self::load).
    fn activate(&mut self, _features: u64) {}

    /// Forgets the driver.
    fn reset(&mut self) {}

    /// Serves what waits in queue `index`, until there is no more or `requests` says that it is enough.
    fn serve(&mut self, index: usize, requests: &mut Requests<'_>) -> Result<(), Broken>;

    /// What the device's thread is to wait for beside its queues' kicks; asked anew before each wait, while the driver
    /// uses the device. A queue that is not set up is not served, and so its watches count for nothing.
    fn watches(&self) -> Vec<Watch> {
        Vec::new()
    }

    /// How many requests the host still works on; whenever it is done with some, the device has its queue kicked.
    /// While the machine is to stand still, [`serve`](Self::serve) finds no new ones, and gives these back.
    fn in_flight(&self) -> usize {
        0
    }

    /// The driver will not see its requests again, nor does the host any longer: waits for those in flight.
    fn abandon(&mut self, _memory: &GuestMemory) {}

    /// What the device knows beside its configuration and its queues.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Puts that back, on another host perhaps.
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        match state {
            [] => Ok(()),
            _ => Err(MachineError::Misfit(format!(
                "{} bytes of state belong to no device here",
                state.len()
            ))),
        }
    }
}

/// A descriptor that a device's thread waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    pub fd: RawFd,
    /// What makes it ready, as for `poll`.
    pub events: i16,
    /// The queue to serve when it is.
    pub queue: usize,
}

/// One event for each queue, with which KVM (for the driver) or a back end has the device's thread look at it.
#[derive(Clone)]
pub(crate) struct Kicks(Vec<Arc<EventFd>>);

impl Kicks {
    pub fn new(queues: usize) -> Result<Self, MachineError> {
        (0..queues)
            .map(|_| event().map(Arc::new))
            .collect::<Result<_, _>>()
            .map(Kicks)
    }

    /// The event of one queue.
    pub fn of(&self, queue: usize) -> Arc<EventFd> {
        self.0[queue].clone()
    }

    pub fn all(&self) -> &[Arc<EventFd>] {
        &self.0
    }
}

fn event() -> Result<EventFd, MachineError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| MachineError::Os {
        action: "create an event of a virtio device".into(),
        source,
    })
}

/// Signals an event. That can only fail when its counter is full, and then it is signalled.
fn signal(event: &EventFd) {
    let _ = event.write(1);
}
