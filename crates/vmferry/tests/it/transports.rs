//! The ways to go that are no network: files, commands, unix sockets.

use vmferry_control::schema::RunState;

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;

/// Out to `there`, and from `back` into a new process, by commands.
fn through(guest: &mut Guest<'_>, there: &str, back: &str) {
    let words = guest.vm.migrate_command(there, &[]).succeeded();
    assert!(words.contains(there), "{words}");
    let mut destination = guest.destination(back);
    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
    guest.works();
}

#[test]
fn a_snapshot_file() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::medium());
    let file = lab.uri("file", "snapshot");
    through(&mut guest, &file, &file);
    // Once more over the old one, which the guest that came out of it does not need any longer.
    through(&mut guest, &file, &file);
    guest.verifies_all();
}

/// A snapshot is as good the second time: it is only read.
#[test]
fn two_guests_from_one_snapshot() {
    let Some(lab) = Lab::new() else { return };
    let guest = Guest::boot(&lab, Shape::small());
    let file = lab.uri("file", "snapshot");
    guest.vm.migrate_command(&file, &[]).succeeded();
    let mut twins = [guest.destination(&file), guest.destination(&file)];
    for twin in &mut twins {
        twin.wait_for_state(RunState::Running);
    }
}

#[test]
fn a_compressing_command() {
    let Some(lab) = Lab::new() else { return };
    let shape = Shape {
        load: format!("{} fill=text cold_fill=text", Shape::small().load),
        ..Shape::small()
    };
    let mut guest = Guest::boot(&lab, shape);
    let path = lab.path("snapshot.gz");
    let there = format!("exec:gzip -1 > {}", path.display());
    let back = format!("exec:gzip -dc {}", path.display());
    through(&mut guest, &there, &back);
    let length = std::fs::metadata(&path).expect("the snapshot").len();
    assert!(length < 64 << 20, "{length} bytes, of 96 MiB of text");
    guest.verifies_all();
}

#[test]
fn a_unix_socket() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let uri = lab.uri("unix", "migration");
    let mut destination = guest.destination(&uri);
    assert_eq!(destination.uri(), uri);
    guest.vm.migrate_command(&uri, &[]).succeeded();
    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
    guest.verifies_all();
}

#[test]
fn commands_that_fail() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    for (uri, part) in [
        ("exec:cat > /dev/null; exit 3", "exit status: 3"),
        ("exec:exit 3", "exec:exit 3"),
        ("exec:/no/such/program", "exec:/no/such/program"),
    ] {
        let words = guest.vm.migrate_command(uri, &[]).failed();
        assert!(words.contains(part), "{words}");
        guest.runs_on();
    }
    for (uri, part) in [
        ("exec:exit 3", "the stream ends"),
        ("file:/no/such/file", "cannot open file:/no/such/file"),
        ("file:/dev/null", "the stream ends"),
        ("exec:echo this is no guest at all", "QEVM"),
    ] {
        let args = ["run", "--serial", "null", "--incoming", uri];
        let words = crate::common::command::vmferry(args).failed();
        assert!(words.contains(part), "{words}");
    }
    guest.hop();
    guest.works();
}

/// A damaged snapshot is refused where the damage is noticed, and never runs.
#[test]
fn half_a_snapshot() {
    let Some(lab) = Lab::new() else { return };
    let guest = Guest::boot(&lab, Shape::small());
    let path = lab.path("snapshot");
    let uri = lab.uri("file", "snapshot");
    guest.vm.migrate_command(&uri, &[]).succeeded();
    let whole = std::fs::metadata(&path).expect("the snapshot").len();
    for length in [0, 7, 4096, whole / 2, whole - 3000] {
        let half = lab.path("half");
        std::fs::copy(&path, &half).expect("room for a copy");
        let file = std::fs::File::options()
            .write(true)
            .open(&half)
            .expect("the copy");
        file.set_len(length).expect("it is cut");
        let uri = lab.uri("file", "half");
        let args = [
            "run",
            "--memory",
            "256M",
            "--serial",
            "null",
            "--incoming",
            &uri,
        ];
        let words = crate::common::command::vmferry(args).failed();
        assert!(
            words.contains("the stream ends at byte"),
            "{length}: {words}"
        );
    }
}
