//! Connections that are cut or fall silent, in either direction, and a destination that stands still.
//!
//! The engine's tests do this at exact bytes of the stream; here it is whether the processes and their users get
//! out of it well.

use rustix::process::Signal;
use serde_json::{Value, json};
use vmferry_control::schema::{MigrationStatus, RunState};
use vmferry_testing::proxy::{Effect, Proxy, Way, When};

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::outcome::{arrived, assert_undecided, gives_up};
use crate::common::vm::Vm;

fn impatient(lab: &Lab) -> Guest<'_> {
    let mut guest = Guest::boot(lab, Shape::small());
    guest.be_impatient();
    guest
}

/// A failure that leaves the guest running on the source and ends the destination's process.
fn survives(guest: &mut Guest<'_>, mut destination: Vm, proxy: Proxy, source_says: &[&str]) {
    let words = guest.vm.migrate_command(&proxy.uri, &[]).failed();
    assert!(
        source_says.iter().any(|part| words.contains(part)),
        "{words}"
    );
    guest.runs_on();
    // Whoever made it silent ends the connection at last.
    drop(proxy);
    let words = destination.ends_with_error();
    assert!(words.contains("the guest did not arrive"), "{words}");
}

#[test]
fn on_the_way_to_the_destination() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = impatient(&lab);
    for bytes in [0, 10, 3000, 40 << 20] {
        for (effect, words) in [
            (Effect::Cut, &["broke", "closed the channel"][..]),
            (
                Effect::Stall(Way::Forward),
                &["ms (x-vmferry-peer-timeout)"],
            ),
        ] {
            let mut destination = guest.tcp_destination();
            let place = When::Bytes(Way::Forward, bytes);
            let proxy = Proxy::to(destination.uri()).fault(place, effect).start();
            survives(&mut guest, destination, proxy, words);
        }
    }
    guest.hop();
    guest.verifies_all();
}

/// The destination cannot know whether its word was heard. It keeps the guest, paused, and says so; unless the
/// source, which only does not hear it, tells it otherwise.
#[test]
fn the_word_that_it_is_loaded_is_lost() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = impatient(&lab);
    let nothing_comes_back = Effect::Stall(Way::Back);
    for (effect, part) in [
        (Effect::Cut, "closed the channel"),
        (nothing_comes_back, "not said that it has loaded the guest"),
    ] {
        let mut destination = guest.tcp_destination();
        let proxy = Proxy::to(destination.uri())
            .fault(When::BEFORE_LOADED, effect)
            .start();
        let words = guest.vm.migrate_command(&proxy.uri, &[]).failed();
        assert!(words.contains(part), "{words}");
        guest.runs_on();
        drop(proxy);
        if effect == nothing_comes_back {
            gives_up(&mut destination);
        } else {
            assert_undecided(&mut destination, "If it runs on the source, quit this one");
            assert!(destination.quit().success());
        }
    }
    guest.hop();
    guest.verifies_all();
}

/// Nobody can know on which side it is to go on: both wait for their user.
#[test]
fn the_word_that_it_is_given_away_is_lost() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = impatient(&lab);
    let mut destination = guest.tcp_destination();
    let proxy = Proxy::to(destination.uri())
        .fault(When::BEHIND_LOADED, Effect::Cut)
        .start();
    let words = guest.vm.migrate_command(&proxy.uri, &[]).failed();
    assert!(words.contains("during the hand-over"), "{words}");
    assert_undecided(
        &mut guest.vm,
        "If it runs on the destination, quit this one",
    );
    guest.stands_still();
    drop(proxy);
    // The cut may come before or behind the last word to the destination; the user finds out.
    if arrived(&mut destination) {
        guest.moved_to(destination);
    } else {
        assert_undecided(&mut destination, "If it runs on the source, quit this one");
        assert!(destination.quit().success());
        guest.vm.execute("cont", Value::Null);
    }
    guest.verifies_all();
    guest.hop();
    guest.works();
}

/// The guest runs on the destination, and the source never hears of it.
#[test]
fn the_word_that_it_runs_is_lost() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = impatient(&lab);
    let mut destination = guest.tcp_destination();
    let proxy = Proxy::to(destination.uri())
        .fault(When::BEHIND_LOADED, Effect::Stall(Way::Back))
        .start();
    let words = guest.vm.migrate_command(&proxy.uri, &[]).failed();
    assert!(words.contains("during the hand-over"), "{words}");
    assert_undecided(
        &mut guest.vm,
        "If it runs on the destination, quit this one",
    );
    destination.wait_for_state(RunState::Running);
    drop(proxy);
    guest.moved_to(destination);
    guest.works();
    guest.be_impatient();
    guest.hop();
    guest.verifies_all();
}

/// Its kernel takes the connection and some of the stream, but the process does not read it.
#[test]
fn a_destination_that_stands_still() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = impatient(&lab);
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    destination.signal(Signal::STOP);
    let words = guest.vm.migrate_command(&uri, &[]).failed();
    for part in [
        "the destination has not taken any data for",
        "x-vmferry-peer-timeout",
        "is it stopped, or the network down?",
    ] {
        assert!(words.contains(part), "{words}");
    }
    guest.runs_on();
    destination.signal(Signal::CONT);
    let words = destination.ends_with_error();
    assert!(words.contains("the guest did not arrive"), "{words}");
    guest.hop();
    guest.works();
}

/// In the middle of the stream, the same.
#[test]
fn a_destination_that_comes_to_a_stop() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = impatient(&lab);
    let (mut destination, _) = guest.begin_slow_migration();
    crate::common::eventually("some pages to be sent", || {
        let ram = guest.vm.info().ram?;
        (ram.transferred > 1 << 20).then_some(())
    });
    destination.signal(Signal::STOP);
    let info = guest.vm.migration_ends();
    assert_eq!(info.status, Some(MigrationStatus::Failed));
    let why = info.error_desc.expect("a reason");
    assert!(why.contains("not taken any data"), "{why}");
    guest.runs_on();
    destination.signal(Signal::CONT);
    destination.ends_with_error();
    guest.vm.set_parameters(json!({"max-bandwidth": 0}));
    guest.hop();
    guest.verifies_all();
}
