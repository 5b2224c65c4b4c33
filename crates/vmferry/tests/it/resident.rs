//! The memory that a guest takes on its host after a move: what it uses, and not what was prepared for it in vain.

use serde_json::json;
use vmferry_control::schema::{MigrationStatus, RunState};

use crate::common::eventually;
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::say;
use crate::common::vm::Vm;

const MIB: u64 = 1 << 20;

/// More than the guest uses with all that the process needs for itself, and far less than the guest has.
const LITTLE: u64 = 100 * MIB;

/// A guest that uses 32 MiB and little more of its 512 MiB.
fn shape() -> Shape {
    Shape {
        memory: "512M",
        load: "ws=32M rate=2000 pattern=random sweep=20000".to_owned(),
        ..Shape::small()
    }
}

/// Bytes of memory that the process has, by `/proc/PID/smaps_rollup`.
fn resident(vm: &Vm) -> u64 {
    let path = format!("/proc/{}/smaps_rollup", vm.pid());
    let rollup = std::fs::read_to_string(path).expect("the process lives");
    let kib = rollup.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kib = kib.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("a number of KiB") << 10
}

/// Waits until a destination has prepared much more than its guest will need.
fn prepares(vm: &Vm) {
    eventually("memory to be populated", || {
        (resident(vm) > 2 * LITTLE).then_some(())
    });
}

#[track_caller]
fn has_little(what: &str, vm: &Vm) {
    let bytes = resident(vm);
    say(&format!("{what}: {} MiB resident", bytes / MIB));
    assert!(bytes < LITTLE, "{what}: {} MiB resident", bytes / MIB);
}

/// Moves the guest to a destination that has prepared memory in vain.
fn hop(guest: &mut Guest) {
    let mut destination = guest.tcp_destination();
    prepares(&destination);
    guest.vm.migrate(&destination.uri());
    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
}

#[test]
fn zeros_leave_nothing_behind() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, shape());
    has_little("the source", &guest.vm);
    for time in ["once", "twice"] {
        hop(&mut guest);
        has_little(&format!("moved {time}"), &guest.vm);
    }
    guest.verifies_all();
}

#[test]
fn hints_leave_nothing_behind() {
    let Some(lab) = Lab::new() else { return };
    let load = "ws=32M rate=2000 pattern=random sweep=20000 hints=on".to_owned();
    let more = vec!["--balloon".to_owned()];
    let mut guest = Guest::boot(
        &lab,
        Shape {
            load,
            more,
            ..shape()
        },
    );
    hop(&mut guest);
    has_little("moved with hints", &guest.vm);
    guest.verifies_all();
}

#[test]
fn migrations_that_fail_leave_nothing_behind() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, shape());
    let mut destination = guest.destination("defer");
    let to = lab.uri("unix", "in");
    let wait = json!({"uri": to, "exit-on-error": false});
    destination.execute("migrate-incoming", wait);
    prepares(&destination);
    guest.vm.set_parameters(json!({"max-bandwidth": 4 << 20}));
    guest.vm.execute("migrate", json!({"uri": to}));
    guest.vm.wait_for_status(MigrationStatus::Active);
    guest.vm.execute("migrate_cancel", json!({}));
    guest.vm.wait_for_status(MigrationStatus::Cancelled);
    guest.runs_on();
    has_little("the source after a cancelled migration", &guest.vm);
    destination.wait_for_status(MigrationStatus::Failed);
    has_little("the destination of a cancelled migration", &destination);
    guest.verifies_all();
}
