//! The migrations of one machine: at most one at a time, in or out.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_control::schema::{
    CalcDirtyRate, DirtyRateInfo, Event, MigrationData, MigrationPassData, MigrationStatus,
    TimeUnit,
};
use vmferry_control::{EventBus, QmpError};
use vmferry_engine::{Destination, Info, Observer, Parameters, Source, Status, Uri};
use vmferry_vmm::{Machine, RunState};

use super::Exit;
use super::dirty_rate::Measurement;
use super::monitor::{self, generic};

/// What follows when a guest that was awaited does not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// The process ends with the reason.
    Exit,
    /// It stays, so that the monitor can be asked for the reason.
    Stay,
}

/// The migrations of a machine, and the settings of the next one.
pub struct Migrations {
    machine: Arc<Machine>,
    events: EventBus,
    exit: Sender<Exit>,
    current: Mutex<Current>,
    settings: Mutex<Settings>,
    /// Shares the machine's dirty log with `current`, and is started and ended by who holds that.
    measurement: Measurement,
}

enum Current {
    None,
    Out(Source),
    In(Destination),
}

impl Current {
    /// Whether the guest is on its way out.
    fn is_leaving(&self) -> bool {
        matches!(self, Current::Out(source) if !source.info().status.is_final())
    }
}

/// What the monitor's user has set.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub parameters: Parameters,
    /// Capability `events`: tell clients when a migration changes its state.
    pub events: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No holder leaves the data half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Migrations {
    pub fn new(machine: Arc<Machine>, events: EventBus, exit: Sender<Exit>) -> Arc<Self> {
        let settings = Settings {
            parameters: Parameters::default(),
            events: false,
        };
        Arc::new(Migrations {
            machine,
            events,
            exit,
            current: Mutex::new(Current::None),
            settings: Mutex::new(settings),
            measurement: Measurement::default(),
        })
    }

    pub fn settings(&self) -> Settings {
        *lock(&self.settings)
    }

    /// Changes the settings, of a running migration as well.
    pub fn change(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut lock(&self.settings));
        // The two locks are never held together.
        let parameters = self.settings().parameters;
        if let Current::Out(source) = &*lock(&self.current) {
            source.set_parameters(parameters);
        }
    }

    /// Figures of the current or the last migration.
    pub fn info(&self) -> Option<Info> {
        match &*lock(&self.current) {
            Current::None => None,
            Current::Out(source) => Some(source.info()),
            Current::In(destination) => Some(destination.info()),
        }
    }

    /// Starts moving the guest away.
    pub fn send(self: &Arc<Self>, uri: Uri) -> Result<(), QmpError> {
        match self.machine.run_state() {
            RunState::InMigrate => {
                return Err(QmpError::generic(
                    "Guest is waiting for an incoming migration",
                ));
            }
            _ if self.machine.has_left() => {
                let why = "Can't migrate the vm that was paused due to previous migration";
                return Err(QmpError::generic(why));
            }
            _ => {}
        }
        if let Uri::File(path) = &uri
            && let Some(disk) = self.machine.disk_at(path)
        {
            return Err(QmpError::generic(format!(
                "cannot write a snapshot to {uri}: that is the guest's disk '{disk}'"
            )));
        }
        let parameters = self.settings().parameters;
        let mut current = lock(&self.current);
        if current.is_leaving() {
            return Err(QmpError::generic("There's a migration process in progress"));
        }
        // A migration is never refused for the sake of a measurement.
        self.measurement.leave_log();
        let watcher = Box::new(Outgoing(self.clone()));
        let source = Source::start(self.machine.clone(), uri, parameters, watcher)
            .map_err(|e| QmpError::generic(format!("cannot start a migration: {e}")))?;
        *current = Current::Out(source);
        Ok(())
    }

    /// Starts waiting for a guest; returns where.
    pub fn receive(self: &Arc<Self>, uri: &Uri, on_failure: OnFailure) -> anyhow::Result<Uri> {
        let mut current = lock(&self.current);
        if self.machine.run_state() != RunState::InMigrate || matches!(*current, Current::In(_)) {
            anyhow::bail!("'-incoming' was not specified on the command line, or has been used");
        }
        let watcher = Box::new(Incoming {
            migrations: self.clone(),
            on_failure,
        });
        let destination = Destination::start(self.machine.clone(), uri, watcher)?;
        let bound = destination.uri().clone();
        *current = Current::In(destination);
        Ok(bound)
    }

    /// Cancels the migration out, if there is one.
    pub fn cancel(&self) -> Result<(), QmpError> {
        match &*lock(&self.current) {
            Current::Out(source) if !source.info().status.is_final() => {
                source.cancel().map_err(generic)
            }
            _ => Ok(()),
        }
    }

    /// Lets a migration go on that waits before its switch-over.
    pub fn proceed(&self, from: MigrationStatus) -> Result<(), QmpError> {
        let current = lock(&self.current);
        let status = match &*current {
            Current::Out(source) => source.info().status,
            Current::None | Current::In(_) => Status::None,
        };
        match &*current {
            Current::Out(source) if monitor::status(status) == from => {
                source.proceed().map_err(generic)
            }
            _ => Err(QmpError::generic(format!(
                "Migration not in expected state: {status}"
            ))),
        }
    }

    /// Starts to measure how fast the guest dirties its memory.
    pub fn measure(&self, request: CalcDirtyRate) -> Result<(), QmpError> {
        // Held until it has begun, so that no migration begins meanwhile.
        let current = lock(&self.current);
        if self.machine.run_state() == RunState::InMigrate {
            return Err(QmpError::generic(
                "There is no dirty rate to measure: the guest has not arrived yet",
            ));
        }
        if request.method.uses_log() && current.is_leaving() {
            return Err(QmpError::generic(format!(
                "Mode {} cannot be used during a migration, which needs the dirty log itself: use mode \
                 page-sampling, or see dirty-pages-rate in query-migrate",
                request.method
            )));
        }
        self.measurement.start(self.machine.clone(), request)
    }

    /// What has come of the last measurement.
    pub fn measured(&self, unit: TimeUnit) -> Result<DirtyRateInfo, QmpError> {
        self.measurement.info(unit)
    }

    /// Ends whatever is under way; the process is about to.
    pub fn end(&self) {
        let last = {
            let mut current = lock(&self.current);
            self.measurement.end();
            std::mem::replace(&mut *current, Current::None)
        };
        drop(last);
    }

    fn announce(&self, status: Status) {
        if self.settings().events {
            let status = monitor::status(status);
            self.events.emit(Event::Migration(MigrationData { status }));
        }
    }
}

/// Watches a migration out.
struct Outgoing(Arc<Migrations>);

impl Observer for Outgoing {
    fn status(&self, status: Status) {
        self.0.announce(status);
    }

    fn pass(&self, pass: u64) {
        if self.0.settings().events {
            self.0
                .events
                .emit(Event::MigrationPass(MigrationPassData { pass }));
        }
    }
}

/// Watches a migration in.
struct Incoming {
    migrations: Arc<Migrations>,
    on_failure: OnFailure,
}

impl Observer for Incoming {
    fn status(&self, status: Status) {
        self.migrations.announce(status);
        // A guest that arrived undecided is here, paused: its user must be able to look at it.
        let lost = self.migrations.machine.run_state() == RunState::InMigrate;
        if status == Status::Failed && lost && self.on_failure == OnFailure::Exit {
            let why = self.migrations.info().and_then(|info| info.error);
            // Nobody listens any more when the process is ending already.
            let _ = self
                .migrations
                .exit
                .send(Exit::IncomingFailed(why.unwrap_or_default()));
        }
    }

    fn pass(&self, _: u64) {}
}
