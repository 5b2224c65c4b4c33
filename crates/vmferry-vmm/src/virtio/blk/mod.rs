//! virtio-blk: a raw image or a block device of the host as a disk.
//!
//! | module | idea |
//! |---|---|
//! | `request` | what a driver asks for, checked against the disk |
//! | `transfer` | bytes on their way between the disk and guest memory |
//! | `engine`, `ring` | what carries requests out: io_uring, or the device's thread itself |
//! | `disk`, `lock` | the file of the host, and who may use it |
//! | `format` | images that are not raw |
//! | `size` | what the guest knows of the disk's size, and what the image has |
//! | `stamp` | whether an image has changed since a snapshot |
//! | `flush` | what of a disk is safe, and flushes that take too long |
//!
//! # In flight
//!
//! Reads, writes and flushes are begun as they are found in the queue, and given back in the order in which the host is
//! done with them; the engine signals the queue's kick for that. There are at most as many as the queue has descriptors:
//! a driver that offers more waits. Only a running device has requests in flight: when its driver or the
//! machine ends that, the device waits for the host first, which may still be writing to guest memory.
//!
//! Discards and write-zeroes are carried out by the device's thread at once: a file system has them wait for all other I/O
//! to the file anyway, and what it cannot do is done in several steps.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as blk;

use super::{Broken, Chain, Kicks, Kind, Requests, VirtioDevice};
use crate::config::Access;
use crate::error::MachineError;
use crate::memory::GuestMemory;

mod disk;
mod engine;
mod flush;
mod format;
mod lock;
mod request;
mod ring;
mod size;
mod stamp;
mod transfer;

pub(crate) use disk::Disk;
use disk::SECTOR;
pub use engine::DiskIo;
use engine::{Done, Engine, Job, Work};
pub(crate) use flush::Settled;
pub(crate) use format::check_raw;
use request::{
    HEADER, MOST_DISCARDED, MOST_SEGMENTS, MOST_ZEROED, Refusal, Request, STATUS, Segment,
};
pub(crate) use stamp::Comparison;
use stamp::Stamp;
pub(crate) use transfer::Durability;
use transfer::{Direction, Transfer};

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];
/// The block device's only queue.
const QUEUE: usize = 0;
/// In which sectors pieces to discard should begin: those where a page of a file does.
const DISCARD_ALIGNMENT: u32 = 8;

/// A block device.
pub(crate) struct Block {
    disk: Arc<Disk>,
    engine: Box<dyn Engine>,
    /// What the driver has chosen.
    features: u64,
}

impl Block {
    /// Queues of the device.
    pub const QUEUES: usize = QUEUE_SIZES.len();

    /// A device for `disk`, with the best way to its host that there is. `kicks` are the device's.
    pub fn new(disk: Arc<Disk>, kicks: &Kicks) -> Self {
        let engine = engine::choose(&disk, QUEUE_SIZE, &kicks.of(QUEUE));
        Block {
            disk,
            engine,
            features: 0,
        }
    }

    /// A device that serves one request after the other.
    #[cfg(test)]
    pub fn synchronous(disk: Arc<Disk>) -> Self {
        Block {
            engine: Box::new(engine::Synchronous(disk.clone())),
            disk,
            features: 0,
        }
    }

    /// How requests reach the host.
    pub fn io(&self) -> DiskIo {
        self.engine.io()
    }

    /// What writes have to reach: all there is, if the driver does not flush what it wants to be safe.
    fn durability(&self) -> Durability {
        match self.features & 1 << blk::VIRTIO_BLK_F_FLUSH != 0 {
            true => Durability::Written,
            false => Durability::Safe,
        }
    }

    /// Begins a request, or answers it at once.
    fn begin(&mut self, requests: &mut Requests<'_>, chain: Chain) -> Result<(), Broken> {
        request::check_frame(&chain)?;
        let memory = requests.memory;
        let outcome = match Request::read(&chain, memory, &self.disk) {
            Ok(Request::Read { at, len }) if len > 0 => {
                let work = self.transfer(Direction::FromDisk, at, len, memory, &chain);
                return self.carry_out(requests, Job { chain, work });
            }
            Ok(Request::Write { at, len }) if len > 0 => {
                self.disk.before_write();
                let direction = Direction::ToDisk(self.durability());
                let work = self.transfer(direction, at, len, memory, &chain);
                return self.carry_out(requests, Job { chain, work });
            }
            Ok(Request::Flush) => {
                let work = Work::Flush(self.disk.covered_now());
                return self.carry_out(requests, Job { chain, work });
            }
            Ok(Request::Read { .. } | Request::Write { .. }) => Ok(()),
            Ok(Request::Id) => {
                self.tell_id(memory, &chain);
                Ok(())
            }
            Ok(Request::Discard(segments)) => self.discard(&segments),
            Ok(Request::Zero(segments)) => self.zero(&segments),
            Err(refusal) => Err(refusal),
        };
        answer(requests, &chain, outcome)?;
        requests.announce()
    }

    fn carry_out(&mut self, requests: &mut Requests<'_>, job: Job) -> Result<(), Broken> {
        if let Some(done) = self.engine.begin(job) {
            self.conclude(requests, &done)?;
        }
        requests.announce()
    }

    fn transfer(
        &self,
        direction: Direction,
        at: u64,
        len: u64,
        memory: &GuestMemory,
        chain: &Chain,
    ) -> Work {
        let aligned = self.disk.memory_alignment();
        // SAFETY: guest memory stays mapped for as long as its machine has devices (`Machine`'s order of fields), and a
        // transfer lives no longer than this device's engine.
        Work::Transfer(unsafe {
            match direction {
                Direction::FromDisk => {
                    let slices = chain.writable.slices(memory, 0, len);
                    Transfer::new(direction, at, slices, aligned)
                }
                Direction::ToDisk(_) => {
                    let slices = chain.readable.slices(memory, HEADER, len);
                    Transfer::new(direction, at, slices, aligned)
                }
            }
        })
    }

    /// Answers all requests that the host is done with, and tells the driver once.
    fn conclude_all(&mut self, requests: &mut Requests<'_>) -> Result<(), Broken> {
        while let Some(done) = self.engine.done() {
            self.conclude(requests, &done)?;
        }
        requests.announce()
    }

    fn conclude(&self, requests: &mut Requests<'_>, done: &Done) -> Result<(), Broken> {
        done.arrive(requests.memory);
        let (what, at) = match &done.job.work {
            Work::Flush(_) => ("flush", 0),
            Work::Transfer(transfer) => match transfer.direction {
                Direction::FromDisk => ("read", transfer.at()),
                Direction::ToDisk(_) => ("write", transfer.at()),
            },
        };
        let outcome = self.host(what, at, &done.outcome);
        answer(requests, &done.job.chain, outcome)
    }

    fn tell_id(&self, memory: &GuestMemory, chain: &Chain) {
        let mut id = [0; blk::VIRTIO_BLK_ID_BYTES as usize];
        let name = self.disk.id().as_bytes();
        let len = name.len().min(id.len());
        id[..len].copy_from_slice(&name[..len]);
        let len = id.len().min((chain.writable.len() - STATUS) as usize);
        chain.writable.write(memory, 0, &id[..len]);
    }

    fn discard(&self, segments: &[Segment]) -> Result<(), Refusal> {
        self.disk.before_write();
        for Segment { at, len, .. } in segments {
            self.host("discard", *at, &self.disk.discard(*at, *len))?;
        }
        self.settle()
    }

    fn zero(&self, segments: &[Segment]) -> Result<(), Refusal> {
        self.disk.before_write();
        for Segment { at, len, unmap } in segments {
            self.host("zero", *at, &self.disk.zero(*at, *len, *unmap))?;
        }
        self.settle()
    }

    /// Makes changes safe if nobody else will.
    fn settle(&self) -> Result<(), Refusal> {
        match self.durability() {
            Durability::Written => Ok(()),
            Durability::Safe => self.host("flush", 0, &self.disk.flush()),
        }
    }

    /// Reports what the host refused.
    fn host(&self, what: &str, at: u64, outcome: &io::Result<()>) -> Result<(), Refusal> {
        outcome.as_ref().map_err(|error| {
            tracing::warn!(id = self.disk.id(), at, %error, "cannot {what} the disk");
            Refusal::Error
        })?;
        Ok(())
    }
}

/// Gives a request back with its status. The driver is still to be told.
fn answer(
    requests: &mut Requests<'_>,
    chain: &Chain,
    outcome: Result<(), Refusal>,
) -> Result<(), Broken> {
    let status_at = chain.writable.len() - STATUS;
    let status = request::status(outcome);
    chain.writable.write(requests.memory, status_at, &[status]);
    // A chain has less than 4 GiB.
    requests.put_back(chain.head(), chain.writable.len() as u32)
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let always = 1 << blk::VIRTIO_BLK_F_SEG_MAX
            | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
            | 1 << blk::VIRTIO_BLK_F_FLUSH;
        let by_access = match self.disk.access() {
            Access::ReadOnly => 1 << blk::VIRTIO_BLK_F_RO,
            Access::ReadWrite => {
                1 << blk::VIRTIO_BLK_F_DISCARD | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES
            }
        };
        always | by_access
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut set = |at: usize, value: u32| {
            config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        let sectors = self.disk.sectors();
        let block_size = self.disk.block_size() as u32;
        set(0, sectors as u32);
        set(4, (sectors >> 32) as u32);
        // Of a queue's descriptors, one is the header and one the status.
        set(12, u32::from(QUEUE_SIZE) - 2);
        set(20, block_size);
        set(36, MOST_DISCARDED);
        set(40, MOST_SEGMENTS);
        set(44, DISCARD_ALIGNMENT.max(block_size / SECTOR as u32));
        set(48, MOST_ZEROED);
        set(52, MOST_SEGMENTS);
        // Write-zeroes may unmap.
        set(56, 1);
        config
    }

    /// It tells of another size.
    fn config_generation(&self) -> u32 {
        let sectors = self.disk.sectors();
        sectors as u32 ^ (sectors >> 32) as u32
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    fn reset(&mut self) {
        self.features = 0;
    }

    fn serve(&mut self, _: usize, requests: &mut Requests<'_>) -> Result<(), Broken> {
        self.conclude_all(requests)?;
        while self.engine.has_room()
            && let Some(chain) = requests.next()?
        {
            self.begin(requests, chain)?;
        }
        self.engine.submit();
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    fn abandon(&mut self, memory: &GuestMemory) {
        while self.engine.in_flight() > 0 {
            self.engine.wait();
            while let Some(done) = self.engine.done() {
                done.arrive(memory);
            }
        }
    }

    fn save(&self) -> Vec<u8> {
        let saved = SavedBlock {
            sectors: self.disk.sectors(),
            image: self.disk.stamp(),
        };
        postcard::to_stdvec(&saved).expect("there is memory for a few bytes")
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        let saved: SavedBlock = postcard::from_bytes(state)
            .map_err(|error| MachineError::Misfit(format!("its state cannot be read: {error}")))?;
        self.disk.take_size_of_guest(saved.sectors)?;
        self.disk.set_arrived_with(saved.image);
        Ok(())
    }
}

/// A disk in the stream.
#[derive(Serialize, Deserialize)]
struct SavedBlock {
    /// The size that its guest knows.
    sectors: u64,
    /// Its image, if the guest can write to it.
    image: Option<Stamp>,
}
