//! What the migration thread shares with those who watch and steer it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cancel::CancelToken;
use crate::error::MigrationError;
use crate::info::{Info, Observer};
use crate::params::Parameters;
use crate::status::Status;
use crate::wait::Waits;

/// How far a migration has gone towards giving the guest away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ownership {
    /// The guest is ours; cancelling is possible.
    Ours,
    /// The user has cancelled.
    Cancelled,
    /// The guest is, or may be, the destination's.
    GivenAway,
}

/// Shared between the migration thread and its handles.
pub(super) struct Shared {
    pub(super) cancel: CancelToken,
    pub(super) started: Instant,
    pub(super) waits: Waits,
    observer: Box<dyn Observer>,
    info: Mutex<Info>,
    parameters: Mutex<Parameters>,
    control: Mutex<Control>,
    changed: Condvar,
}

struct Control {
    ownership: Ownership,
    /// The user has said `migrate-continue`.
    go: bool,
}

/// A migration that is past cancelling, or not where the command expects it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SteerError {
    /// The guest is being handed over, or was.
    #[error("the guest is already handed over to the destination: it is too late to cancel")]
    TooLate,
    /// `migrate-continue` was given at another time.
    #[error(
        "the migration is in state '{0}', not in 'pre-switchover': there is nothing to continue"
    )]
    NotWaiting(Status),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // None of the critical sections can leave its data half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(
        cancel: CancelToken,
        parameters: Parameters,
        observer: Box<dyn Observer>,
    ) -> Self {
        Shared {
            cancel,
            started: Instant::now(),
            waits: Waits::default(),
            observer,
            info: Mutex::new(Info::default()),
            parameters: Mutex::new(parameters),
            control: Mutex::new(Control {
                ownership: Ownership::Ours,
                go: false,
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn info(&self) -> Info {
        let mut info = lock(&self.info).clone();
        if !info.status.is_final() {
            info.total_time = self.started.elapsed();
        }
        info.waiting = self.waits.now();
        info
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Info)) {
        change(&mut lock(&self.info));
    }

    /// Enters a state and tells the observer. While a cancellation is under way, only its end is shown.
    pub(super) fn enter(&self, status: Status) {
        self.enter_holding(&lock(&self.control), status);
    }

    /// Enters a state. `_control` is held until the observer has heard of it, so that what it hears from the
    /// migration thread and from a user who cancels has the order in which it happened.
    fn enter_holding(&self, _control: &MutexGuard<'_, Control>, status: Status) {
        {
            let mut info = lock(&self.info);
            let ending = info.status == Status::Cancelling && !status.is_final();
            if info.status == status || info.status.is_final() || ending {
                return;
            }
            info.status = status;
            if status.is_final() {
                info.total_time = self.started.elapsed();
            }
        }
        tracing::info!(%status, "migration");
        self.observer.status(status);
    }

    pub(super) fn pass(&self, number: u64) {
        self.observer.pass(number);
    }

    pub(super) fn parameters(&self) -> Parameters {
        *lock(&self.parameters)
    }

    pub(super) fn set_parameters(&self, parameters: Parameters) {
        *lock(&self.parameters) = parameters;
    }

    /// The user cancels.
    pub(super) fn cancel(&self) -> Result<(), SteerError> {
        {
            let mut control = lock(&self.control);
            if control.ownership == Ownership::GivenAway {
                return Err(SteerError::TooLate);
            }
            control.ownership = Ownership::Cancelled;
            self.enter_holding(&control, Status::Cancelling);
        }
        self.cancel.cancel();
        self.changed.notify_all();
        Ok(())
    }

    /// The point of no return: true if the guest may be given away, false if the user cancelled first.
    pub(super) fn give_away(&self) -> bool {
        let mut control = lock(&self.control);
        if control.ownership == Ownership::Ours {
            control.ownership = Ownership::GivenAway;
        }
        control.ownership == Ownership::GivenAway
    }

    /// Enters the state that `result` ends in; what failed after the user had cancelled is cancelled.
    pub(super) fn conclude(
        &self,
        result: Result<(), MigrationError>,
    ) -> Result<(), MigrationError> {
        let control = lock(&self.control);
        let result = match control.ownership {
            // Whatever broke, broke because the user cancelled. But the user has to know of a guest that does not go on.
            Ownership::Cancelled => result.map_err(|error| match error {
                MigrationError::Undecided { .. } | MigrationError::NotResumed { .. } => error,
                _ => MigrationError::Cancelled,
            }),
            Ownership::Ours | Ownership::GivenAway => result,
        };
        match &result {
            Ok(()) => self.enter_holding(&control, Status::Completed),
            Err(MigrationError::Cancelled) => self.enter_holding(&control, Status::Cancelled),
            Err(error) => {
                self.update(|info| info.error = Some(error.to_string()));
                self.enter_holding(&control, Status::Failed);
            }
        }
        result
    }

    /// The user lets a migration in pre-switchover go on.
    pub(super) fn proceed(&self) -> Result<(), SteerError> {
        let status = self.info().status;
        if status != Status::PreSwitchover {
            return Err(SteerError::NotWaiting(status));
        }
        lock(&self.control).go = true;
        self.changed.notify_all();
        Ok(())
    }

    /// Waits for [`proceed`](Self::proceed), for at most `timeout`; false if it did not come, or if the user
    /// cancelled.
    pub(super) fn wait_to_proceed(&self, timeout: Duration) -> bool {
        let control = lock(&self.control);
        let waiting = |c: &mut Control| !c.go && c.ownership == Ownership::Ours;
        let (control, _) = self
            .changed
            .wait_timeout_while(control, timeout, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        control.go && control.ownership == Ownership::Ours
    }
}
