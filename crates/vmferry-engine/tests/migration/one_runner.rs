//! Law 7: whatever is lost on the way, and whenever, at most one host runs the guest; and unless the loss
//! leaves it undecided, the source does, as before.

use std::sync::Arc;

use vmferry_engine::MigrationError;

use crate::common::{
    Effect, Fault, Outcome, Proxy, Random, Watched, Way, When, any_port, listen, move_on,
    parameters, running_guest, send,
};
use crate::toy::PAGES;

/// Length of `HandoverLoaded`, the first message of the return path.
const HANDOVER_LOADED: u64 = 4;
/// Length of `Shut`, the second.
const SHUT: u64 = 8;
/// No stream of a running guest is shorter: all of memory is sent in the first pass.
const ALL_OF_RAM: u64 = PAGES as u64 * 4096;

/// A migration of `here` over a line with a fault.
fn migrate(here: &Arc<Watched>, when: When, effect: Effect) -> (Arc<Watched>, Outcome) {
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let proxy = Proxy::start(incoming.uri(), Fault { when, effect });
    let outgoing = send(here, &proxy.uri(), parameters());
    let outcome = Outcome {
        source: outgoing.wait(),
        destination: incoming.wait(),
    };
    here.assert_one_runner();
    (there, outcome)
}

fn is_undecided(end: &Result<(), MigrationError>) -> bool {
    matches!(end, Err(MigrationError::Undecided { .. }))
}

/// The migration failed as though it had never been tried.
fn assert_source_goes_on(here: &Arc<Watched>, there: &Arc<Watched>, outcome: &Outcome) {
    assert!(outcome.source.is_err() && !is_undecided(&outcome.source));
    assert!(outcome.destination.is_err());
    assert!(!there.is_running());
    here.run_some();
    // Nor has the failure left anything in the way of the next one.
    move_on(here, parameters()).stop_and_verify();
}

/// Nobody runs the guest, both sides say so, and either copy is whole.
fn assert_user_decides(here: &Arc<Watched>, there: &Arc<Watched>, outcome: &Outcome) {
    assert!(is_undecided(&outcome.source) && is_undecided(&outcome.destination));
    assert_eq!(here.verify(), there.verify());
}

#[test]
fn cut_or_silent_before_the_hand_over() {
    let mut random = Random::from_env("cut_or_silent_before_the_hand_over");
    // Nothing; inside the header, the description, RAM; between passes, as far as can be foretold.
    let mut moments = vec![0, 3, 8, 40, 100, 4096, ALL_OF_RAM / 2, ALL_OF_RAM];
    moments.extend((0..4).map(|_| random.below(ALL_OF_RAM)));
    let mut moments: Vec<_> = moments
        .into_iter()
        .map(|at| When::Bytes(Way::Forward, at))
        .collect();
    moments.push(When::Text("vmferry/toy-cpu"));
    moments.push(When::Text("vmferry/run-state"));
    for when in moments {
        for effect in [Effect::Cut, Effect::Silence(Way::Forward)] {
            println!("{when:?}: {effect:?}");
            let here = running_guest();
            let (there, outcome) = migrate(&here, when, effect);
            println!("  {outcome:?}");
            assert_source_goes_on(&here, &there, &outcome);
        }
    }
}

#[test]
fn loaded_is_lost() {
    let moments = [0, 1, HANDOVER_LOADED - 1];
    for effect in [Effect::Cut, Effect::Silence(Way::Back)] {
        for at in moments {
            // A line that is cut before the first byte never got as far as this.
            if let (0, Effect::Cut) = (at, effect) {
                continue;
            }
            println!("after {at} bytes: {effect:?}");
            let here = running_guest();
            let (there, outcome) = migrate(&here, When::Bytes(Way::Back, at), effect);
            // The destination cannot know that its word was lost, so it keeps the guest for its user.
            assert!(is_undecided(&outcome.destination), "{outcome:?}");
            there.verify();
            assert_source_goes_on(&here, &there, &outcome);
        }
    }
}

#[test]
fn run_is_lost() {
    let when = When::Bytes(Way::Back, HANDOVER_LOADED);
    for effect in [Effect::Cut, Effect::Silence(Way::Forward)] {
        for chosen in ["here", "there"] {
            let here = running_guest();
            let (there, outcome) = migrate(&here, when, effect);
            assert_user_decides(&here, &there, &outcome);
            let (runs, stays) = match chosen {
                "here" => (&here, &there),
                _ => (&there, &here),
            };
            runs.run();
            runs.run_some();
            assert!(!stays.is_running());
            move_on(runs, parameters()).stop_and_verify();
        }
    }
}

#[test]
fn shut_is_lost() {
    let moments = [
        (HANDOVER_LOADED, Effect::Silence(Way::Back)),
        (HANDOVER_LOADED + 1, Effect::Silence(Way::Back)),
        (HANDOVER_LOADED + 1, Effect::Cut),
        (HANDOVER_LOADED + SHUT - 1, Effect::Cut),
    ];
    for (at, effect) in moments {
        let here = running_guest();
        let (there, outcome) = migrate(&here, When::Bytes(Way::Back, at), effect);
        assert!(is_undecided(&outcome.source), "{outcome:?}");
        assert!(outcome.destination.is_ok(), "{outcome:?}");
        here.verify();
        assert!(there.is_running());
        there.run_some();
        move_on(&there, parameters()).stop_and_verify();
    }
}

#[test]
fn nothing_is_lost_that_matters() {
    // The last byte has arrived when the line fails.
    let when = When::Bytes(Way::Back, HANDOVER_LOADED + SHUT);
    for effect in [Effect::Cut, Effect::Silence(Way::Back)] {
        let here = running_guest();
        let (there, outcome) = migrate(&here, when, effect);
        assert!(outcome.source.is_ok() && outcome.destination.is_ok());
        assert!(!here.is_running());
        there.run_some();
        there.stop_and_verify();
    }
}
