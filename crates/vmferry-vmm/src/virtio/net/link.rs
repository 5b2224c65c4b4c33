//! What an interface is connected to, as the device sees it.

use std::io;
use std::os::fd::RawFd;

use super::{HEADER, RECEIVE, TRANSMIT};
use crate::virtio::Watch;

/// The largest frame, without its header: the largest IP packet in an Ethernet frame with a VLAN tag.
pub(super) const MOST_FRAME: usize = 65_535 + 18;

/// A frame behind its virtio header.
pub(super) struct Frame {
    room: Box<[u8]>,
    len: usize,
}

impl Frame {
    /// No frame, and room for one.
    pub fn empty() -> Self {
        Frame {
            room: vec![0; HEADER + MOST_FRAME].into(),
            len: 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Header and frame.
    pub fn bytes(&self) -> &[u8] {
        &self.room[..self.len]
    }

    pub fn header_mut(&mut self) -> &mut [u8] {
        &mut self.room[..HEADER]
    }

    /// Lets `fill` write header and frame, and say how long they are.
    pub fn fill<E>(&mut self, fill: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<(), E> {
        self.len = fill(&mut self.room)?;
        Ok(())
    }

    /// Makes it this frame, with a header that asks for nothing.
    pub fn set(&mut self, frame: &[u8]) {
        self.len = HEADER + frame.len();
        self.room[..HEADER].fill(0);
        self.room[HEADER..self.len].copy_from_slice(frame);
    }
}

/// A connection to a network. Nothing here waits, and a frame that cannot be moved is lost, as on any network.
pub(super) trait Link: Send {
    /// Leaves to the link what these features of virtio stand for.
    fn activate(&mut self, _features: u64) {}

    /// Gets the next frame that has come; whether there was one.
    fn receive(&mut self, frame: &mut Frame) -> bool;

    /// Whether [`send`](Self::send) would take a frame now. If not, one of [`watches`](Self::watches) tells when.
    fn can_send(&mut self) -> bool {
        true
    }

    /// Sends a frame behind its header.
    fn send(&mut self, frame: &[u8]);

    /// What to wait for; frames only if they are `wanted`.
    fn watches(&self, wanted: bool) -> Vec<Watch>;
}

/// A watch for frames that come.
pub(super) fn incoming(fd: RawFd) -> Watch {
    Watch {
        fd,
        events: libc::POLLIN,
        queue: RECEIVE,
    }
}

/// A watch for room for frames that go.
pub(super) fn outgoing(fd: RawFd) -> Watch {
    Watch {
        fd,
        events: libc::POLLOUT,
        queue: TRANSMIT,
    }
}

/// Whether there is just nothing to do now.
pub(super) fn must_wait(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
