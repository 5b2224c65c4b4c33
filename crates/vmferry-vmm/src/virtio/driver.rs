//! A driver that does as it is told, for tests and for fuzzing: it works a slot's registers, and rings in guest memory.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};
use vmferry_dirty::PAGE_SIZE;

use super::slot::Slot;
use super::{Kicks, VirtioDevice, event};
use crate::devices::MmioDevice;
use crate::memory::{GuestMemory, GuestRam};
use crate::vcpu::{Gate, Wanted};

/// Where each queue's rings are; they are this far apart.
pub(super) const RINGS: u64 = 0x1_0000;
/// Where requests' buffers may be.
pub(super) const BUFFERS: u64 = 0x10_0000;
/// Size of every queue.
pub(super) const SIZE: u16 = 16;

pub(super) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
pub(super) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(super) const NEXT: u16 = VRING_DESC_F_NEXT as u16;

/// Statuses, as drivers write them.
pub(super) const ACKNOWLEDGED: u32 = 1;
pub(super) const DRIVER: u32 = 3;
pub(super) const FEATURES_OK: u32 = 0xb;
pub(super) const RUNNING: u32 = 0xf;
pub(super) const NEEDS_RESET: u32 = 0x40;

/// Where the driver has put a queue.
pub(super) struct Rings {
    pub(super) table: GuestAddress,
    pub(super) available: GuestAddress,
    pub(super) used: GuestAddress,
}

pub(super) fn rings(queue: usize) -> Rings {
    let base = RINGS * (queue as u64 + 1);
    Rings {
        table: GuestAddress(base),
        available: GuestAddress(base + 0x1000),
        used: GuestAddress(base + 0x2000),
    }
}

/// A slot with a device, and a gate that lets it work.
pub(super) struct Bench {
    pub(super) memory: GuestMemory,
    pub(super) slot: Arc<Slot>,
    pub(super) gate: Gate,
}

impl Bench {
    pub(super) fn new(ram: &GuestRam, device: Box<dyn VirtioDevice>, kicks: Kicks) -> Self {
        let memory = ram.memory.clone();
        let line = Arc::new(event().unwrap());
        let slot = Arc::new(Slot::new(device, kicks, line, memory.clone()).unwrap());
        let gate = Gate::new(1);
        gate.set(Wanted::Run);
        Bench { memory, slot, gate }
    }

    pub(super) fn read(&self, register: u32) -> u32 {
        let mut value = [0; 4];
        self.slot.read(register.into(), &mut value);
        u32::from_le_bytes(value)
    }

    pub(super) fn write(&self, register: u32, value: u32) {
        self.slot.write(register.into(), &value.to_le_bytes());
    }

    pub(super) fn status(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    pub(super) fn set_status(&self, status: u32) {
        self.write(reg::VIRTIO_MMIO_STATUS, status);
    }

    pub(super) fn offered(&self) -> u64 {
        (0..2).fold(0, |features, half| {
            self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            features | u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES)) << (32 * half)
        })
    }

    /// Resets the device and negotiates `features`, up to FEATURES_OK.
    pub(super) fn negotiate(&self, features: u64) {
        for status in [0, ACKNOWLEDGED, DRIVER] {
            self.set_status(status);
        }
        for half in 0..2 {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            let value = (features >> (32 * half)) as u32;
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, value);
        }
        self.set_status(FEATURES_OK);
    }

    /// Tells the device where the rings of `queue` are.
    pub(super) fn set_up(&self, queue: usize) {
        let rings = rings(queue);
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, SIZE.into());
        for (low, address) in [
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, rings.table),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, rings.available),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, rings.used),
        ] {
            self.write(low, address.raw_value() as u32);
            self.write(low + 4, (address.raw_value() >> 32) as u32);
        }
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(self.read(reg::VIRTIO_MMIO_QUEUE_READY), 1);
    }

    /// Brings the device up with so many queues.
    pub(super) fn start(&self, features: u64, queues: usize) {
        self.negotiate(VERSION_1 | features);
        assert_eq!(self.status(), FEATURES_OK);
        (0..queues).for_each(|queue| self.set_up(queue));
        self.set_status(RUNNING);
        assert_eq!(self.status(), RUNNING);
    }

    /// Offers a request of these buffers: address, length, flags besides NEXT.
    pub(super) fn offer(&self, queue: usize, buffers: &[(u64, u32, u16)]) {
        let last = buffers.len() - 1;
        for (index, (addr, len, flags)) in buffers.iter().enumerate() {
            let flags = flags | if index < last { NEXT } else { 0 };
            let next = index as u16 + 1;
            self.store(
                queue,
                index as u16,
                Descriptor::new(*addr, *len, flags, next),
            );
        }
        self.publish(queue, 0);
    }

    /// Writes a descriptor into the table.
    pub(super) fn store(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let at = rings(queue).table.unchecked_add(16 * u64::from(index));
        self.memory.write_obj(descriptor, at).unwrap();
    }

    /// Puts the chain at `head` into the available ring.
    pub(super) fn publish(&self, queue: usize, head: u16) {
        let available = rings(queue).available;
        let index: u16 = self.memory.read_obj(available.unchecked_add(2)).unwrap();
        let entry = available.unchecked_add(4 + 2 * u64::from(index % SIZE));
        self.memory.write_obj(head, entry).unwrap();
        let next = index.wrapping_add(1);
        self.memory
            .write_obj(next, available.unchecked_add(2))
            .unwrap();
    }

    /// Has the device look at a queue, as its thread does.
    pub(super) fn serve(&self, queue: usize) {
        self.slot.serve(queue, &self.gate);
    }

    /// The same, again and again as the device has its queue kicked, until nothing is in flight.
    pub(super) fn serve_all(&self, queue: usize) {
        self.serve(queue);
        while self.slot.in_flight() > 0 {
            self.wait_for_kick(queue);
            self.serve(queue);
        }
    }

    /// Waits until the device has its queue kicked.
    pub(super) fn wait_for_kick(&self, queue: usize) {
        /// Milliseconds; far longer than anything here takes.
        const PATIENCE: i32 = 20_000;
        let kick = self.slot.kicks().of(queue);
        let mut entry = libc::pollfd {
            fd: kick.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, which poll fills in.
        let ready = unsafe { libc::poll(&mut entry, 1, PATIENCE) };
        assert_eq!(ready, 1, "no kick");
        kick.read().unwrap();
    }

    /// How many requests the device has given back, and the length of the last.
    pub(super) fn used(&self, queue: usize) -> (u16, u32) {
        let used = rings(queue).used;
        let index: u16 = self.memory.read_obj(used.unchecked_add(2)).unwrap();
        let last = u64::from(index.wrapping_sub(1) % SIZE);
        let len = self.memory.read_obj(used.unchecked_add(4 + 8 * last + 4));
        (index, len.unwrap())
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS)
    }

    pub(super) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }
}

/// The pages that the VMM has written since the last call.
pub(super) fn written(ram: &GuestRam) -> Vec<u64> {
    let mut words = vec![0; ram.blocks[0].pages().div_ceil(64)];
    ram.writes()[0].drain_into(&mut words);
    (0..ram.blocks[0].pages() as u64)
        .filter(|page| words[*page as usize / 64] >> (page % 64) & 1 == 1)
        .collect()
}

/// Whether the page of `address` is among `pages`.
pub(super) fn has(pages: &[u64], address: u64) -> bool {
    pages.contains(&(address / PAGE_SIZE as u64))
}
