//! A migration's state machine, against users who do anything at any time and peers that go away.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use vmferry_engine::{Destination, MigrationError, Parameters, Source, Status, SteerError};

use crate::common::{
    Outcome, Recorder, Watched, any_port, listen, move_on, parameters, running_guest, send,
    wait_until,
};

#[derive(Clone, Copy, Debug)]
enum Action {
    Wait(u64),
    Cancel,
    Proceed,
    /// Bytes a second.
    Bandwidth(Option<u64>),
    /// Milliseconds.
    DowntimeLimit(u64),
    PauseBeforeSwitchover(bool),
    /// The destination's user gives up, or its process dies.
    DestinationDies,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => (0..8u64).prop_map(Action::Wait),
        1 => Just(Action::Cancel),
        2 => Just(Action::Proceed),
        2 => prop_oneof![Just(None), Just(Some(8 << 20)), Just(Some(200 << 20))]
            .prop_map(Action::Bandwidth),
        2 => prop_oneof![Just(0), Just(300)].prop_map(Action::DowntimeLimit),
        2 => any::<bool>().prop_map(Action::PauseBeforeSwitchover),
        1 => Just(Action::DestinationDies),
    ]
}

/// A migration and all that its user can get at.
struct Steered {
    outgoing: Source,
    incoming: Option<Destination>,
    parameters: Parameters,
    /// A cancellation was accepted.
    cancelled: bool,
}

impl Steered {
    fn act(&mut self, action: Action) {
        match action {
            Action::Wait(ms) => std::thread::sleep(Duration::from_millis(ms)),
            Action::Cancel => match self.outgoing.cancel() {
                Ok(()) => self.cancelled = true,
                Err(error) => assert_eq!(error, SteerError::TooLate),
            },
            Action::Proceed => match self.outgoing.proceed() {
                Ok(()) => {}
                Err(SteerError::NotWaiting(status)) => assert_ne!(status, Status::PreSwitchover),
                Err(other) => panic!("{other}"),
            },
            Action::Bandwidth(limit) => self.parameters.max_bandwidth = limit,
            Action::DowntimeLimit(ms) => self.parameters.downtime_limit = Duration::from_millis(ms),
            Action::PauseBeforeSwitchover(pause) => self.parameters.pause_before_switchover = pause,
            Action::DestinationDies => drop(self.incoming.take()),
        }
        self.outgoing.set_parameters(self.parameters);
    }

    /// Lets it come to its end, whatever was done to it.
    fn end(mut self) -> Outcome {
        self.act(Action::Bandwidth(None));
        self.act(Action::DowntimeLimit(300));
        wait_until("the end", || {
            let _ = self.outgoing.proceed();
            self.outgoing.info().status.is_final()
        });
        Outcome {
            source: self.outgoing.wait(),
            // A destination that died was dropped, which stops it like cancelling.
            destination: self
                .incoming
                .map_or(Err(MigrationError::Cancelled), Destination::wait),
        }
    }
}

fn check(here: &Arc<Watched>, actions: &[Action]) -> Arc<Watched> {
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let recorder = Recorder::default();
    let parameters = parameters();
    let uri = incoming.uri().clone();
    let observer = Box::new(recorder.clone());
    let mut steered = Steered {
        outgoing: Source::start(here.clone(), uri, parameters, observer).unwrap(),
        incoming: Some(incoming),
        parameters,
        cancelled: false,
    };
    for &action in actions {
        steered.act(action);
    }
    let cancelled = steered.cancelled;
    let outcome = steered.end();
    recorder.check();
    here.assert_one_runner();
    match &outcome.source {
        Ok(()) => {
            assert!(!cancelled, "{outcome:?}");
            assert!(there.is_running() && !here.is_running(), "{outcome:?}");
            there
        }
        Err(MigrationError::Undecided { .. }) => {
            assert!(!cancelled, "{outcome:?}");
            assert!(!here.is_running());
            if there.is_running() {
                return there;
            }
            assert_eq!(here.verify(), there.verify());
            here.run();
            here.clone()
        }
        Err(_) => {
            assert!(here.is_running() && !there.is_running(), "{outcome:?}");
            here.clone()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        max_shrink_iters: 50,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_user_and_any_peer(actions in prop::collection::vec(action(), 0..12)) {
        let here = running_guest();
        let left = check(&here, &actions);
        left.verify_arrival();
        left.run_some();
    }
}

#[test]
fn a_destination_that_dies_before_the_switch_over_is_noticed() {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let pausing = Parameters {
        pause_before_switchover: true,
        ..parameters()
    };
    let outgoing = send(&here, incoming.uri(), pausing);
    wait_until("pre-switchover", || {
        outgoing.info().status == Status::PreSwitchover
    });
    drop(incoming);
    // Nobody says 'migrate-continue', and the guest goes on all the same.
    assert!(outgoing.wait().is_err());
    here.run_some();
    move_on(&here, parameters()).stop_and_verify();
}
