//! What waits to be sent to one client.
//!
//! Nobody but the client's own writer thread ever waits for the client's socket. Replies may make their own reader
//! thread wait, which merely stops a client that asks faster than it listens. Events make nobody wait: they come from
//! the machine's threads, and a client that lets them pile up is cut off instead.

use std::collections::VecDeque;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes waiting above which no further command of the client is executed.
const REPLY_LIMIT: usize = 64 * 1024;

/// Bytes waiting above which an event cuts the client off. Some ten thousand events.
const EVENT_LIMIT: usize = 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Open,
    /// What is queued is still sent, nothing is added.
    Finishing,
    /// Nothing is sent any more.
    Broken,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<Arc<[u8]>>,
    bytes: usize,
    phase: Phase,
}

/// A client's queue and its socket.
#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
    stream: UnixStream,
}

/// The client is gone, or is to go.
#[derive(Debug)]
pub(crate) struct Closed;

impl Outbox {
    /// An empty queue to `stream`.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Outbox {
            state: Mutex::new(State {
                queue: VecDeque::new(),
                bytes: 0,
                phase: Phase::Open,
            }),
            changed: Condvar::new(),
            stream,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No panic can leave the queue half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enqueue(&self, mut state: MutexGuard<'_, State>, message: Arc<[u8]>) {
        state.bytes += message.len();
        state.queue.push_back(message);
        self.changed.notify_all();
    }

    /// Queues a reply, after waiting for the client to take earlier ones.
    pub(crate) fn push_reply(&self, message: Vec<u8>) -> Result<(), Closed> {
        let state = self
            .changed
            .wait_while(self.lock(), |state| {
                state.phase == Phase::Open && state.bytes > REPLY_LIMIT
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.phase != Phase::Open {
            return Err(Closed);
        }
        self.enqueue(state, message.into());
        Ok(())
    }

    /// Queues an event without waiting; cuts the client off if too much is waiting already.
    pub(crate) fn push_event(&self, message: Arc<[u8]>) -> Result<(), Closed> {
        let state = self.lock();
        if state.phase != Phase::Open {
            return Err(Closed);
        }
        if state.bytes + message.len() > EVENT_LIMIT {
            let waiting = state.bytes;
            drop(state);
            tracing::warn!(waiting, "QMP client does not read its events: disconnected");
            self.break_off();
            return Err(Closed);
        }
        self.enqueue(state, message);
        Ok(())
    }

    /// Lets the writer send what is queued and then end.
    pub(crate) fn finish(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Open {
            state.phase = Phase::Finishing;
        }
        self.changed.notify_all();
    }

    /// Ends the connection at once.
    pub(crate) fn break_off(&self) {
        self.lock().phase = Phase::Broken;
        self.changed.notify_all();
        // Fails only if the client has gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Ends reading from the client; what it was answered is still sent.
    pub(crate) fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    fn next(&self) -> Option<Arc<[u8]>> {
        let mut state = self
            .changed
            .wait_while(self.lock(), |state| {
                state.phase == Phase::Open && state.queue.is_empty()
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.phase == Phase::Broken {
            return None;
        }
        state.queue.pop_front()
    }

    /// The writer thread's work: sends until the queue is finished or the client is gone.
    pub(crate) fn drain(&self) {
        while let Some(message) = self.next() {
            if let Err(error) = (&self.stream).write_all(&message) {
                tracing::debug!(%error, "QMP client is gone");
                break;
            }
            // What is being written counts as waiting, or a large reply to a client that does not read would make
            // room for as much again.
            self.lock().bytes -= message.len();
            self.changed.notify_all();
        }
        self.break_off();
    }
}
