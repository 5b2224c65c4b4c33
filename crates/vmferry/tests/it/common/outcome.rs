//! The three ways in which a disturbed migration may end, and what must be true in each.

use std::time::Duration;

use serde_json::{Value, json};
use vmferry_control::schema::{MigrationInfo, MigrationStatus, RunState};

use super::guest::Guest;
use super::vm::Vm;
use super::{Random, eventually, say};

/// When a migration is disturbed.
#[derive(Clone, Copy, Debug)]
pub enum Phase {
    /// While it connects and sets up.
    Connection,
    /// At any time.
    Ram,
    /// When the guest has just been stopped for its last pages and the hand-over.
    SwitchOver,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The migration failed or was cancelled, and the guest runs where it was.
    RanOn,
    /// The migration was over first.
    Arrived,
    /// The hand-over was decided and its confirmation lost: the guest is paused, and the user is told what to do.
    Undecided,
}

/// How often each.
#[derive(Debug, Default)]
pub struct Tally {
    pub ran_on: usize,
    pub arrived: usize,
    pub undecided: usize,
}

impl Tally {
    pub fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::RanOn => self.ran_on += 1,
            Outcome::Arrived => self.arrived += 1,
            Outcome::Undecided => self.undecided += 1,
        }
    }
}

/// The phases in turn.
pub fn phase(round: usize) -> Phase {
    [Phase::Connection, Phase::Ram, Phase::SwitchOver][round % 3]
}

/// How long a guest's migrations usually take.
#[derive(Clone, Copy, Debug)]
pub struct Usual {
    total: Duration,
    downtime: Duration,
}

impl Usual {
    pub fn of(info: &MigrationInfo) -> Self {
        Usual {
            total: Duration::from_millis(info.total_time.expect("it is known at the end")),
            downtime: Duration::from_micros(
                info.x_vmferry_downtime_us.expect("it is known at the end"),
            ),
        }
    }
}

/// Starts a migration of a guest, and returns at a random moment of a phase.
pub fn migrate_until(
    guest: &mut Guest<'_>,
    uri: &str,
    phase: Phase,
    usual: Usual,
    random: &mut Random,
) {
    /// Longer than connecting takes.
    const CONNECTING: Duration = Duration::from_millis(15);
    guest.vm.set_capability("events", true);
    guest.vm.forget_events();
    guest.vm.execute("migrate", json!({"uri": uri}));
    let delay = match phase {
        Phase::Connection => random.up_to(CONNECTING),
        Phase::Ram => random.up_to(usual.total),
        Phase::SwitchOver => {
            guest.vm.events_until("MIGRATION device");
            random.up_to(usual.downtime)
        }
    };
    std::thread::sleep(delay);
}

/// Waits for the end, and holds the source to what must be true of it then. An undecided guest is continued, as
/// its destination is known to be gone.
#[track_caller]
pub fn conclude(guest: &mut Guest<'_>) -> Outcome {
    let info = guest.vm.migration_ends();
    match info.status {
        Some(MigrationStatus::Completed) => {
            guest.vm.wait_for_state(RunState::Postmigrate);
            Outcome::Arrived
        }
        Some(MigrationStatus::Cancelled) => {
            guest.runs_on();
            Outcome::RanOn
        }
        Some(MigrationStatus::Failed) => {
            let why = info.error_desc.expect("a failure has a reason");
            if guest.vm.run_state() == RunState::Running {
                guest.runs_on();
                return Outcome::RanOn;
            }
            assert_eq!(guest.vm.run_state(), RunState::Paused, "{why}");
            for words in [
                "during the hand-over",
                "paused here",
                "quit this one",
                "'cont'",
            ] {
                assert!(why.contains(words), "no '{words}': {why}");
            }
            guest.vm.execute("cont", Value::Null);
            guest.runs_on();
            Outcome::Undecided
        }
        other => panic!("the migration is over, and {other:?}"),
    }
}

/// A destination whose source keeps its guest: how it learns of that depends on how far it was.
#[track_caller]
pub fn gives_up(destination: &mut Vm) {
    let state = eventually("the destination to notice", || {
        if !destination.lives() {
            return Some(None);
        }
        // It may end between two looks.
        let info = destination.qmp.query_migrate().ok()?;
        // One that nobody has connected to goes on waiting.
        let settled = [MigrationStatus::Setup, MigrationStatus::Failed];
        let status = info.status.filter(|status| settled.contains(status))?;
        Some(Some((status, info.error_desc)))
    });
    match state {
        None => {
            let words = destination.ends_with_error();
            assert!(words.contains("the guest did not arrive"), "{words}");
        }
        Some((MigrationStatus::Setup, _)) => {}
        // It had loaded the guest, and was not told that it will not get it: it keeps it, stopped.
        Some((_, Some(why))) if why.contains("during the hand-over") => {
            assert_eq!(destination.run_state(), RunState::Paused);
            say("a destination was not told that its source keeps the guest");
        }
        Some(_) => {
            destination.ends_with_error();
        }
    }
}

/// Whether a guest runs on its destination, where it does if the last word of the hand-over came through.
#[track_caller]
pub fn arrived(destination: &mut Vm) -> bool {
    eventually("the destination to know", || {
        if destination.run_state() == RunState::Running {
            return Some(true);
        }
        (destination.info().status == Some(MigrationStatus::Failed)).then_some(false)
    })
}

/// The guest is paused, and its user is told what to do.
#[track_caller]
pub fn assert_undecided(vm: &mut Vm, what_to_do: &str) {
    vm.wait_for_status(MigrationStatus::Failed);
    let why = vm.info().error_desc.expect("a reason");
    assert!(why.contains("the guest is paused here"), "{why}");
    assert!(why.contains(what_to_do), "{why}");
    assert_eq!(vm.run_state(), RunState::Paused);
    assert!(vm.lives());
}
