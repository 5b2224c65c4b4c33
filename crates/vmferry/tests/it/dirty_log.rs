//! `run --dirty-log`: what it takes, what it refuses, and what is in use.

use std::process::Command;

use crate::common::command::{VMFERRY, vmferry};
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::vm::Vm;

/// Rings of a few milliseconds: vCPUs find them full all the time.
#[test]
fn a_guest_with_small_rings_moves() {
    let Some(lab) = Lab::with_dirty_ring() else {
        return;
    };
    let shape = Shape {
        dirty_log: "ring:1024",
        load: "ws=64M rate=200000 pattern=random cold=64M sweep=20000".to_owned(),
        ..Shape::medium()
    };
    let mut guest = Guest::boot(&lab, shape);
    for _ in 0..3 {
        guest.hop();
        guest.works();
    }
    guest.verifies_all();
}

#[test]
fn rings_that_cannot_be() {
    let lab = Lab::without_kvm();
    let nothing = lab.uri("file", "nothing");
    let run = |dirty_log: &str| {
        let machine = ["run", "--serial", "null", "--incoming", &nothing];
        vmferry([&machine[..], &["--dirty-log", dirty_log]].concat())
    };
    for (dirty_log, part) in [
        ("bitmap", "use auto, log, ring or ring:ENTRIES"),
        ("ring:many", "'many' is no number of entries"),
        ("ring:1000", "cannot have 1000 entries"),
        ("ring:128", "a power of two from 256 on"),
    ] {
        let usage = run(dirty_log);
        assert_eq!(usage.status.code(), Some(2), "{usage:#?}");
        assert!(usage.stderr.contains(part), "{usage:#?}");
    }
    if Lab::with_dirty_ring().is_some() {
        let words = run("ring:1073741824").failed();
        assert!(
            words.contains("cannot have 1073741824 entries") && words.contains("has at most"),
            "{words}"
        );
    }
}

#[test]
fn the_choice_is_in_the_machines_words() {
    let Some(lab) = Lab::with_dirty_ring() else {
        return;
    };
    for dirty_log in ["log", "ring:2048"] {
        let mut command = Command::new(VMFERRY);
        command.env("VMFERRY_LOG", "info");
        let args = ["--kernel", "guest:dirtier", "--dirty-log", dirty_log];
        let vm = Vm::start_with(&lab, command, &args);
        let words = vm.words();
        let in_use = format!("dirty log in use: {dirty_log}\n");
        assert!(words.contains(&in_use), "{words}");
    }
}
