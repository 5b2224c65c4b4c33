//! A guest that was handed over does not run on its source as well, unless the user insists (law 7).

use serde_json::{Value, json};
use vmferry_control::schema::RunState;

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::vm::Vm;

/// Every way to start what has left.
#[track_caller]
fn stays_away(source: &mut Vm) {
    let refused = |source: &mut Vm| {
        let words = source.refuse("cont", Value::Null);
        for part in ["handed over", "\"x-vmferry-run-twice\": true"] {
            assert!(words.contains(part), "no {part}: {words}");
        }
    };
    refused(source);
    source.execute("stop", Value::Null);
    refused(source);
    source.execute("system_reset", Value::Null);
    assert_eq!(source.run_state(), RunState::Prelaunch);
    refused(source);
    let snapshot = json!({"uri": "file:/nowhere/snapshot"});
    let words = source.refuse("migrate", snapshot);
    assert!(words.contains("due to previous migration"), "{words}");
    let explicit = json!({"x-vmferry-run-twice": false});
    source.refuse("cont", explicit);
    assert_eq!(source.run_state(), RunState::Prelaunch);
}

#[test]
fn a_source_keeps_its_hands_off_a_guest_that_it_handed_over() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    guest.vm.migrate(&uri);
    destination.wait_for_state(RunState::Running);
    stays_away(&mut guest.vm);

    // Who insists gets it. The copy here is a new start, so the one there is not disturbed.
    destination.kill();
    let insist = json!({"x-vmferry-run-twice": true});
    guest.vm.execute("cont", insist);
    assert_eq!(guest.vm.run_state(), RunState::Running);
    // It is this machine's again.
    guest.vm.execute("stop", Value::Null);
    guest.vm.execute("cont", Value::Null);
}

/// A destination that has sent its guest on is a source like any other.
#[test]
fn so_does_a_host_on_its_way() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.hop();
    let mut destination = Vm::start(&lab, &["--memory", "256M", "--incoming", "tcp:127.0.0.1:0"]);
    let uri = destination.uri();
    guest.vm.migrate(&uri);
    destination.wait_for_state(RunState::Running);
    let words = guest.vm.refuse("cont", Value::Null);
    assert!(words.contains("handed over"), "{words}");
    guest.moved_to(destination);
    guest.works();
}

/// A file, a command and a pipe cannot say whether anybody has taken the guest: its user knows.
#[test]
fn what_was_only_written_may_go_on() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    for uri in ["exec:cat > /dev/null", &lab.uri("file", "snapshot")] {
        guest.vm.migrate(uri);
        guest.vm.wait_for_state(RunState::Postmigrate);
        guest.vm.execute("cont", Value::Null);
        guest.runs_on();
    }
}
