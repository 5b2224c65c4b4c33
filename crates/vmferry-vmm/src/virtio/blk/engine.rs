//! What carries requests out: io_uring where the host has it, else the device's thread itself.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::disk::Disk;
use super::flush::Writes;
use super::ring::Ring;
use super::transfer::{Direction, Durability, Transfer};
use crate::memory::GuestMemory;
use crate::virtio::Chain;

/// How the requests of a disk's guest reach the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskIo {
    /// Many at a time, by io_uring.
    IoUring,
    /// One after the other, because this host has no io_uring or does not let this process use it.
    Synchronous,
}

/// A request that the host is to carry out.
pub(super) struct Job {
    pub chain: Chain,
    pub work: Work,
}

pub(super) enum Work {
    Transfer(Transfer),
    /// Makes these writes safe, which were done before.
    Flush(Writes),
}

/// A job that is over.
pub(super) struct Done {
    pub job: Job,
    pub outcome: io::Result<()>,
}

impl Job {
    /// Bytes that it moves.
    pub fn bytes(&self) -> u64 {
        match &self.work {
            Work::Transfer(transfer) => transfer.len(),
            Work::Flush(_) => 0,
        }
    }

    /// Hears the kernel's answer to the last step, on `disk`. Goes on with the next one, or ends.
    pub fn hear(&mut self, disk: &Disk, answer: io::Result<usize>) -> ControlFlow<io::Result<()>> {
        match &mut self.work {
            Work::Transfer(transfer) => {
                if let Direction::ToDisk(durability) = transfer.direction {
                    disk.hear_write(durability, &answer);
                }
                transfer.hear(answer)
            }
            Work::Flush(covered) => match answer {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => ControlFlow::Continue(()),
                answer => ControlFlow::Break(disk.hear_flush(*covered, answer.map(drop))),
            },
        }
    }
}

impl Done {
    /// Tells guest memory what has come from the disk.
    pub fn arrive(&self, memory: &GuestMemory) {
        if let Work::Transfer(transfer) = &self.job.work
            && transfer.direction == Direction::FromDisk
        {
            let slices = self.job.chain.writable.slices(memory, 0, transfer.len());
            transfer.arrive(slices, &self.outcome);
        }
    }
}

/// Carries jobs out, in any order.
pub(super) trait Engine: Send {
    fn io(&self) -> DiskIo;

    /// Begins a job, if [`has_room`](Self::has_room). One that is done at once comes back.
    fn begin(&mut self, job: Job) -> Option<Done>;

    /// Whether one more may begin.
    fn has_room(&self) -> bool {
        true
    }

    /// Shows the kernel what has begun.
    fn submit(&mut self) {}

    /// A job that is over.
    fn done(&mut self) -> Option<Done> {
        None
    }

    /// Jobs that have begun and have not come back.
    fn in_flight(&self) -> usize {
        0
    }

    /// Waits for the kernel, if anything is in flight.
    fn wait(&mut self) {}
}

/// The best engine for `disk` on this host. It signals `kick` when a job is over.
pub(super) fn choose(disk: &Arc<Disk>, most: u16, kick: &Arc<EventFd>) -> Box<dyn Engine> {
    match Ring::new(disk.clone(), most, kick) {
        Ok(ring) => Box::new(ring),
        Err(error) => {
            tracing::warn!(
                id = disk.id(),
                %error,
                "no io_uring: the disk's requests are served one after the other"
            );
            Box::new(Synchronous(disk.clone()))
        }
    }
}

/// The thread that begins a job does it.
pub(super) struct Synchronous(pub Arc<Disk>);

impl Engine for Synchronous {
    fn io(&self) -> DiskIo {
        DiskIo::Synchronous
    }

    fn begin(&mut self, mut job: Job) -> Option<Done> {
        loop {
            let answer = match &job.work {
                Work::Transfer(transfer) => step(&self.0, transfer),
                Work::Flush(_) => self.0.sync().map(|()| 0),
            };
            if let ControlFlow::Break(outcome) = job.hear(&self.0, answer) {
                return Some(Done { job, outcome });
            }
        }
    }
}

/// Does a step of `transfer`. How many bytes were moved.
fn step(disk: &Disk, transfer: &Transfer) -> io::Result<usize> {
    let (fd, step) = (disk.as_raw_fd(), transfer.step());
    let (iovecs, count, at) = (
        step.iovecs.as_ptr(),
        step.iovecs.len() as i32,
        step.at as i64,
    );
    // SAFETY: every iovec is memory that stays mapped while the transfer lives (`Transfer::new`), and that may change at
    // any time; the kernel reads or writes no more than that.
    let moved = unsafe {
        match transfer.direction {
            Direction::FromDisk => libc::preadv(fd, iovecs, count, at),
            Direction::ToDisk(durability) => {
                libc::pwritev2(fd, iovecs, count, at, write_flags(durability))
            }
        }
    };
    match moved {
        -1 => Err(io::Error::last_os_error()),
        moved => Ok(moved as usize),
    }
}

/// The flags of a write (`pwritev2`).
pub(super) fn write_flags(durability: Durability) -> i32 {
    match durability {
        Durability::Written => 0,
        Durability::Safe => libc::RWF_DSYNC,
    }
}
