//! A queue and what its device does with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Broken, Chain};
use super::signal;
use crate::error::MachineError;
use crate::memory::GuestMemory;
use crate::vcpu::Gate;

/// Bytes of a used ring before its entries, and of an entry.
const USED_RING: u64 = 4;
const USED_ENTRY: u64 = 8;

/// A device's interrupt line and the register that says why it was raised.
pub(crate) struct Interrupt {
    status: AtomicU32,
    line: Arc<EventFd>,
}

impl Interrupt {
    pub fn new(line: Arc<EventFd>) -> Self {
        Interrupt {
            status: AtomicU32::new(0),
            line,
        }
    }

    /// What KVM should listen to.
    pub fn line(&self) -> &Arc<EventFd> {
        &self.line
    }

    /// There is something in a used ring.
    pub fn used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The device's status or configuration has changed.
    pub fn config(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, why: u32) {
        // The driver reads the register at the interrupt, so it comes first.
        self.status.fetch_or(why, Ordering::AcqRel);
        signal(&self.line);
    }

    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The driver has seen these reasons.
    pub fn acknowledge(&self, why: u32) {
        self.status.fetch_and(!why, Ordering::AcqRel);
    }

    /// Puts the line into a saved state. An interrupt that may have been on its way is raised again: one too many
    /// does no harm, one too few hangs the driver.
    pub fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::Release);
        if status != 0 {
            signal(&self.line);
        }
    }
}

/// What a device may do with one of its queues.
pub(crate) struct Requests<'a> {
    pub memory: &'a GuestMemory,
    queue: &'a mut Queue,
    interrupt: &'a Interrupt,
    gate: &'a Gate,
    /// How many requests may be served before somebody else has a turn.
    left: u16,
    /// Whether requests were put back that the driver has not been told of.
    unannounced: bool,
}

impl<'a> Requests<'a> {
    pub fn new(
        memory: &'a GuestMemory,
        queue: &'a mut Queue,
        interrupt: &'a Interrupt,
        gate: &'a Gate,
    ) -> Self {
        let left = queue.size();
        Requests {
            memory,
            queue,
            interrupt,
            gate,
            left,
            unannounced: false,
        }
    }

    /// How many buffers the queue can hold.
    pub fn size(&self) -> usize {
        self.queue.size().into()
    }

    /// The next request. None when there are no more, when the machine is to stand still, or when this queue has had
    /// its share; what is left then waits in the ring (see [`more`](Self::more)).
    pub fn next(&mut self) -> Result<Option<Chain>, Broken> {
        loop {
            if self.left == 0 || !self.gate.is_open() {
                return Ok(None);
            }
            self.queue.disable_notification(self.memory)?;
            let limit = self.queue.size();
            if let Some(chain) = self.queue.iter(self.memory)?.next() {
                self.left -= 1;
                return Chain::check(chain, self.memory, limit).map(Some);
            }
            // The driver may have added one just before it was asked to kick again.
            if !self.queue.enable_notification(self.memory)? {
                return Ok(None);
            }
        }
    }

    /// Gives a request back to the driver, with the number of bytes written to it.
    pub fn complete(&mut self, chain: &Chain, written: u32) -> Result<(), Broken> {
        self.give_back(chain.head(), written)
    }

    /// Gives a request back that the device has kept, by its name in the rings.
    pub fn give_back(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.put_back(head, written)?;
        self.announce()
    }

    /// Gives a request back without a word to the driver, which [`announce`](Self::announce) says for many of them.
    pub fn put_back(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.queue.add_used(self.memory, head, written)?;
        self.unannounced = true;
        Ok(())
    }

    /// Tells the driver of what was put back, if anything was and the driver wants to know.
    pub fn announce(&mut self) -> Result<(), Broken> {
        if std::mem::take(&mut self.unannounced) && self.queue.needs_notification(self.memory)? {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Gives requests back that the driver must find together or not at all, each with the number of bytes written to it.
    pub fn complete_together(&mut self, done: &[(&Chain, u32)]) -> Result<(), Broken> {
        let Some(((last, written), others)) = done.split_last() else {
            return Ok(());
        };
        if others.is_empty() {
            return self.complete(last, *written);
        }
        // The ring's entries first, but for the last, whose publication is that of all.
        for (chain, written) in others {
            let next = self.queue.next_used();
            let entry = u64::from(next % self.queue.size()) * USED_ENTRY;
            let at = GuestAddress(self.queue.used_ring() + USED_RING + entry);
            let element = [u32::from(chain.head()), *written].map(u32::to_le_bytes);
            self.memory
                .write_slice(element.as_flattened(), at)
                .map_err(virtio_queue::Error::GuestMemory)?;
            self.queue.set_next_used(next.wrapping_add(1));
        }
        self.queue.add_used(self.memory, last.head(), *written)?;
        // It takes notice of the last entry only: an interrupt too many does no harm.
        self.queue.needs_notification(self.memory)?;
        self.interrupt.used();
        Ok(())
    }

    /// Leaves the last `count` requests in the ring: they will be the next ones again.
    pub fn leave(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Whether the queue has had its share and may hold more.
    pub fn more(&self) -> bool {
        self.left == 0
    }
}

/// A queue in the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedQueue {
    size: u16,
    ready: bool,
    next_avail: u16,
    next_used: u16,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl SavedQueue {
    pub fn save(queue: &Queue) -> Self {
        let state = queue.state();
        SavedQueue {
            size: state.size,
            ready: state.ready,
            next_avail: state.next_avail,
            next_used: state.next_used,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }

    /// The queue again, if it is one that a driver can set up.
    pub fn restore(
        &self,
        max_size: u16,
        event_idx: bool,
        memory: &GuestMemory,
    ) -> Result<Queue, MachineError> {
        let state = QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        };
        let refuse = |why: String| MachineError::Misfit(format!("a queue cannot be: {why}"));
        let queue = Queue::try_from(state).map_err(|e| refuse(e.to_string()))?;
        if queue.ready() && !queue.is_valid(memory) {
            return Err(refuse("its rings are not in RAM".into()));
        }
        Ok(queue)
    }
}
