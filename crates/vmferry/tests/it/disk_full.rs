//! A snapshot for which there is no room.

use std::process::Command;

use vmferry_control::schema::RunState;

use crate::common::command::VMFERRY;
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::say;
use crate::common::vm::Vm;

#[test]
fn on_a_device_that_is_always_full() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let words = guest.vm.migrate_command("file:/dev/full", &[]).failed();
    for part in [
        "file:/dev/full",
        "No space left on device",
        "free some space",
    ] {
        assert!(words.contains(part), "{words}");
    }
    guest.runs_on();
    guest.hop();
    guest.works();
}

/// The small file system is mounted where only the source's process sees it, and is gone with it.
#[test]
fn on_a_file_system_that_fills_up() {
    let Some(lab) = Lab::new() else { return };
    let disk = lab.path("disk");
    std::fs::create_dir(&disk).expect("a directory");
    let mount = format!("mount -t tmpfs -o size=16m none {}", disk.display());
    let private = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, VMFERRY]);
        command
    };
    let possible = private(&mount).output();
    if !possible
        .as_ref()
        .is_ok_and(|output| output.status.success())
    {
        say(&format!(
            "SKIPPED: disk_full: no private mounts here: {possible:?}"
        ));
        return;
    }
    let wrapped = private(&format!("{mount} && exec \"$0\" \"$@\""));
    let guest = ["--kernel", "guest:dirtier", "--memory", "256M"];
    let load = ["--cmdline", "ws=32M cold=64M"];
    let mut vm = Vm::start_with(&lab, wrapped, &[&guest[..], &load].concat());
    crate::common::eventually("the guest to have written more than fits", || {
        let text = std::fs::read_to_string(&vm.serial).unwrap_or_default();
        text.contains("ready").then_some(())
    });

    let snapshot = format!("file:{}", disk.join("snapshot").display());
    let words = vm.migrate_command(&snapshot, &[]).failed();
    for part in [&snapshot, "No space left on device", "free some space"] {
        assert!(words.contains(part), "{words}");
    }
    assert_eq!(vm.run_state(), RunState::Running);
    // What did not fit is not left lying there: the disk takes it all again, up to the same point.
    let root = format!("/proc/{}/root{}", vm.pid(), disk.display());
    let left: Vec<_> = std::fs::read_dir(root).expect("the disk").collect();
    assert!(left.is_empty(), "{left:?}");

    // Where there is room, it works.
    let elsewhere = lab.uri("file", "snapshot");
    vm.migrate_command(&elsewhere, &[]).succeeded();
}
