//! virtio-net: an interface in a network of the host.
//!
//! Frames pass one after the other through the device's thread. With a TAP interface, checksums and segmentation are
//! left to the host's kernel, in both directions; its headers are virtio's own. A frame that has come and finds no room
//! stays here, and those behind it with the host, until the driver offers room.
//!
//! Nothing of it has to go with a guest that migrates: a network may lose frames. The interface announces itself where
//! the guest has arrived, so that frames find their way there.

use virtio_bindings::virtio_net as net;

use super::{Broken, Chain, Kind, Requests, VirtioDevice, Watch};
use crate::config::{MacAddress, NetBackend};
use crate::error::MachineError;

mod announce;
mod datagram;
mod link;
mod stream;
mod tap;

pub use announce::Announcement;
pub(crate) use announce::Announcer;
use announce::rarp;
use datagram::Datagram;
use link::{Frame, Link, MOST_FRAME};
use stream::Stream;
use tap::Tap;

/// The queue for frames to the guest.
const RECEIVE: usize = 0;
/// The queue for frames from the guest.
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE; 2];

/// How many frames that came for the driver before are thrown away. A TAP interface keeps 500 or 1000.
const MOST_STALE: u32 = 1024;

/// Bytes of the header before each frame, and where in it the number of buffers is.
const HEADER: usize = 12;
const BUFFER_COUNT: std::ops::Range<usize> = 10..12;

/// What a link with offloads adds.
const OFFLOADS: u64 = 1 << net::VIRTIO_NET_F_CSUM
    | 1 << net::VIRTIO_NET_F_HOST_TSO4
    | 1 << net::VIRTIO_NET_F_HOST_TSO6
    | 1 << net::VIRTIO_NET_F_HOST_ECN
    | 1 << net::VIRTIO_NET_F_GUEST_CSUM
    | 1 << net::VIRTIO_NET_F_GUEST_TSO4
    | 1 << net::VIRTIO_NET_F_GUEST_TSO6
    | 1 << net::VIRTIO_NET_F_GUEST_ECN;

/// The interface.
pub(crate) struct Network {
    mac: MacAddress,
    offered: u64,
    /// What the driver has chosen.
    chosen: u64,
    link: Box<dyn Link>,
    announcer: Announcer,
    /// Whether it is time to, as soon as the link takes a frame.
    announcing: bool,
    /// The frame that has come last, until the guest has it.
    received: Frame,
    /// Whether that waits for the driver to offer room.
    starved: bool,
    /// Room for a frame that goes.
    sending: Frame,
}

/// What became of a frame.
enum Delivery {
    Done,
    /// The driver has not offered enough room, or this is not the time.
    Later,
}

impl Network {
    /// Queues of the device.
    pub const QUEUES: usize = QUEUE_SIZES.len();

    /// The interface called `id`, connected to `backend`.
    pub fn new(backend: &NetBackend, id: &str, mac: MacAddress) -> Result<Self, MachineError> {
        let announcer = Announcer::new().map_err(|source| MachineError::Os {
            action: format!("create a timer of the interface '{id}'"),
            source,
        })?;
        let offloads = if backend.offloads() { OFFLOADS } else { 0 };
        Ok(Network {
            mac,
            offered: 1 << net::VIRTIO_NET_F_MAC | 1 << net::VIRTIO_NET_F_MRG_RXBUF | offloads,
            chosen: 0,
            link: connect(backend, id)?,
            announcer,
            announcing: false,
            received: Frame::empty(),
            starved: false,
            sending: Frame::empty(),
        })
    }

    /// The machine's end of its announcements.
    pub fn announcer(&self) -> Announcer {
        self.announcer.clone()
    }

    /// Whether a frame may be put into several requests.
    fn merges(&self) -> bool {
        self.chosen & 1 << net::VIRTIO_NET_F_MRG_RXBUF != 0
    }

    fn receive(&mut self, requests: &mut Requests<'_>) -> Result<(), Broken> {
        self.starved = false;
        loop {
            if self.received.is_empty() && !self.link.receive(&mut self.received) {
                return Ok(());
            }
            match self.deliver(requests)? {
                Delivery::Done => self.received.clear(),
                Delivery::Later => {
                    self.starved = true;
                    return Ok(());
                }
            }
        }
    }

    /// Puts the frame that has come into as many requests as it takes.
    fn deliver(&mut self, requests: &mut Requests<'_>) -> Result<Delivery, Broken> {
        let len = self.received.bytes().len();
        if len <= HEADER {
            tracing::debug!(len, "what has come is no frame");
            return Ok(Delivery::Done);
        }
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < len as u64 {
            if !self.merges() && !chains.is_empty() {
                tracing::debug!(len, "a frame is larger than the room for it and is lost");
                requests.leave(chains.len() as u16);
                return Ok(Delivery::Done);
            }
            let Some(chain) = requests.next()? else {
                requests.leave(chains.len() as u16);
                return Ok(Delivery::Later);
            };
            if chain.writable.len() < HEADER as u64 {
                return Err(chain.short("a header"));
            }
            room += chain.writable.len();
            chains.push(chain);
            if chains.len() == requests.size() && room < len as u64 {
                return Err(chains[0].short("a frame, with all of its queue"));
            }
        }
        let count = chains.len() as u16;
        self.received.header_mut()[BUFFER_COUNT].copy_from_slice(&count.to_le_bytes());
        let mut rest = self.received.bytes();
        let mut done = Vec::with_capacity(chains.len());
        for chain in &chains {
            let written = chain.writable.write(requests.memory, 0, rest);
            rest = &rest[written..];
            done.push((chain, written as u32));
        }
        requests.complete_together(&done)?;
        Ok(Delivery::Done)
    }

    fn transmit(&mut self, requests: &mut Requests<'_>) -> Result<(), Broken> {
        // Asked even if nothing can be sent: a timer that nobody asks would wake this thread for ever.
        self.announcing |= self.announcer.is_due();
        while self.link.can_send() {
            if std::mem::take(&mut self.announcing) {
                self.sending.set(&rarp(self.mac));
                self.link.send(self.sending.bytes());
                continue;
            }
            let Some(chain) = requests.next()? else {
                return Ok(());
            };
            let len = chain.readable.len();
            if len < HEADER as u64 {
                return Err(chain.short("a header"));
            }
            if (HEADER as u64 + 1..=(HEADER + MOST_FRAME) as u64).contains(&len) {
                let memory = requests.memory;
                let read = |room: &mut [u8]| {
                    Ok::<_, Broken>(chain.readable.read(memory, 0, &mut room[..len as usize]))
                };
                self.sending.fill(read)?;
                self.link.send(self.sending.bytes());
            } else {
                tracing::debug!(len, "what the driver sends is no frame");
            }
            requests.complete(&chain, 0)?;
        }
        Ok(())
    }
}

/// Connects interface `id` to what `backend` names.
fn connect(backend: &NetBackend, id: &str) -> Result<Box<dyn Link>, MachineError> {
    Ok(match backend {
        NetBackend::Tap(name) => Box::new(Tap::open(name, id)?),
        NetBackend::UnixStream(path) => Box::new(Stream::connect(path, id)?),
        NetBackend::UnixDatagram { remote, local } => {
            Box::new(Datagram::open(remote, local.as_deref(), id)?)
        }
    })
}

impl VirtioDevice for Network {
    fn kind(&self) -> Kind {
        Kind::Network
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        self.mac.bytes().to_vec()
    }

    fn activate(&mut self, features: u64) {
        self.chosen = features;
        self.link.activate(features);
    }

    /// What has come was for the driver before.
    fn reset(&mut self) {
        self.chosen = 0;
        self.link.activate(0);
        for _ in 0..MOST_STALE {
            if !self.link.receive(&mut self.received) {
                break;
            }
        }
        self.received.clear();
        self.starved = false;
    }

    fn serve(&mut self, index: usize, requests: &mut Requests<'_>) -> Result<(), Broken> {
        match index {
            RECEIVE => self.receive(requests),
            _ => self.transmit(requests),
        }
    }

    fn watches(&self) -> Vec<Watch> {
        let mut watches = self.link.watches(!self.starved);
        watches.push(Watch {
            fd: self.announcer.timer().fd(),
            events: libc::POLLIN,
            queue: TRANSMIT,
        });
        watches
    }
}
