//! A disk whose guest's hand-over is disturbed: at any time at most one side has the image's lock, and in the end exactly
//! one, which runs the guest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vmferry_control::schema::{MigrationStatus, RunState};
use vmferry_testing::proxy::{Effect, Proxy, Way, When};

use crate::common::command::vmferry;
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::outcome::{arrived, assert_undecided};
use crate::common::vm::Vm;

fn image(lab: &Lab, name: &str) -> PathBuf {
    let path = lab.path(name);
    File::create(&path).unwrap().set_len(4 << 20).unwrap();
    path
}

fn option(image: &Path) -> String {
    format!("path={},id=root", image.display())
}

/// A guest that is at work, with a disk.
fn boot<'a>(lab: &'a Lab, image: &Path) -> Guest<'a> {
    let shape = Shape {
        more: vec!["--disk".into(), option(image)],
        ..Shape::small()
    };
    let mut guest = Guest::boot(lab, shape);
    guest.be_impatient();
    guest
}

/// Whether the process holds a lock on the image.
fn holds(vm: &Vm, image: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{}", vm.pid()));
    let Ok(files) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    files.flatten().any(|file| {
        let info = process.join("fdinfo").join(file.file_name());
        // A file may be closed between two looks.
        fs::read_link(file.path()).is_ok_and(|path| path == image)
            && fs::read_to_string(info).is_ok_and(|info| info.contains("OFDLCK"))
    })
}

/// What the monitor says of that.
fn is_active(vm: &mut Vm) -> bool {
    vm.execute("query-block", Value::Null)[0]["inserted"]["active"] == true
}

/// This one runs the guest and holds the lock, and nobody else can.
#[track_caller]
fn assert_alone(one: &mut Vm, other: Option<&mut Vm>, image: &Path) {
    assert_eq!(one.run_state(), RunState::Running);
    assert!(holds(one, image));
    if let Some(other) = other {
        assert_ne!(other.run_state(), RunState::Running);
        assert!(!holds(other, image));
        let insist = json!({"x-vmferry-run-twice": true});
        let refused = other.refuse("cont", insist);
        assert!(refused.contains("cannot lock the disk 'root'"), "{refused}");
        assert_ne!(other.run_state(), RunState::Running);
        assert!(!holds(other, image));
    }
    let disk = option(image);
    let machine = ["run", "--serial", "null", "--kernel", "guest:dirtier"];
    let third = vmferry([&machine[..], &["--disk", &disk]].concat()).failed();
    assert!(third.contains("another process uses"), "{third}");
}

/// Nothing comes back from the destination any more.
const LOST: Effect = Effect::Stall(Way::Back);

/// Begins a migration through a faulty line, and waits until the fault is there.
fn migrate_until_fault(
    guest: &mut Guest<'_>,
    destination: &mut Vm,
    place: When,
    effect: Effect,
) -> Proxy {
    let proxy = Proxy::to(destination.uri()).fault(place, effect).start();
    guest.vm.execute("migrate", json!({"uri": proxy.uri}));
    proxy.wait_until_struck();
    proxy
}

#[track_caller]
fn fails(vm: &mut Vm) -> String {
    let info = vm.migration_ends();
    assert_eq!(info.status, Some(MigrationStatus::Failed), "{info:?}");
    info.error_desc.expect("a failure has a reason")
}

/// The guest and its disk still come to where they are wanted.
fn moves_on(mut guest: Guest<'_>, image: &Path) {
    guest.verifies_all();
    guest.hop();
    guest.verifies_all();
    assert_alone(&mut guest.vm, None, image);
}

#[test]
fn the_destination_is_killed_before_its_word_is_heard() {
    let Some(lab) = Lab::new() else { return };
    let image = image(&lab, "image");
    let mut guest = boot(&lab, &image);
    assert_alone(&mut guest.vm, None, &image);
    let mut destination = guest.tcp_destination();
    let place = When::BEFORE_LOADED;
    let _proxy = migrate_until_fault(&mut guest, &mut destination, place, LOST);
    // In between it is nobody's, and nobody runs.
    assert!(!holds(&guest.vm, &image) && !holds(&destination, &image));
    assert_ne!(guest.vm.run_state(), RunState::Running);
    assert_ne!(destination.run_state(), RunState::Running);
    destination.kill();
    let why = fails(&mut guest.vm);
    let part = "not said that it has loaded the guest";
    assert!(why.contains(part), "{why}");
    guest.runs_on();
    assert_alone(&mut guest.vm, None, &image);
    moves_on(guest, &image);
}

#[test]
fn the_line_is_cut_before_its_word_is_heard() {
    let Some(lab) = Lab::new() else { return };
    let image = image(&lab, "image");
    let mut guest = boot(&lab, &image);
    let mut destination = guest.tcp_destination();
    let place = When::BEFORE_LOADED;
    let _proxy = migrate_until_fault(&mut guest, &mut destination, place, Effect::Cut);
    let why = fails(&mut guest.vm);
    assert!(why.contains("closed the channel"), "{why}");
    guest.runs_on();
    assert_undecided(&mut destination, "If it runs on the source, quit this one");
    assert_alone(&mut guest.vm, Some(&mut destination), &image);
    assert!(destination.quit().success());
    moves_on(guest, &image);
}

/// It may have run the guest, so the source does not: its user finds out.
#[test]
fn the_destination_is_killed_before_the_source_knows_that_it_runs() {
    let Some(lab) = Lab::new() else { return };
    let image = image(&lab, "image");
    let mut guest = boot(&lab, &image);
    for effect in [LOST, Effect::Cut] {
        let mut destination = guest.tcp_destination();
        let place = When::BEHIND_LOADED;
        let _proxy = migrate_until_fault(&mut guest, &mut destination, place, effect);
        if effect == LOST {
            destination.wait_for_state(RunState::Running);
            assert!(!holds(&guest.vm, &image));
            assert!(holds(&destination, &image));
        }
        destination.kill();
        let why = fails(&mut guest.vm);
        assert!(why.contains("during the hand-over"), "{why}");
        assert_undecided(
            &mut guest.vm,
            "If it runs on the destination, quit this one",
        );
        assert!(!holds(&guest.vm, &image));
        assert!(!is_active(&mut guest.vm));
        guest.vm.execute("cont", Value::Null);
        guest.runs_on();
        assert!(is_active(&mut guest.vm));
        assert_alone(&mut guest.vm, None, &image);
    }
    moves_on(guest, &image);
}

/// Whoever is continued first has the disk, and the other is refused.
#[test]
fn the_line_is_cut_before_the_source_knows_that_it_runs() {
    let Some(lab) = Lab::new() else { return };
    let image = image(&lab, "image");
    let mut guest = boot(&lab, &image);
    let mut destination = guest.tcp_destination();
    let place = When::BEHIND_LOADED;
    let _proxy = migrate_until_fault(&mut guest, &mut destination, place, Effect::Cut);
    let why = fails(&mut guest.vm);
    assert!(why.contains("during the hand-over"), "{why}");
    // The cut may come before or behind the last word to the destination.
    if arrived(&mut destination) {
        assert_alone(&mut destination, Some(&mut guest.vm), &image);
        guest.moved_to(destination);
    } else {
        assert_undecided(&mut destination, "If it runs on the source, quit this one");
        assert!(!holds(&guest.vm, &image) && !holds(&destination, &image));
        guest.vm.execute("cont", Value::Null);
        assert_alone(&mut guest.vm, Some(&mut destination), &image);
        assert!(destination.quit().success());
    }
    moves_on(guest, &image);
}

#[test]
fn the_image_at_the_destination_is_somebody_elses() {
    let Some(lab) = Lab::new() else { return };
    let (here, there) = (image(&lab, "here"), image(&lab, "there"));
    let mut guest = boot(&lab, &here);
    guest.shape.more[1] = option(&there);
    let mut destination = guest.tcp_destination();
    let third = Vm::start(
        &lab,
        &["--kernel", "guest:dirtier", "--disk", &option(&there)],
    );
    guest
        .vm
        .execute("migrate", json!({"uri": destination.uri()}));
    let why = fails(&mut guest.vm);
    let part = "cannot use the disk 'root': another process uses";
    assert!(why.contains(part), "{why}");
    let words = destination.ends_with_error();
    assert!(words.contains(part), "{words}");
    guest.runs_on();
    assert_alone(&mut guest.vm, None, &here);
    assert!(holds(&third, &there));
    guest.verifies_all();
}

/// Nobody has the lock while the guest changes sides: somebody else may take it. The guest does not run without it.
#[test]
fn the_image_is_taken_while_it_is_nobodys() {
    let Some(lab) = Lab::new() else { return };
    let image = image(&lab, "image");
    let mut guest = boot(&lab, &image);
    // Time to start a machine.
    guest
        .vm
        .set_parameters(json!({"x-vmferry-peer-timeout": 10_000}));
    let mut destination = guest.tcp_destination();
    let place = When::BEFORE_LOADED;
    let proxy = migrate_until_fault(&mut guest, &mut destination, place, LOST);
    let mut third = Vm::start(
        &lab,
        &["--kernel", "guest:dirtier", "--disk", &option(&image)],
    );
    drop(proxy);
    let why = fails(&mut guest.vm);
    for part in [
        "Yet the guest cannot go on here: cannot lock the disk 'root'",
        "'cont'",
    ] {
        assert!(why.contains(part), "{why}");
    }
    assert_eq!(guest.vm.run_state(), RunState::Paused);
    assert_alone(&mut third, Some(&mut guest.vm), &image);
    third.kill();
    guest.vm.execute("cont", Value::Null);
    guest.runs_on();
    assert_alone(&mut guest.vm, None, &image);
    destination.kill();
    guest.verifies_all();
}
