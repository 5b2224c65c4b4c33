//! Law 7: whatever is lost on the way, and whenever, at most one host runs the guest; and unless the loss
//! leaves it undecided, the source does, as before.

use std::sync::Arc;

use vmferry_engine::MigrationError;

use crate::common::{
    Effect, Outcome, Proxy, Random, SHUT_LEN, Watched, Way, When, any_port, impatient, listen,
    move_on, parameters, running_guest, send,
};
use crate::toy::PAGES;

/// No stream of a running guest is shorter: all of memory is sent in the first pass.
const ALL_OF_RAM: u64 = PAGES as u64 * 4096;

/// A migration of `here` over a line with a fault.
fn migrate(here: &Arc<Watched>, when: When, effect: Effect) -> (Arc<Watched>, Outcome) {
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let proxy = Proxy::to(incoming.uri()).fault(when, effect).start();
    let outgoing = send(here, &proxy.uri.parse().unwrap(), impatient());
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
    let mut random = Random::new("cut_or_silent_before_the_hand_over");
    // Nothing; inside the header, the description, RAM; between passes, as far as can be foretold.
    let mut moments = vec![0, 3, 8, 40, 100, 4096, ALL_OF_RAM / 2, ALL_OF_RAM];
    moments.extend((0..4).map(|_| random.below(ALL_OF_RAM)));
    let mut moments: Vec<_> = moments
        .into_iter()
        .map(|at| When::Bytes(Way::Forward, at))
        .collect();
    for section in ["vmferry/toy-cpu", "vmferry/run-state"] {
        let all_of_it = section.len() as u64;
        moments.push(When::From(Way::Forward, section.as_bytes(), all_of_it));
    }
    // The return path is used before the hand-over as well.
    moments.extend([0, 3, 8].map(|at| When::Bytes(Way::Back, at)));
    for when in moments {
        let (When::Bytes(way, _) | When::From(way, ..)) = when;
        for effect in [Effect::Cut, Effect::Silence(way)] {
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
    let moments = [0, 1, When::LOADED_LEN - 1];
    for effect in [Effect::Cut, Effect::Silence(Way::Back)] {
        for at in moments {
            println!("after {at} bytes: {effect:?}");
            let here = running_guest();
            let (there, outcome) = migrate(&here, When::from_loaded(at), effect);
            match effect {
                // The destination cannot know that its word was lost, so it keeps the guest for its user.
                Effect::Cut => {
                    assert!(is_undecided(&outcome.destination), "{outcome:?}");
                    there.verify();
                }
                // The source can still tell it that the guest stays.
                _ => {
                    let kept = matches!(outcome.destination, Err(MigrationError::Kept));
                    assert!(kept, "{outcome:?}");
                }
            }
            assert_source_goes_on(&here, &there, &outcome);
        }
    }
}

#[test]
fn run_is_lost() {
    let when = When::from_loaded(When::LOADED_LEN);
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
        (When::LOADED_LEN, Effect::Silence(Way::Back)),
        (When::LOADED_LEN + 1, Effect::Silence(Way::Back)),
        (When::LOADED_LEN + 1, Effect::Cut),
        (When::LOADED_LEN + SHUT_LEN - 1, Effect::Cut),
    ];
    for (at, effect) in moments {
        let here = running_guest();
        let (there, outcome) = migrate(&here, When::from_loaded(at), effect);
        assert!(is_undecided(&outcome.source), "{outcome:?}");
        assert!(outcome.destination.is_ok(), "{outcome:?}");
        here.verify();
        there.verify_arrival();
        there.run_some();
        move_on(&there, parameters()).stop_and_verify();
    }
}

#[test]
fn nothing_is_lost_that_matters() {
    // The last byte has arrived when the line fails.
    let when = When::from_loaded(When::LOADED_LEN + SHUT_LEN);
    for effect in [Effect::Cut, Effect::Silence(Way::Back)] {
        let here = running_guest();
        let (there, outcome) = migrate(&here, when, effect);
        assert!(outcome.source.is_ok() && outcome.destination.is_ok());
        assert!(!here.is_running());
        there.verify_arrival();
        there.run_some();
    }
}
