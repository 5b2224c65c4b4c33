//! What the monitor's user can make of a migration, and what is refused.

use serde_json::{Value, json};
use vmferry_control::schema::{MigrationStatus, RunState};

use crate::common::eventually;
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::vm::Vm;

#[test]
fn a_destination_that_is_told_later_where_to_listen() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let mut destination = guest.destination("defer");
    assert_eq!(destination.run_state(), RunState::Inmigrate);
    assert_eq!(destination.info().status, None);
    // An address that cannot be had leaves it waiting for a better one.
    let words = destination.refuse("migrate-incoming", json!({"uri": "tcp:192.0.2.1:0"}));
    assert!(
        words.contains("cannot listen at tcp:192.0.2.1:0"),
        "{words}"
    );
    destination.execute("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}));
    let again = destination.refuse("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}));
    assert!(again.contains("'-incoming' was not specified"), "{again}");
    let uri = destination.uri();
    guest.vm.migrate(&uri);
    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
    guest.verifies_all();
}

/// With `exit-on-error` off, the process stays to be asked why.
#[test]
fn a_destination_that_stays_after_a_failure() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let mut destination = Vm::start(&lab, &["--memory", "512M", "--incoming", "defer"]);
    let arguments = json!({"uri": "tcp:127.0.0.1:0", "exit-on-error": false});
    destination.execute("migrate-incoming", arguments);
    let uri = destination.uri();
    guest.vm.migrate_command(&uri, &[]).failed();
    destination.wait_for_status(MigrationStatus::Failed);
    let why = destination.info().error_desc.expect("a reason");
    assert!(why.contains("start it with --memory 256MiB"), "{why}");
    assert_eq!(destination.run_state(), RunState::Inmigrate);
    assert!(destination.quit().success());
    guest.runs_on();
}

#[test]
fn a_paused_guest_arrives_paused() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.vm.execute("stop", Value::Null);
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    guest.vm.migrate_command(&uri, &[]).succeeded();
    destination.wait_for_state(RunState::Paused);
    guest.moved_to(destination);
    guest.stands_still();
    guest.vm.execute("cont", Value::Null);
    guest.runs_on();
    guest.verifies_all();
}

#[test]
fn the_user_decides_on_the_switch_over() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.vm.set_capability("pause-before-switchover", true);
    let go_on = json!({"state": "pre-switchover"});
    let words = guest.vm.refuse("migrate-continue", go_on.clone());
    assert!(words.contains("not in expected state: none"), "{words}");

    // Cancelled there, the guest goes on here.
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    guest.vm.execute("migrate", json!({"uri": uri}));
    guest.vm.wait_for_status(MigrationStatus::PreSwitchover);
    assert_eq!(guest.vm.run_state(), RunState::FinishMigrate);
    guest.stands_still();
    guest.vm.execute("migrate_cancel", Value::Null);
    guest.vm.wait_for_status(MigrationStatus::Cancelled);
    guest.runs_on();
    destination.ends_with_error();

    // Continued there, it goes on elsewhere.
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    guest.vm.execute("migrate", json!({"uri": uri}));
    guest.vm.wait_for_status(MigrationStatus::PreSwitchover);
    let words = guest.vm.refuse("cont", Value::Null);
    assert!(words.contains("migration"), "{words}");
    guest.vm.execute("migrate-continue", go_on);
    destination.wait_for_state(RunState::Running);
    guest.vm.wait_for_status(MigrationStatus::Completed);
    guest.moved_to(destination);
    guest.verifies_all();
}

/// A destination that dies while its source waits is noticed, and the guest goes on.
#[test]
fn a_destination_dies_before_the_switch_over() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.vm.set_capability("pause-before-switchover", true);
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    guest.vm.execute("migrate", json!({"uri": uri}));
    guest.vm.wait_for_status(MigrationStatus::PreSwitchover);
    destination.kill();
    guest.vm.wait_for_status(MigrationStatus::Failed);
    guest.runs_on();
    guest.vm.set_capability("pause-before-switchover", false);
    guest.hop();
    guest.works();
}

#[test]
fn a_source_that_is_kept() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    let kept = guest.vm.migrate_command(&uri, &["--keep-source"]);
    assert!(kept.succeeded().contains("The guest has moved to"));
    guest.vm.wait_for_state(RunState::Postmigrate);
    let words = guest.vm.refuse("migrate", json!({"uri": uri}));
    assert_eq!(
        words,
        "Can't migrate the vm that was paused due to previous migration"
    );
    destination.wait_for_state(RunState::Running);
    // Ends the old one with `quit`.
    guest.moved_to(destination);
    guest.works();
}

/// The same with `--detach`: the process stays until somebody ends it.
#[test]
fn a_migration_in_the_background() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    let words = guest.vm.migrate_command(&uri, &["--detach"]).succeeded();
    assert!(
        words.contains("vmferry status --watch --qmp unix:"),
        "{words}"
    );
    guest.vm.wait_for_status(MigrationStatus::Completed);
    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
    guest.works();
}

#[test]
fn one_migration_at_a_time() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let (mut destination, uri) = guest.begin_slow_migration();
    let words = guest.vm.refuse("migrate", json!({"uri": uri}));
    assert_eq!(words, "There's a migration process in progress");
    let words = guest.vm.migrate_command(&uri, &[]).failed();
    assert!(
        words.contains("There's a migration process in progress"),
        "{words}"
    );
    let words = destination.refuse("migrate", json!({"uri": uri}));
    assert_eq!(words, "Guest is waiting for an incoming migration");
    let words = destination.refuse("system_reset", Value::Null);
    assert!(words.contains("it has not arrived yet"), "{words}");
    // The first one is none the worse for it. A live limit is lifted at once.
    assert_eq!(guest.vm.info().status, Some(MigrationStatus::Active));
    guest.vm.set_parameters(json!({"max-bandwidth": 0}));
    destination.wait_for_state(RunState::Running);
    guest.vm.wait_for_status(MigrationStatus::Completed);
    guest.moved_to(destination);
    guest.verifies_all();
}

/// The user of a guest goes on using it while it migrates.
#[test]
fn stop_and_cont_while_it_migrates() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.vm.set_parameters(json!({"max-bandwidth": 64 << 20}));
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    guest.vm.execute("migrate", json!({"uri": uri}));
    guest.vm.wait_for_status(MigrationStatus::Active);
    guest.vm.execute("stop", Value::Null);
    assert_eq!(guest.vm.run_state(), RunState::Paused);
    guest.vm.execute("cont", Value::Null);
    assert_eq!(guest.vm.run_state(), RunState::Running);
    guest.vm.execute("stop", Value::Null);
    guest.vm.wait_for_status(MigrationStatus::Completed);
    destination.wait_for_state(RunState::Paused);
    guest.moved_to(destination);
    guest.vm.execute("cont", Value::Null);
    guest.verifies_all();
}

/// A guest that left into a file may be continued here, as with QEMU: whoever took the snapshot decides.
#[test]
fn a_snapshot_is_taken_and_the_guest_goes_on() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let file = lab.uri("file", "snapshot");
    guest.vm.migrate(&file);
    guest.vm.wait_for_state(RunState::Postmigrate);
    guest.vm.execute("cont", Value::Null);
    guest.runs_on();
    guest.hop();
    guest.verifies_all();
}

#[test]
fn a_guest_is_reset_after_its_journey() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let cmdline = format!("vcpus=1 {}", guest.shape.load);
    let kernel = ["--kernel", "guest:dirtier", "--cmdline", &cmdline];
    let incoming = ["--memory", "256M", "--incoming", "tcp:127.0.0.1:0"];
    let mut with_kernel = Vm::start(&lab, &[kernel, incoming].concat());
    guest.vm.migrate(&with_kernel.uri());
    with_kernel.wait_for_state(RunState::Running);
    guest.moved_to(with_kernel);
    guest.works();
    guest.vm.execute("system_reset", Value::Null);
    eventually("the guest to start anew", || {
        let text = std::fs::read_to_string(&guest.vm.serial).ok()?;
        text.contains("dirtier: ready ").then_some(())
    });

    // Where there is no kernel, it says so, and the guest goes on.
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.hop();
    let words = guest.vm.refuse("system_reset", Value::Null);
    assert!(
        words.contains("start the destination with the source's --kernel"),
        "{words}"
    );
    guest.runs_on();
}
