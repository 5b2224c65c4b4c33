//! Many requests at a time, by io_uring.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use slab::Slab;
use vmm_sys_util::eventfd::EventFd;

use super::disk::Disk;
use super::engine::{DiskIo, Done, Engine, Job, Work, write_flags};
use super::request::MOST_BYTES;
use super::transfer::Direction;
use crate::virtio::signal;

/// An io_uring and the jobs that the kernel has.
///
/// # Invariant
///
/// A job in the table has at most one step with the kernel. It leaves the table when the kernel has answered, and not
/// before: its iovecs and bounce buffer stay where they are, and so does guest memory, for as long as the kernel may use
/// them. A ring that is dropped waits for the answers.
///
/// The jobs' keys are places in the table, not the driver's names for its requests: a driver may give one name to many.
pub(super) struct Ring {
    ring: IoUring,
    disk: Arc<Disk>,
    jobs: Slab<Job>,
    most: usize,
    /// Bytes of the jobs' transfers.
    bytes: u64,
    kick: Arc<EventFd>,
}

impl Ring {
    /// A ring for at most `most` jobs, which signals `kick` when one of them is over.
    ///
    /// # Errors
    ///
    /// The kernel has no io_uring, or this process may not use it: `kernel.io_uring_disabled`, a container's filter of
    /// system calls.
    pub fn new(disk: Arc<Disk>, most: u16, kick: &Arc<EventFd>) -> io::Result<Self> {
        let mut ring = IoUring::new(most.into())?;
        // All system calls that are to come are tried now.
        // SAFETY: this entry refers to no memory.
        unsafe { ring.submission().push(&opcode::Nop::new().build()) }
            .expect("a new ring has room");
        ring.submit_and_wait(1)?;
        ring.completion().for_each(drop);
        ring.submitter().register_eventfd(kick.as_raw_fd())?;
        Ok(Ring {
            ring,
            disk,
            jobs: Slab::with_capacity(most.into()),
            most: most.into(),
            bytes: 0,
            kick: kick.clone(),
        })
    }

    /// Puts the next step of a job into the ring.
    fn push(&mut self, key: usize) {
        let fd = types::Fd(self.disk.as_raw_fd());
        let entry: squeue::Entry = match &self.jobs[key].work {
            Work::Flush(_) => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Work::Transfer(transfer) => {
                let step = transfer.step();
                let (iovecs, count) = (step.iovecs.as_ptr(), step.iovecs.len() as u32);
                match transfer.direction {
                    Direction::FromDisk => opcode::Readv::new(fd, iovecs, count)
                        .offset(step.at)
                        .build(),
                    Direction::ToDisk(durability) => opcode::Writev::new(fd, iovecs, count)
                        .offset(step.at)
                        .rw_flags(write_flags(durability))
                        .build(),
                }
            }
        };
        // SAFETY: the entry's pointers are those of a job in the table (see the invariant), and the memory that they lead
        // to stays mapped for as long as the job lives (`Transfer::new`).
        unsafe { self.ring.submission().push(&entry.user_data(key as u64)) }
            .expect("the ring has room for a step of every job");
    }
}

impl Engine for Ring {
    fn io(&self) -> DiskIo {
        DiskIo::IoUring
    }

    fn begin(&mut self, job: Job) -> Option<Done> {
        self.bytes += job.bytes();
        let key = self.jobs.insert(job);
        self.push(key);
        None
    }

    fn has_room(&self) -> bool {
        self.jobs.len() < self.most && self.bytes < MOST_BYTES
    }

    fn submit(&mut self) {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // The kernel is short of memory for a moment. What waits in the ring is not lost: the device's thread
                    // comes again.
                    tracing::debug!(%error, id = self.disk.id(), "the kernel takes no requests now");
                    signal(&self.kick);
                    return;
                }
            }
        }
    }

    fn done(&mut self) -> Option<Done> {
        loop {
            let answer = self.ring.completion().next()?;
            let key = answer.user_data() as usize;
            let answer = match answer.result() {
                moved @ 0.. => Ok(moved as usize),
                error => Err(io::Error::from_raw_os_error(-error)),
            };
            match self.jobs[key].hear(&self.disk, answer) {
                ControlFlow::Continue(()) => self.push(key),
                ControlFlow::Break(outcome) => {
                    let job = self.jobs.remove(key);
                    self.bytes -= job.bytes();
                    return Some(Done { job, outcome });
                }
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.jobs.len()
    }

    fn wait(&mut self) {
        if !self.jobs.is_empty()
            && let Err(error) = self.ring.submit_and_wait(1)
        {
            tracing::debug!(%error, id = self.disk.id(), "a wait for requests was interrupted");
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while !self.jobs.is_empty() {
            self.wait();
            while self.done().is_some() {}
        }
    }
}
