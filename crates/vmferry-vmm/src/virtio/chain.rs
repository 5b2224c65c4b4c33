//! A request as the driver describes it: buffers to read, then buffers to write.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Address, GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use crate::memory::GuestMemory;

/// How a driver has broken the rules.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// A ring cannot be used.
    #[error("the queue's rings are damaged: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The rings of a queue that is to be used are not in RAM.
    #[error("the rings of queue {0} are not in RAM")]
    NoRing(usize),
    /// A chain of descriptors has no end within the queue's size, or leads out of its table.
    #[error("the chain of descriptors at {0} has no end")]
    Endless(u16),
    /// A buffer is empty or not in RAM.
    #[error("a buffer of the chain at {head} is not in RAM: {len} bytes at {addr:#x}")]
    Buffer { head: u16, addr: u64, len: u32 },
    /// A buffer to read follows one to write.
    #[error("the chain at {0} has a buffer to read behind one to write")]
    Order(u16),
    /// A request lacks what its device needs to answer it.
    #[error("the request at {head} has no room for {what}")]
    Short { head: u16, what: &'static str },
}

/// A piece of guest memory that lies in RAM.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    addr: GuestAddress,
    len: u32,
}

/// Buffers, one after the other like a file.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    list: Vec<Buffer>,
    len: u64,
}

/// A request: what the device may read, and what it may write.
#[derive(Debug)]
pub(crate) struct Chain {
    head: u16,
    pub readable: Buffers,
    pub writable: Buffers,
}

impl Chain {
    /// Copies the descriptors of `chain` and checks them. A chain may have `limit` of them, wherever they are.
    pub fn check<M>(
        chain: DescriptorChain<M>,
        memory: &GuestMemory,
        limit: u16,
    ) -> Result<Self, Broken>
    where
        M: Deref,
        M::Target: vm_memory::GuestMemory,
    {
        let head = chain.head_index();
        let mut checked = Chain {
            head,
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        // The iterator just ends where it cannot go on: the last descriptor then promises another.
        let mut ended = false;
        for descriptor in chain.take(limit.into()) {
            let (addr, len) = (descriptor.addr(), descriptor.len());
            if len == 0 || !memory.check_range(addr, len as usize, Permissions::ReadWrite) {
                let addr = addr.raw_value();
                return Err(Broken::Buffer { head, addr, len });
            }
            if descriptor.is_write_only() {
                checked.writable.push(Buffer { addr, len });
            } else if checked.writable.list.is_empty() {
                checked.readable.push(Buffer { addr, len });
            } else {
                return Err(Broken::Order(head));
            }
            ended = !descriptor.has_next();
        }
        match ended {
            true => Ok(checked),
            false => Err(Broken::Endless(head)),
        }
    }

    /// The chain's name in the rings.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// An error of a request that has no room for `what`.
    pub fn short(&self, what: &'static str) -> Broken {
        Broken::Short {
            head: self.head,
            what,
        }
    }
}

impl Buffers {
    fn push(&mut self, buffer: Buffer) {
        self.list.push(buffer);
        self.len += u64::from(buffer.len);
    }

    /// Bytes in all of them.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where they are in guest memory: address and length of each.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        let range = |buffer: &Buffer| (buffer.addr.raw_value(), buffer.len.into());
        self.list.iter().map(range)
    }

    /// The pieces of guest memory that make up `len` bytes from `offset` on; less at the end.
    pub fn slices<'a>(
        &'a self,
        memory: &'a GuestMemory,
        offset: u64,
        len: u64,
    ) -> impl Iterator<Item = VolatileSlice<'a, impl BitmapSlice + use<'a>>> {
        let end = offset.saturating_add(len);
        let mut start = 0;
        let pieces = self.list.iter().filter_map(move |buffer| {
            let first = start;
            start += u64::from(buffer.len);
            let (from, to) = (offset.max(first), end.min(start));
            let addr = GuestAddress(buffer.addr.raw_value() + from.saturating_sub(first));
            (from < to).then(|| (addr, (to - from) as usize))
        });
        pieces.flat_map(move |(addr, len)| {
            let slices = memory.get_slices(addr, len, Permissions::ReadWrite);
            let slices = slices.expect("RAM has no translation that could fail");
            slices.map(|slice| slice.expect("the buffer was checked, and RAM stays where it is"))
        })
    }

    /// Reads from `offset` on; how many bytes there were.
    pub fn read(&self, memory: &GuestMemory, offset: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices(memory, offset, into.len() as u64) {
            done += slice.copy_to(&mut into[done..]);
        }
        done
    }

    /// Writes from `offset` on; for how many bytes there was room.
    pub fn write(&self, memory: &GuestMemory, offset: u64, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices(memory, offset, from.len() as u64) {
            let len = slice.len();
            slice.copy_from(&from[done..done + len]);
            done += len;
        }
        done
    }
}
