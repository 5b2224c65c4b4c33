//! What both directions of a connection know of each other.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::{Effect, Fault, Way, When};

/// What becomes of the bytes of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// They are passed on.
    Passes,
    /// They vanish.
    Vanishes,
    /// They are not even taken.
    Stalls,
}

/// A connection with its faults.
#[derive(Debug)]
pub(super) struct Line {
    /// Set once. Not in the state, because the end must not wait for anything.
    over: AtomicBool,
    /// To the source and to the destination.
    sockets: OnceLock<(OwnedFd, OwnedFd)>,
    /// The lock is held while bytes are passed on, which never waits, so that a fault in one direction falls between two
    /// writes of the other.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Those that have not happened.
    faults: Vec<Fault>,
    struck: bool,
    forward: Direction,
    back: Direction,
}

#[derive(Debug)]
struct Direction {
    flow: Flow,
    passed: u64,
}

impl State {
    fn direction(&mut self, way: Way) -> &mut Direction {
        match way {
            Way::Forward => &mut self.forward,
            Way::Back => &mut self.back,
        }
    }
}

impl Line {
    pub fn new(faults: &[Fault]) -> Self {
        let direction = || Direction {
            flow: Flow::Passes,
            passed: 0,
        };
        Line {
            over: AtomicBool::new(false),
            sockets: OnceLock::new(),
            state: Mutex::new(State {
                faults: faults.to_owned(),
                struck: false,
                forward: direction(),
                back: direction(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn connected(&self, source: OwnedFd, destination: OwnedFd) {
        // There is only one connection.
        let _ = self.sockets.set((source, destination));
        if self.is_over() {
            self.end();
        }
        for way in [Way::Forward, Way::Back] {
            self.strike_at(&mut self.state(), way);
        }
    }

    /// Where this direction comes from and leads to.
    pub fn ends(&self, way: Way) -> (&OwnedFd, &OwnedFd) {
        let (source, destination) = self.sockets.get().expect("it is connected");
        match way {
            Way::Forward => (source, destination),
            Way::Back => (destination, source),
        }
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub fn is_struck(&self) -> bool {
        self.state().struck
    }

    pub fn flow(&self, way: Way) -> Flow {
        self.state().direction(way).flow
    }

    /// Ends the connection. Both sides are told.
    pub fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some((source, destination)) = self.sockets.get() {
            for socket in [source, destination] {
                // It may be closed already.
                let _ = shutdown(socket, Shutdown::Both);
            }
        }
    }

    pub fn strike(&self, effect: Effect) {
        self.strike_locked(&mut self.state(), effect);
    }

    fn strike_locked(&self, state: &mut State, effect: Effect) {
        state.struck = true;
        match effect {
            Effect::Cut => self.end(),
            Effect::Silence(way) => state.direction(way).flow = Flow::Vanishes,
            Effect::Stall(way) => state.direction(way).flow = Flow::Stalls,
        }
    }

    /// Lets those faults happen whose place has been reached.
    fn strike_at(&self, state: &mut State, way: Way) {
        let passed = state.direction(way).passed;
        let is_here = |fault: &mut Fault| match fault.when {
            When::Bytes(of, at) => of == way && at <= passed,
            When::From(..) => false,
        };
        let here: Vec<_> = state.faults.extract_if(.., is_here).collect();
        for fault in here {
            self.strike_locked(state, fault.effect);
        }
    }

    /// Texts that faults of this direction wait for.
    pub fn texts(&self, way: Way) -> Vec<&'static [u8]> {
        let state = self.state();
        let faults = state.faults.iter();
        faults
            .filter_map(|fault| match fault.when {
                When::From(of, text, _) if of == way => Some(text),
                _ => None,
            })
            .collect()
    }

    /// A text begins at this place: now it is known where the faults are that wait for it.
    pub fn found(&self, way: Way, text: &[u8], place: u64) {
        for fault in &mut self.state().faults {
            match fault.when {
                When::From(of, wanted, bytes) if of == way && wanted == text => {
                    fault.when = When::Bytes(way, place + bytes);
                }
                _ => {}
            }
        }
    }

    /// Passes the beginning of `bytes` on, up to the next fault, without waiting. Gives back how many are dealt with.
    pub fn pass(&self, way: Way, bytes: &[u8]) -> usize {
        let mut state = self.state();
        self.strike_at(&mut state, way);
        let passed = state.direction(way).passed;
        let to_fault = state.faults.iter().filter_map(|fault| match fault.when {
            When::Bytes(of, at) if of == way => Some((at - passed) as usize),
            _ => None,
        });
        let len = to_fault.min().unwrap_or(usize::MAX).min(bytes.len());
        let done = match state.direction(way).flow {
            _ if self.is_over() => return 0,
            Flow::Stalls => return 0,
            Flow::Vanishes => len,
            Flow::Passes => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                match send(self.ends(way).1, &bytes[..len], flags) {
                    Ok(sent) => sent,
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
                    // The receiver is gone. That is for the other direction to tell the sender.
                    Err(_) => len,
                }
            }
        };
        state.direction(way).passed += done as u64;
        self.strike_at(&mut state, way);
        done
    }
}
