//! Guests that do not run when they arrive, because the user of their destination wants it so.

use serde_json::Value;
use vmferry_control::schema::RunState;

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::vm::Vm;

/// Moves the guest to `destination`, where it must not run before `cont`.
fn arrives_paused(mut guest: Guest<'_>, mut destination: Vm) {
    let uri = destination.uri();
    guest.vm.migrate(&uri);
    destination.wait_for_state(RunState::Paused);
    guest.moved_to(destination);
    guest.stands_still();
    guest.vm.execute("cont", Value::Null);
    guest.runs_on();
    guest.verifies_all();
}

#[test]
fn because_of_an_option() {
    let Some(lab) = Lab::new() else { return };
    let guest = Guest::boot(&lab, Shape::small());
    let args = ["--memory", "256M", "--paused"];
    let incoming = ["--incoming", "tcp:127.0.0.1:0"];
    let destination = Vm::start(&lab, &[&args[..], &incoming].concat());
    arrives_paused(guest, destination);
}

#[test]
fn because_it_was_stopped_while_it_was_awaited() {
    let Some(lab) = Lab::new() else { return };
    let guest = Guest::boot(&lab, Shape::small());
    let mut destination = guest.tcp_destination();
    destination.execute("stop", Value::Null);
    assert_eq!(destination.run_state(), RunState::Inmigrate);
    arrives_paused(guest, destination);
}

/// `cont` undoes both; and a snapshot is resumed as any other guest that arrives.
#[test]
fn unless_the_user_thinks_better_of_it() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.vm.migrate(&lab.uri("file", "snapshot"));
    let machine = ["--memory", "256M", "--paused", "--incoming"];
    let mut destination = Vm::start(&lab, &[&machine[..], &["defer"]].concat());
    for command in ["cont", "stop", "cont"] {
        destination.execute(command, Value::Null);
    }
    let snapshot = serde_json::json!({"uri": lab.uri("file", "snapshot")});
    destination.execute("migrate-incoming", snapshot);
    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
    guest.works();
}
