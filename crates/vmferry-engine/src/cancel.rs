//! Telling a thread to stop, also while it waits for a peer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// A flag that, once set, stays set, and wakes whoever polls its file descriptor.
#[derive(Clone, Debug)]
pub struct CancelToken(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cancelled: AtomicBool,
    event: OwnedFd,
}

impl CancelToken {
    /// A token that is not cancelled. Fails when the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(CancelToken(Arc::new(Inner {
            cancelled: AtomicBool::new(false),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })))
    }

    /// Sets the flag and wakes all waiters, now and later.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        // Cannot fail: the counter is far from its maximum, and nobody reads it back to zero.
        let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Waits until cancelled, for at most `time`; whether it was.
    pub fn wait(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        while !self.is_cancelled() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let timeout = Timespec::try_from(left).ok();
            // However it ends, the flag and the clock tell what to do next.
            let _ = poll(
                &mut [PollFd::new(&self.0.event, PollFlags::IN)],
                timeout.as_ref(),
            );
        }
        true
    }
}

impl AsFd for CancelToken {
    /// Readable once cancelled.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}
