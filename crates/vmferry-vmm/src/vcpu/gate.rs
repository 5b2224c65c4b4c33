//! The gate: where vCPU threads wait while the guest stands still. The threads of virtio devices have one of their own.
//!
//! A vCPU thread passes the gate before every stay in the guest. Whoever holds the machine's run state closes
//! it, kicks the threads out of the guest and waits until all of them have come to it. A kick is never lost: a
//! thread forgets earlier kicks under the gate's lock, at the moment when it has seen the gate open, and a
//! kick is sent after the gate was closed under that lock.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// What a vCPU asks of its machine; the guest stands still until the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GuestRequest {
    /// The guest wants to start again.
    Reset,
    /// The guest has powered the machine off.
    PowerOff,
    /// The vCPU cannot go on.
    InternalError {
        /// Which vCPU.
        vcpu: u32,
        /// Why, with the registers that tell where.
        reason: String,
    },
}

/// Whether vCPUs may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Run,
    Hold,
    Quit,
}

/// What a vCPU thread does after the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    Run,
    Quit,
}

struct State {
    wanted: Wanted,
    pending: Option<GuestRequest>,
    held: usize,
}

impl State {
    fn is_open(&self) -> bool {
        self.wanted == Wanted::Run && self.pending.is_none()
    }
}

pub(crate) struct Gate {
    vcpus: usize,
    state: Mutex<State>,
    /// vCPU threads wait for this one.
    opened: Condvar,
    /// The holder and the supervisor wait for this one.
    changed: Condvar,
}

impl Gate {
    /// A closed gate for so many vCPU threads.
    pub fn new(vcpus: usize) -> Self {
        Gate {
            vcpus,
            state: Mutex::new(State {
                wanted: Wanted::Hold,
                pending: None,
                held: 0,
            }),
            opened: Condvar::new(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the gate panics")
    }

    /// Whether threads may pass.
    pub fn is_open(&self) -> bool {
        self.lock().is_open()
    }

    /// Called by a vCPU thread between two stays in the guest. `forget_kicks` runs under the lock.
    pub fn pass(&self, forget_kicks: impl Fn()) -> Pass {
        let mut state = self.lock();
        if !state.is_open() && state.wanted != Wanted::Quit {
            state.held += 1;
            if state.held == self.vcpus {
                self.changed.notify_all();
            }
            while !state.is_open() && state.wanted != Wanted::Quit {
                state = self
                    .opened
                    .wait(state)
                    .expect("no holder of the gate panics");
            }
            state.held -= 1;
        }
        if state.wanted == Wanted::Quit {
            return Pass::Quit;
        }
        forget_kicks();
        Pass::Run
    }

    /// Called by a vCPU thread that cannot go on before its machine has acted.
    pub(super) fn request(&self, request: GuestRequest) {
        self.lock().pending.get_or_insert(request);
        self.changed.notify_all();
    }

    /// Opens or closes the gate.
    pub fn set(&self, wanted: Wanted) {
        self.lock().wanted = wanted;
        if wanted != Wanted::Hold {
            self.opened.notify_all();
            self.changed.notify_all();
        }
    }

    /// Waits until every vCPU thread is at the gate, which must be closed and the threads kicked.
    pub fn wait_until_held(&self) {
        let mut state = self.lock();
        while state.held < self.vcpus {
            state = self
                .changed
                .wait(state)
                .expect("no holder of the gate panics");
        }
    }

    /// The same, until `end` at the latest. Whether every thread has come.
    pub fn held_by(&self, end: Instant) -> bool {
        let missing = |state: &mut State| state.held < self.vcpus;
        let left = end.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(self.lock(), left, missing);
        let (state, _) = waited.expect("no holder of the gate panics");
        state.held == self.vcpus
    }

    /// What the guest has asked for, if anything.
    pub fn pending(&self) -> Option<GuestRequest> {
        self.lock().pending.clone()
    }

    /// Replaces what the guest has asked for.
    pub fn set_pending(&self, request: Option<GuestRequest>) {
        self.lock().pending = request;
    }

    /// Waits until the guest should run but waits for an answer (true), or the machine quits (false).
    pub fn wait_for_request(&self) -> bool {
        let mut state = self.lock();
        loop {
            match state.wanted {
                Wanted::Quit => return false,
                Wanted::Run if state.pending.is_some() => return true,
                _ => {}
            }
            state = self
                .changed
                .wait(state)
                .expect("no holder of the gate panics");
        }
    }
}
