//! virtio-blk: a raw image or a block device of the host as a disk.
//!
//! Requests are served one after the other by the device's thread. When the machine stands still, each is complete
//! or has not begun.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk as blk;

use super::{Broken, Chain, Kind, Requests, VirtioDevice};
use crate::config::Access;
use crate::memory::GuestMemory;

mod disk;
mod lock;

pub(crate) use disk::Disk;

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];
/// Bytes of virtio's sectors, whatever the disk has.
pub(crate) const SECTOR: u64 = 512;

/// Request header: type, four reserved bytes, sector.
const HEADER: usize = 16;
/// The last byte of a request is its status.
const STATUS: u64 = 1;
/// The most that one request may move. Drivers stay far below; what a hostile one can make a pause wait for is bounded
/// by it.
const MOST_BYTES: u64 = 64 << 20;

/// A piece of a discard or write-zeroes request: sector, number of sectors, flags.
const SEGMENT: usize = 16;
/// The most pieces of one request.
const MOST_SEGMENTS: u32 = 16;
/// In which sectors pieces to discard should begin: those where a page of a file does.
const DISCARD_ALIGNMENT: u32 = 8;
/// The most sectors of a piece to discard: 2 GiB.
const MOST_DISCARDED: u32 = 1 << 22;
/// The most sectors of a piece to zero, which may have to be written: 8 MiB.
const MOST_ZEROED: u32 = 1 << 14;

/// Why a request fails, in the status that the driver sees.
enum Refusal {
    /// The driver asks for what cannot be, or the host failed.
    Error,
    Unsupported,
}

impl Refusal {
    fn status(&self) -> u8 {
        let status = match self {
            Refusal::Error => blk::VIRTIO_BLK_S_IOERR,
            Refusal::Unsupported => blk::VIRTIO_BLK_S_UNSUPP,
        };
        status as u8
    }
}

/// A block device.
pub(crate) struct Block {
    disk: Arc<Disk>,
    /// What the driver has chosen.
    features: u64,
}

impl Block {
    /// Queues of the device.
    pub const QUEUES: usize = QUEUE_SIZES.len();

    pub fn new(disk: Arc<Disk>) -> Self {
        Block { disk, features: 0 }
    }

    /// Whether the driver flushes what it wants to be safe; else every write must be.
    fn driver_flushes(&self) -> bool {
        self.features & 1 << blk::VIRTIO_BLK_F_FLUSH != 0
    }

    fn execute(&self, memory: &GuestMemory, chain: &Chain) -> Result<(), Refusal> {
        let mut header = [0; HEADER];
        chain.readable.read(memory, 0, &mut header);
        let kind = u32_at(&header, 0);
        let sector = u64_at(&header, 8);
        let to_disk = chain.readable.len() - HEADER as u64;
        let to_guest = chain.writable.len() - STATUS;
        match kind {
            blk::VIRTIO_BLK_T_IN => {
                let at = self.place(sector, to_guest)?;
                let pieces = chain.writable.slices(memory, 0, to_guest);
                self.host("read", at, self.disk.read(at, pieces))
            }
            blk::VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let at = self.place(sector, to_disk)?;
                let pieces = chain.readable.slices(memory, HEADER as u64, to_disk);
                self.host("write", at, self.disk.write(at, pieces))?;
                self.settle(at)
            }
            blk::VIRTIO_BLK_T_FLUSH => self.host("flush", 0, self.disk.flush()),
            blk::VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; blk::VIRTIO_BLK_ID_BYTES as usize];
                let name = self.disk.id().as_bytes();
                let len = name.len().min(id.len());
                id[..len].copy_from_slice(&name[..len]);
                let len = id.len().min(to_guest as usize);
                chain.writable.write(memory, 0, &id[..len]);
                Ok(())
            }
            blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                self.change_segments(kind, memory, chain)
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Where `bytes` from `sector` on are, if the disk has them.
    fn place(&self, sector: u64, bytes: u64) -> Result<u64, Refusal> {
        let end = bytes
            .is_multiple_of(SECTOR)
            .then(|| sector.checked_add(bytes / SECTOR))
            .flatten();
        match end {
            Some(end) if end <= self.disk.sectors() && bytes <= MOST_BYTES => Ok(sector * SECTOR),
            _ => {
                tracing::debug!(sector, bytes, id = self.disk.id(), "no place on the disk");
                Err(Refusal::Error)
            }
        }
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        match self.disk.access() {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(Refusal::Error),
        }
    }

    /// Makes a write safe if nobody else will.
    fn settle(&self, at: u64) -> Result<(), Refusal> {
        match self.driver_flushes() {
            true => Ok(()),
            false => self.host("flush", at, self.disk.flush()),
        }
    }

    /// Discards or zeroes what a request lists.
    fn change_segments(
        &self,
        kind: u32,
        memory: &GuestMemory,
        chain: &Chain,
    ) -> Result<(), Refusal> {
        let len = chain.readable.len() - HEADER as u64;
        let count = len / SEGMENT as u64;
        if !len.is_multiple_of(SEGMENT as u64) || !(1..=MOST_SEGMENTS.into()).contains(&count) {
            return Err(Refusal::Error);
        }
        let zeroes = kind == blk::VIRTIO_BLK_T_WRITE_ZEROES;
        let (most, known_flags) = match zeroes {
            true => (MOST_ZEROED, blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
            false => (MOST_DISCARDED, 0),
        };
        // All are checked before the first takes effect.
        let mut segments = Vec::new();
        for number in 0..count {
            let mut segment = [0; SEGMENT];
            let offset = HEADER as u64 + number * SEGMENT as u64;
            chain.readable.read(memory, offset, &mut segment);
            let (sector, sectors) = (u64_at(&segment, 0), u32_at(&segment, 8));
            let flags = u32_at(&segment, 12);
            if flags & !known_flags != 0 {
                return Err(Refusal::Unsupported);
            }
            let end = sector.checked_add(sectors.into());
            if sectors > most || end.is_none_or(|end| end > self.disk.sectors()) {
                return Err(Refusal::Error);
            }
            segments.push((sector * SECTOR, u64::from(sectors) * SECTOR, flags));
        }
        for (at, len, flags) in segments.into_iter().filter(|(_, len, _)| *len > 0) {
            let unmap = flags & blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            match zeroes {
                true => self.host("zero", at, self.disk.zero(at, len, unmap))?,
                false => self.host("discard", at, self.disk.discard(at, len))?,
            }
            self.settle(at)?;
        }
        Ok(())
    }

    /// Reports what the host refused.
    fn host(&self, what: &str, at: u64, result: io::Result<()>) -> Result<(), Refusal> {
        result.map_err(|error| {
            tracing::warn!(id = self.disk.id(), at, %error, "cannot {what} the disk");
            Refusal::Error
        })
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let always = 1 << blk::VIRTIO_BLK_F_SEG_MAX | 1 << blk::VIRTIO_BLK_F_FLUSH;
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
        set(0, sectors as u32);
        set(4, (sectors >> 32) as u32);
        // Of a queue's descriptors, one is the header and one the status.
        set(12, u32::from(QUEUE_SIZE) - 2);
        set(36, MOST_DISCARDED);
        set(40, MOST_SEGMENTS);
        set(44, DISCARD_ALIGNMENT);
        set(48, MOST_ZEROED);
        set(52, MOST_SEGMENTS);
        // Write-zeroes may unmap.
        set(56, 1);
        config
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    fn reset(&mut self) {
        self.features = 0;
    }

    fn serve(&mut self, _: usize, requests: &mut Requests<'_>) -> Result<(), Broken> {
        while let Some(chain) = requests.next()? {
            if chain.readable.len() < HEADER as u64 {
                return Err(chain.short("a header"));
            }
            let Some(status_at) = chain.writable.len().checked_sub(STATUS) else {
                return Err(chain.short("its status"));
            };
            let status = match self.execute(requests.memory, &chain) {
                Ok(()) => blk::VIRTIO_BLK_S_OK as u8,
                Err(refusal) => refusal.status(),
            };
            chain.writable.write(requests.memory, status_at, &[status]);
            // A chain has less than 4 GiB.
            requests.complete(&chain, chain.writable.len() as u32)?;
        }
        Ok(())
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
