//! What a migration waits for is said wherever somebody may look.

use std::process::Command;

use serde_json::{Value, json};
use vmferry_control::schema::MigrationStatus;

use crate::common::command::VMFERRY;
use crate::common::eventually;
use crate::common::lab::Lab;
use crate::common::vm::Vm;

#[test]
fn on_the_monitor_in_the_status_and_in_the_log() {
    let Some(lab) = Lab::new() else { return };
    let start = |args: &[&str]| {
        let mut vmferry = Command::new(VMFERRY);
        vmferry.env("VMFERRY_LOG", "info");
        Vm::start_with(&lab, vmferry, args)
    };
    let mut there = start(&["--memory", "64M", "--incoming", "tcp:127.0.0.1:0"]);
    let uri = there.uri();
    let waiting = eventually("a wait", || there.info().x_vmferry_waiting_for);
    assert_eq!(waiting.name, "source");
    let status = there.command("status", &[]).succeeded();
    assert!(status.contains("a source to connect"), "{status}");

    let kernel = ["--memory", "64M", "--kernel", "guest:dirtier"];
    let mut here = start(&[&kernel[..], &["--cmdline", "ws=1M rate=100"]].concat());
    here.set_capability("pause-before-switchover", true);
    let command = here.start_command("migrate", &[&uri, "--keep-source"]);
    here.wait_for_status(MigrationStatus::PreSwitchover);
    let waiting = eventually("a wait of half a second", || {
        let waiting = here.info().x_vmferry_waiting_for?;
        (waiting.time >= 500).then_some(waiting)
    });
    assert_eq!(waiting.name, "migrate-continue");
    eventually("a line in the log", || {
        here.words()
            .contains("the migration waits for 'migrate-continue'")
            .then_some(())
    });
    here.execute("migrate-continue", json!({"state": "pre-switchover"}));
    let migrate = command.finish_within(crate::common::PATIENCE);
    assert!(
        migrate.stderr.contains("waits for 'migrate-continue' ("),
        "{migrate:#?}"
    );
    migrate.succeeded();
    assert_eq!(here.info().x_vmferry_waiting_for, None);
    there.execute("quit", Value::Null);
}
