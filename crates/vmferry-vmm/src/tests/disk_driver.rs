//! A driver of a machine's first disk, which works its rings in guest memory from outside: the guest takes no notice.

use vm_memory::{Bytes, GuestAddress};

use super::{Machine, RINGS, start_device, u32_at, wait_for};

/// Kinds of requests, and the statuses of virtio (1.2, section 5.2.6).
pub(super) const READ: u32 = 0;
pub(super) const WRITE: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const OK: u8 = 0;

/// The feature of a device that can be flushed.
const FEATURE_FLUSH: u32 = 1 << 9;
/// Where the request is, and its data.
const REQUEST: u64 = 0x50_0000;
const STATUS: u64 = REQUEST + 0x100;
const DATA: u64 = REQUEST + 0x1000;

/// Knows how many requests it has made.
pub(super) struct DiskDriver {
    requests: u16,
}

impl DiskDriver {
    /// Starts the device. Each of its requests moves a sector.
    pub fn start(machine: &Machine) -> Self {
        start_device(machine, FEATURE_FLUSH, 0);
        DiskDriver { requests: 0 }
    }

    pub fn write(&mut self, machine: &Machine, sector: u64, data: [u8; 512]) -> u8 {
        self.request(machine, WRITE, sector, data)
    }

    pub fn read(&mut self, machine: &Machine, sector: u64) -> (u8, [u8; 512]) {
        let status = self.request(machine, READ, sector, [0; 512]);
        let mut data = [0; 512];
        let memory = &machine.ram.memory;
        memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        (status, data)
    }

    pub fn flush(&mut self, machine: &Machine) -> u8 {
        self.request(machine, FLUSH, 0, [0; 512])
    }

    /// Has a request served. Returns its status.
    pub fn request(&mut self, machine: &Machine, kind: u32, sector: u64, data: [u8; 512]) -> u8 {
        self.offer(machine, kind, sector, data);
        self.finish(machine)
    }

    /// Offers a request.
    pub fn offer(&mut self, machine: &Machine, kind: u32, sector: u64, data: [u8; 512]) {
        const NEXT: u16 = 1;
        const TO_GUEST: u16 = 2;
        let memory = &machine.ram.memory;
        let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
        put(REQUEST, &kind.to_le_bytes());
        put(REQUEST + 8, &sector.to_le_bytes());
        put(DATA, &data);
        put(STATUS, &[0xee]);
        let data_flags = match kind {
            READ => NEXT | TO_GUEST,
            _ => NEXT,
        };
        let mut table = vec![(REQUEST, 16_u32, NEXT), (DATA, 512, data_flags)];
        if kind == FLUSH {
            table.pop();
        }
        table.push((STATUS, 1, TO_GUEST));
        for (index, (address, len, flags)) in (0..).zip(table) {
            let at = RINGS + 16 * index;
            put(at, &address.to_le_bytes());
            put(at + 8, &len.to_le_bytes());
            put(at + 12, &flags.to_le_bytes());
            put(at + 14, &(index as u16 + 1).to_le_bytes());
        }
        // All requests are the chain at 0, so the available ring needs no entries.
        self.requests = self.requests.wrapping_add(1);
        put(RINGS + 0x1002, &self.requests.to_le_bytes());
        machine.devices.slots()[0].kick_all();
    }

    /// Waits for the request's answer. Returns its status.
    pub fn finish(&self, machine: &Machine) -> u8 {
        wait_for("the disk's answer", || self.is_answered(machine));
        let status = GuestAddress(STATUS);
        machine.ram.memory.read_obj(status).unwrap()
    }

    /// Whether the last request has been answered.
    pub fn is_answered(&self, machine: &Machine) -> bool {
        (u32_at(machine, RINGS + 0x2000) >> 16) as u16 == self.requests
    }
}
