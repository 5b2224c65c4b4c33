//! What a driver asks for, checked against the disk.

use virtio_bindings::virtio_blk as blk;

use super::disk::{Disk, SECTOR};
use crate::config::Access;
use crate::memory::GuestMemory;
use crate::virtio::{Broken, Chain};

/// Type, four reserved bytes, sector.
pub(super) const HEADER: u64 = 16;
/// The last byte of a request is its status.
pub(super) const STATUS: u64 = 1;
/// The most that one request may move, and with so much on its way no further one begins. Drivers stay far below; what a
/// hostile one can make a pause wait for, and have in bounce buffers, is bounded by it.
pub(super) const MOST_BYTES: u64 = 64 << 20;

/// Bytes of a piece of a discard or write-zeroes request: sector, number of sectors, flags.
const SEGMENT: u64 = 16;
/// The most pieces of one request.
pub(super) const MOST_SEGMENTS: u32 = 16;
/// The most sectors of a piece to discard: 2 GiB.
pub(super) const MOST_DISCARDED: u32 = 1 << 22;
/// The most sectors of a piece to zero, which may have to be written: 8 MiB.
pub(super) const MOST_ZEROED: u32 = 1 << 14;

/// Why a request fails, in the status that the driver sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The driver asks for what cannot be, or the host failed.
    Error,
    Unsupported,
}

/// The status of a request, as the driver reads it.
pub(super) fn status(outcome: Result<(), Refusal>) -> u8 {
    let status = match outcome {
        Ok(()) => blk::VIRTIO_BLK_S_OK,
        Err(Refusal::Error) => blk::VIRTIO_BLK_S_IOERR,
        Err(Refusal::Unsupported) => blk::VIRTIO_BLK_S_UNSUPP,
    };
    status as u8
}

/// A request that the disk can serve.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// From the disk's byte `at` on, into all that is writable but the status.
    Read {
        at: u64,
        len: u64,
    },
    /// From the disk's byte `at` on, what is readable behind the header.
    Write {
        at: u64,
        len: u64,
    },
    Flush,
    Id,
    Discard(Vec<Segment>),
    Zero(Vec<Segment>),
}

/// A part of a disk, in bytes, that is to be discarded or zeroed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub at: u64,
    pub len: u64,
    /// Whether it may give up its space.
    pub unmap: bool,
}

/// Refuses a request without which its driver cannot even be answered.
pub(super) fn check_frame(chain: &Chain) -> Result<(), Broken> {
    if chain.readable.len() < HEADER {
        return Err(chain.short("a header"));
    }
    if chain.writable.len() < STATUS {
        return Err(chain.short("its status"));
    }
    Ok(())
}

impl Request {
    /// Reads a request that has a header and room for a status.
    pub fn read(chain: &Chain, memory: &GuestMemory, disk: &Disk) -> Result<Self, Refusal> {
        let mut header = [0; HEADER as usize];
        chain.readable.read(memory, 0, &mut header);
        let kind = u32_at(&header, 0);
        let sector = u64_at(&header, 8);
        match kind {
            blk::VIRTIO_BLK_T_IN => {
                let len = chain.writable.len() - STATUS;
                let at = place(disk, sector, len)?;
                Ok(Request::Read { at, len })
            }
            blk::VIRTIO_BLK_T_OUT => {
                check_writable(disk)?;
                let len = chain.readable.len() - HEADER;
                let at = place(disk, sector, len)?;
                Ok(Request::Write { at, len })
            }
            blk::VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
            blk::VIRTIO_BLK_T_GET_ID => Ok(Request::Id),
            blk::VIRTIO_BLK_T_DISCARD => {
                check_writable(disk)?;
                segments(chain, memory, disk, MOST_DISCARDED, 0).map(Request::Discard)
            }
            blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                check_writable(disk)?;
                let unmap = blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                segments(chain, memory, disk, MOST_ZEROED, unmap).map(Request::Zero)
            }
            _ => Err(Refusal::Unsupported),
        }
    }
}

/// Where `bytes` from `sector` on are, if the disk has them.
fn place(disk: &Disk, sector: u64, bytes: u64) -> Result<u64, Refusal> {
    let whole = |bytes: u64| bytes.is_multiple_of(disk.block_size());
    let end = bytes
        .is_multiple_of(SECTOR)
        .then(|| sector.checked_add(bytes / SECTOR))
        .flatten();
    match end {
        Some(end)
            if end <= disk.sectors()
                && bytes <= MOST_BYTES
                && whole(bytes)
                && whole(sector * SECTOR) =>
        {
            Ok(sector * SECTOR)
        }
        _ => {
            tracing::debug!(sector, bytes, id = disk.id(), "no place on the disk");
            Err(Refusal::Error)
        }
    }
}

fn check_writable(disk: &Disk) -> Result<(), Refusal> {
    match disk.access() {
        Access::ReadWrite => Ok(()),
        Access::ReadOnly => Err(Refusal::Error),
    }
}

/// The pieces that a request lists. All are checked before the first takes effect; empty ones are left out.
fn segments(
    chain: &Chain,
    memory: &GuestMemory,
    disk: &Disk,
    most: u32,
    known_flags: u32,
) -> Result<Vec<Segment>, Refusal> {
    let len = chain.readable.len() - HEADER;
    let count = len / SEGMENT;
    if !len.is_multiple_of(SEGMENT) || !(1..=MOST_SEGMENTS.into()).contains(&count) {
        return Err(Refusal::Error);
    }
    let mut segments = Vec::new();
    for number in 0..count {
        let mut segment = [0; SEGMENT as usize];
        chain
            .readable
            .read(memory, HEADER + number * SEGMENT, &mut segment);
        let (sector, sectors) = (u64_at(&segment, 0), u32_at(&segment, 8));
        let flags = u32_at(&segment, 12);
        if flags & !known_flags != 0 {
            return Err(Refusal::Unsupported);
        }
        let end = sector.checked_add(sectors.into());
        if sectors > most || end.is_none_or(|end| end > disk.sectors()) {
            return Err(Refusal::Error);
        }
        if sectors > 0 {
            segments.push(Segment {
                at: sector * SECTOR,
                len: u64::from(sectors) * SECTOR,
                unmap: flags & blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            });
        }
    }
    Ok(segments)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
