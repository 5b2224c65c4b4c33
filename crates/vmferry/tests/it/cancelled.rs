//! Cancelling at random moments, over the monitor and with the command.

use serde_json::{Value, json};
use vmferry_control::schema::{MigrationStatus, RunState};
use vmferry_testing::proxy::{Effect, Proxy, Way, When};

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::outcome::{Outcome, Tally, Usual, conclude, gives_up, migrate_until, phase};
use crate::common::vm::Vm;
use crate::common::{PATIENCE, Random, say};

const ROUNDS: usize = 15;

/// Cancels; whether it was in time is seen from what comes of the migration.
fn rounds(test: &str, cancel: impl Fn(&mut Vm)) {
    let Some(lab) = Lab::new() else { return };
    let mut random = Random::new(test);
    let mut guest = Guest::boot(&lab, Shape::medium());
    let usual = Usual::of(&guest.hop());
    let mut tally = Tally::default();
    for round in 0..ROUNDS {
        let mut destination = guest.tcp_destination();
        let uri = destination.uri();
        migrate_until(&mut guest, &uri, phase(round), usual, &mut random);
        cancel(&mut guest.vm);
        let outcome = conclude(&mut guest);
        tally.count(outcome);
        match outcome {
            Outcome::RanOn => {
                let status = guest.vm.info().status;
                assert_eq!(status, Some(MigrationStatus::Cancelled));
                gives_up(&mut destination);
                guest.hop();
            }
            Outcome::Arrived => {
                destination.wait_for_state(RunState::Running);
                guest.moved_to(destination);
            }
            Outcome::Undecided => panic!("nothing was lost"),
        }
        guest.works();
    }
    guest.verifies_all();
    say(&format!("{test} at {ROUNDS} moments: {tally:?}"));
}

#[test]
fn over_the_monitor() {
    rounds("cancelled over the monitor", |vm| {
        // Refused when it is too late.
        let _ = vm.qmp.execute("migrate_cancel", Value::Null);
    });
}

#[test]
fn with_the_command() {
    rounds("cancelled with the command", |vm| {
        let cancelled = vm.command("cancel", &[]);
        if cancelled.status.success() {
            let words = cancelled.succeeded();
            assert!(
                words.contains("Cancelled. The guest is running."),
                "{words}"
            );
        } else {
            let words = cancelled.failed();
            let end = vm.migration_ends().status;
            assert_eq!(end, Some(MigrationStatus::Completed), "{words}");
            assert!(
                words.contains("too late to cancel") || words.contains("the last one is completed"),
                "{words}"
            );
        }
    });
}

/// Slow enough to be cancelled for sure.
#[test]
fn the_migrating_command_says_so() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.vm.set_parameters(json!({"max-bandwidth": 4 << 20}));
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    let socket = guest.vm.socket.clone();
    let migrating = crate::common::command::on_vm("migrate", &socket, &[&uri]);
    guest.vm.wait_for_status(MigrationStatus::Active);
    guest.vm.command("cancel", &[]).succeeded();
    let words = migrating.finish_within(PATIENCE).failed();
    assert!(
        words.contains("the migration was cancelled; the guest is as it was"),
        "{words}"
    );
    destination.ends_with_error();
    guest.runs_on();

    let words = guest.vm.command("cancel", &[]).failed();
    assert!(words.contains("there is no migration to cancel"), "{words}");
}

/// At the last moment: the destination has loaded the guest, but its word of that is not here yet.
#[test]
fn during_the_hand_over() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let mut destination = guest.tcp_destination();
    let proxy = Proxy::to(destination.uri())
        .fault(When::BEFORE_LOADED, Effect::Stall(Way::Back))
        .start();
    guest.vm.execute("migrate", json!({"uri": proxy.uri}));
    guest.vm.wait_for_status(MigrationStatus::Device);
    destination.wait_for_status(MigrationStatus::Device);
    let words = guest.vm.command("cancel", &[]).succeeded();
    assert!(words.contains("The guest is running."), "{words}");
    gives_up(&mut destination);
    guest.runs_on();
    guest.hop();
    guest.verifies_all();
}

/// There is nothing to cancel for who waits for a guest, and that is said at once.
#[test]
fn at_the_destination() {
    let Some(lab) = Lab::new() else { return };
    let mut there = Vm::start(&lab, &["--memory", "64M", "--incoming", "tcp:127.0.0.1:0"]);
    there.uri();
    let words = there.command("cancel", &[]).failed();
    assert!(words.contains("on its way in"), "{words}");
    let info = there.info();
    assert_eq!(info.status, Some(MigrationStatus::Setup));
    assert_eq!(info.total_time, None);
}
