//! The registers of a virtio-mmio slot (virtio 1.2, section 4.2.2). Reading or writing one is an exit to the VMM, which
//! takes tens of microseconds; a notification that the VMM has given to the kernel, a few.

use super::queue::{Rings, SIZE};

/// The 2 MiB page of memory with the slots, which `entry.s` maps.
pub const MAPPED: usize = 0xfea0_0000;
/// The slots, as QEMU's `microvm` has them.
const FIRST_SLOT: usize = 0xfeb0_0000;
const SLOT_BYTES: usize = 512;
const SLOTS: usize = 24;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// VIRTIO_F_VERSION_1
const VERSION_1: u64 = 1 << 32;

const MAGIC_VALUE: usize = 0x00;
const DEVICE_VERSION: usize = 0x04;
const DEVICE_ID: usize = 0x08;
const DEVICE_FEATURES: usize = 0x10;
const DEVICE_FEATURES_SEL: usize = 0x14;
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SEL: usize = 0x24;
const QUEUE_SEL: usize = 0x30;
const QUEUE_NUM_MAX: usize = 0x34;
const QUEUE_NUM: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const STATUS: usize = 0x70;
const QUEUE_DESC: usize = 0x80;
const QUEUE_DRIVER: usize = 0x90;
const QUEUE_DEVICE: usize = 0xa0;
const CONFIG: usize = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// A device in its slot.
pub struct Device {
    base: usize,
}

impl Device {
    /// The first device of a kind, by its number (virtio 1.2, section 5). Takes it from whoever drove it before.
    pub fn find(kind: u32) -> Option<Self> {
        let mut slots = (0..SLOTS).map(|slot| Self {
            base: FIRST_SLOT + slot * SLOT_BYTES,
        });
        let device = slots.find(|slot| {
            slot.read(MAGIC_VALUE) == MAGIC
                && slot.read(DEVICE_VERSION) == VERSION
                && slot.read(DEVICE_ID) == kind
        })?;
        device.write(STATUS, 0);
        Some(device)
    }

    /// Agrees on `features`, all of which the driver needs. An error says what the device does not do.
    pub fn negotiate(&self, features: u64) -> Result<(), &'static str> {
        let features = features | VERSION_1;
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        for (half, wanted) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(DEVICE_FEATURES_SEL, half);
            if wanted & !self.read(DEVICE_FEATURES) != 0 {
                return Err("it does not offer a feature that is needed");
            }
            self.write(DRIVER_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES, wanted);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        match self.read(STATUS) & FEATURES_OK {
            0 => Err("it refuses the features that it offers"),
            _ => Ok(()),
        }
    }

    /// Gives queue `index` its rings. Comes after [`Self::negotiate`].
    pub fn set_up_queue(&self, index: u32, rings: &'static Rings) -> Result<(), &'static str> {
        self.write(QUEUE_SEL, index);
        if (self.read(QUEUE_NUM_MAX) as usize) < SIZE {
            return Err("it has no such queue, or a smaller one");
        }
        self.write(QUEUE_NUM, SIZE as u32);
        let [descriptors, available, used] = rings.addresses();
        for (register, address) in [
            (QUEUE_DESC, descriptors),
            (QUEUE_DRIVER, available),
            (QUEUE_DEVICE, used),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        match self.read(QUEUE_READY) {
            0 => Err("it refuses a queue"),
            _ => Ok(()),
        }
    }

    /// Everything is set up: the device may begin.
    pub fn begin(&self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// There is something new in queue `index`.
    pub fn notify(&self, index: u32) {
        self.write(QUEUE_NOTIFY, index);
    }

    /// Reads 32 bits of the device's configuration, at an `offset` that is a multiple of 4.
    pub fn config(&self, offset: usize) -> u32 {
        self.read(CONFIG + offset)
    }

    fn read(&self, register: usize) -> u32 {
        // SAFETY: `entry.s` maps the slots, which hold device registers and no Rust memory.
        unsafe { ((self.base + register) as *const u32).read_volatile() }
    }

    fn write(&self, register: usize, value: u32) {
        // SAFETY: as for `read`. The device writes to memory only as its queues allow it to.
        unsafe { ((self.base + register) as *mut u32).write_volatile(value) };
    }
}
