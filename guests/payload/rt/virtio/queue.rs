//! A split virtqueue (virtio 1.2, section 2.7) whose requests have one buffer each.

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Requests that can be under way at a time.
pub const SIZE: usize = 128;

/// The buffer is one for the device to write to.
const WRITE: u16 = 2;
/// In the available ring: the driver looks for itself, without an interrupt.
const NO_INTERRUPT: u16 = 1;
/// In the used ring: the device looks for itself, without a notification.
const NO_NOTIFY: u16 = 1;

#[repr(C)]
struct Descriptor {
    address: AtomicU64,
    len: AtomicU32,
    flags: AtomicU16,
    next: AtomicU16,
}

#[repr(C)]
struct Available {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [AtomicU16; SIZE],
}

#[repr(C)]
struct UsedElement {
    id: AtomicU32,
    len: AtomicU32,
}

#[repr(C)]
struct Used {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [UsedElement; SIZE],
}

/// What driver and device share of a queue. Its address is the same for both: memory is mapped identically.
#[repr(C, align(4096))]
pub struct Rings {
    descriptors: [Descriptor; SIZE],
    available: Available,
    used: Used,
    /// For each descriptor a buffer of one word, for requests that need no more.
    words: [AtomicU32; SIZE],
}

impl Rings {
    /// Nothing in them.
    pub const fn new() -> Self {
        Self {
            descriptors: [const {
                Descriptor {
                    address: AtomicU64::new(0),
                    len: AtomicU32::new(0),
                    flags: AtomicU16::new(0),
                    next: AtomicU16::new(0),
                }
            }; SIZE],
            available: Available {
                flags: AtomicU16::new(NO_INTERRUPT),
                index: AtomicU16::new(0),
                ring: [const { AtomicU16::new(0) }; SIZE],
            },
            used: Used {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                ring: [const {
                    UsedElement {
                        id: AtomicU32::new(0),
                        len: AtomicU32::new(0),
                    }
                }; SIZE],
            },
            words: [const { AtomicU32::new(0) }; SIZE],
        }
    }

    /// Where the descriptors, the available ring and the used ring are.
    pub fn addresses(&self) -> [u64; 3] {
        [
            &raw const self.descriptors as u64,
            &raw const self.available as u64,
            &raw const self.used as u64,
        ]
    }
}

/// The driver's side of a queue.
pub struct Queue {
    rings: &'static Rings,
    /// Descriptors that are not under way: the first `room` ones of this list.
    free: [u16; SIZE],
    room: usize,
    /// Requests made so far, as the rings count them.
    made: u16,
    /// Requests that came back so far.
    back: u16,
}

impl Queue {
    /// An empty queue. The rings belong to it alone.
    pub fn new(rings: &'static Rings) -> Self {
        Self {
            rings,
            free: core::array::from_fn(|index| index as u16),
            room: SIZE,
            made: 0,
            back: 0,
        }
    }

    /// How many more requests can be made, after a look at those that came back.
    pub fn room(&mut self) -> usize {
        let used = &self.rings.used;
        while self.back != used.index.load(Ordering::Acquire) {
            let id = used.ring[usize::from(self.back) % SIZE]
                .id
                .load(Ordering::Relaxed);
            self.free[self.room] = id as u16;
            self.room += 1;
            self.back = self.back.wrapping_add(1);
        }
        self.room
    }

    /// Makes a request: a buffer of one little-endian word for the device to read. There must be room for it.
    pub fn tell(&mut self, word: u32) {
        let id = self.take();
        let buffer = &self.rings.words[usize::from(id)];
        buffer.store(word.to_le(), Ordering::Relaxed);
        self.put(id, &raw const *buffer as u64, size_of::<u32>() as u32, 0);
    }

    /// Makes a request: `len` bytes at `address` for the device to write to. There must be room for it.
    ///
    /// # Safety
    ///
    /// If the device does write to this memory, nobody else minds.
    pub unsafe fn offer(&mut self, address: u64, len: u32) {
        let id = self.take();
        self.put(id, address, len, WRITE);
    }

    /// Whether the device wants to be notified of what was put in so far.
    pub fn wants_notification(&self) -> bool {
        self.rings.used.flags.load(Ordering::Relaxed) & NO_NOTIFY == 0
    }

    fn take(&mut self) -> u16 {
        self.room -= 1;
        self.free[self.room]
    }

    fn put(&mut self, id: u16, address: u64, len: u32, flags: u16) {
        let descriptor = &self.rings.descriptors[usize::from(id)];
        descriptor.address.store(address, Ordering::Relaxed);
        descriptor.len.store(len, Ordering::Relaxed);
        descriptor.flags.store(flags, Ordering::Relaxed);
        let available = &self.rings.available;
        available.ring[usize::from(self.made) % SIZE].store(id, Ordering::Relaxed);
        self.made = self.made.wrapping_add(1);
        available.index.store(self.made, Ordering::Release);
        // What comes after the request (a look at whether to notify; a write to the page that was offered) does come
        // after it.
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the device finds: address, length and flags of each request since `from`.
    fn requests(rings: &Rings, from: u16) -> Vec<(u16, u64, u32, u16)> {
        let available = &rings.available;
        (from..available.index.load(Ordering::Acquire))
            .map(|index| {
                let id = available.ring[usize::from(index) % SIZE].load(Ordering::Relaxed);
                let descriptor = &rings.descriptors[usize::from(id)];
                (
                    id,
                    descriptor.address.load(Ordering::Relaxed),
                    descriptor.len.load(Ordering::Relaxed),
                    descriptor.flags.load(Ordering::Relaxed),
                )
            })
            .collect()
    }

    /// The device gives a request back.
    fn give_back(rings: &Rings, id: u16) {
        let index = rings.used.index.load(Ordering::Relaxed);
        let element = &rings.used.ring[usize::from(index) % SIZE];
        element.id.store(id.into(), Ordering::Relaxed);
        rings.used.index.store(index + 1, Ordering::Release);
    }

    #[test]
    fn requests_come_and_go() {
        static RINGS: Rings = Rings::new();
        let mut queue = Queue::new(&RINGS);
        let mut seen = 0;
        for round in 0..3 * SIZE as u16 {
            assert_eq!(queue.room(), SIZE);
            queue.tell(u32::from(round));
            // SAFETY: nobody writes there.
            unsafe { queue.offer(0x1000, 4096) };
            let made = requests(&RINGS, seen);
            let [(word, at, 4, 0), (page, 0x1000, 4096, WRITE)] = made[..] else {
                panic!("{made:?}")
            };
            let buffer = &RINGS.words[usize::from(word)];
            assert_eq!(at, &raw const *buffer as u64);
            assert_eq!(buffer.load(Ordering::Relaxed), u32::from(round));
            assert_eq!(queue.room(), SIZE - 2);
            // In another order than they came.
            give_back(&RINGS, page);
            give_back(&RINGS, word);
            seen += 2;
        }
    }

    #[test]
    fn no_descriptor_is_used_twice_at_a_time() {
        static RINGS: Rings = Rings::new();
        let mut queue = Queue::new(&RINGS);
        (0..SIZE as u32).for_each(|word| queue.tell(word));
        assert_eq!(queue.room(), 0);
        let mut ids: Vec<u16> = requests(&RINGS, 0)
            .iter()
            .map(|request| request.0)
            .collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..SIZE as u16));
        give_back(&RINGS, 77);
        assert_eq!(queue.room(), 1);
        queue.tell(0);
        assert_eq!(requests(&RINGS, SIZE as u16)[0].0, 77);
        assert!(queue.wants_notification());
        RINGS.used.flags.store(NO_NOTIFY, Ordering::Relaxed);
        assert!(!queue.wants_notification());
    }
}
