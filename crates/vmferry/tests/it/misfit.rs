//! Destinations that do not fit: refused before anything is copied, in words that say what to do.

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::vm::Vm;

/// Both sides say `words`, the guest runs on, and the destination's process ends.
fn refused(guest: &mut Guest<'_>, destination: &[&str], words: &[&str]) {
    let incoming = ["--incoming", "tcp:127.0.0.1:0"];
    let mut destination = Vm::start(guest.lab, &[destination, &incoming].concat());
    let uri = destination.uri();
    let source_says = guest.vm.migrate_command(&uri, &[]).failed();
    let destination_says = destination.ends_with_error();
    for word in words {
        assert!(source_says.contains(word), "no '{word}': {source_says}");
        assert!(
            destination_says.contains(word),
            "no '{word}': {destination_says}"
        );
    }
    let refused = "the migration failed: the destination refused: ";
    assert!(source_says.contains(refused), "{source_says}");
    guest.runs_on();
}

#[test]
fn another_machine() {
    let Some(lab) = Lab::new() else { return };
    let shape = Shape {
        cpus: 2,
        ..Shape::small()
    };
    let mut guest = Guest::boot(&lab, shape);
    let memory = |m| {
        [
            "the source has 256MiB of memory".to_owned(),
            format!("this machine has {m}"),
            "start it with --memory 256MiB".to_owned(),
        ]
    };
    let cpus = |n| {
        [
            "the source has 2 vCPUs".to_owned(),
            format!("this machine has {n}"),
            "start it with --cpus 2".to_owned(),
        ]
    };
    for (args, words) in [
        (["--memory", "128M", "--cpus", "2"], memory("128MiB")),
        (["--memory", "4G", "--cpus", "2"], memory("4GiB")),
        (["--memory", "256M", "--cpus", "1"], cpus("1 vCPU")),
        (["--memory", "256M", "--cpus", "4"], cpus("4 vCPUs")),
    ] {
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        refused(&mut guest, &args, &words);
    }
    guest.hop();
    guest.works();
}

/// A wrong machine is no reason to lose a snapshot, either.
#[test]
fn a_snapshot_for_another_machine() {
    let Some(lab) = Lab::new() else { return };
    let guest = Guest::boot(&lab, Shape::small());
    let snapshot = lab.uri("file", "snapshot");
    guest.vm.migrate_command(&snapshot, &[]).succeeded();
    let args = [
        "run",
        "--memory",
        "128M",
        "--serial",
        "null",
        "--incoming",
        &snapshot,
    ];
    let words = crate::common::command::vmferry(args).failed();
    assert!(words.contains("start it with --memory 256MiB"), "{words}");
    let mut resumed = guest.destination(&snapshot);
    resumed.wait_for_state(vmferry_control::schema::RunState::Running);
}
