//! What of a disk is safe on its medium, and flushes that nobody has to wait for longer than he can.
//!
//! A disk counts the writes that the host has answered. A flush makes those safe that were counted before it began, so a
//! disk whose writes are all safe needs no flush. A write that the host still has is not counted; who wants to be sure of
//! all of them first waits until none is in flight.
//!
//! A flush can hang for as long as the storage does. One that is waited for with a time limit has a thread of its own, of
//! which a disk has one at most: whoever comes meanwhile waits for the same flush.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

use super::disk::Disk;
use crate::config::Access;
use crate::error::MachineError;

/// How many writes there were at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Writes(u64);

/// How a wait for writes to be safe has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// They are.
    Safe,
    /// The flush takes longer, and goes on.
    NotYet,
}

/// What of a disk's writes is safe.
pub(super) struct Safety {
    /// Writes that the host has answered, whatever the answer.
    written: AtomicU64,
    state: Mutex<State>,
    /// A flush is over.
    over: Condvar,
}

struct State {
    /// The writes that a flush has made safe.
    safe: Writes,
    /// Whether a thread flushes the disk.
    flushing: bool,
    /// How the last thread's flush has failed, until somebody has heard of it.
    failure: Option<io::Error>,
}

impl Safety {
    /// Of a disk that nothing was written to.
    pub fn new() -> Self {
        Safety {
            written: AtomicU64::new(0),
            state: Mutex::new(State {
                safe: Writes(0),
                flushing: false,
                failure: None,
            }),
            over: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no holder of a disk's state panics")
    }

    /// The host has answered a write. Comes before the driver hears of it.
    pub fn written(&self) {
        self.written.fetch_add(1, Ordering::AcqRel);
    }

    /// The writes that a flush which begins now makes safe.
    pub fn covered_now(&self) -> Writes {
        Writes(self.written.load(Ordering::Acquire))
    }

    /// A flush has succeeded that began when there were these writes.
    pub fn flushed(&self, covered: Writes) {
        let mut state = self.lock();
        state.safe = state.safe.max(covered);
    }
}

impl Disk {
    /// Begins to make safe what was written so far, if anything has to be. Returns which writes that is, for
    /// [`settled_by`](Self::settled_by).
    pub fn begin_to_settle(self: &Arc<Self>) -> Result<Writes, MachineError> {
        let wanted = self.safety.covered_now();
        let mut state = self.safety.lock();
        if !state.flushing {
            // It was that of a flush for which nobody waits any more.
            state.failure = None;
            if self.access() == Access::ReadWrite && state.safe < wanted {
                self.spawn_flush(state)?;
            }
        }
        Ok(wanted)
    }

    /// Waits until the `wanted` writes are safe, until `end` at the latest if there is one.
    ///
    /// # Errors
    ///
    /// The disk cannot be flushed, or has lost a write before.
    pub fn settled_by(
        self: &Arc<Self>,
        wanted: Writes,
        end: Option<Instant>,
    ) -> Result<Settled, MachineError> {
        loop {
            let mut state = self.safety.lock();
            while state.flushing {
                let left = end.map(|end| end.saturating_duration_since(Instant::now()));
                state = match left {
                    Some(left) if left.is_zero() => return Ok(Settled::NotYet),
                    Some(left) => {
                        let waited = self.safety.over.wait_timeout(state, left);
                        waited.expect("no holder of a disk's state panics").0
                    }
                    None => {
                        let waited = self.safety.over.wait(state);
                        waited.expect("no holder of a disk's state panics")
                    }
                };
            }
            if let Some(error) = state.failure.take() {
                return Err(self.failed("flush", error));
            }
            self.has_all_writes()
                .map_err(|error| self.failed("flush", error))?;
            if self.access() == Access::ReadOnly || state.safe >= wanted {
                return Ok(Settled::Safe);
            }
            // The flush that was under way had begun too early.
            self.spawn_flush(state)?;
        }
    }

    /// Flushes the disk in a thread of its own.
    fn spawn_flush(self: &Arc<Self>, mut state: MutexGuard<'_, State>) -> Result<(), MachineError> {
        let disk = self.clone();
        let flush = move || {
            let result = disk.flush();
            let mut state = disk.safety.lock();
            state.flushing = false;
            state.failure = result.err();
            disk.safety.over.notify_all();
        };
        thread::Builder::new()
            .name("flush".into())
            .spawn(flush)
            .map_err(|error| self.failed("start a thread to flush", error))?;
        state.flushing = true;
        Ok(())
    }
}
