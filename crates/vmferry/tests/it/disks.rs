//! Disks of two processes: who has them, and what the monitor says of them.

use std::fs::File;

use serde_json::{Value, json};
use vmferry_control::schema::{MigrationStatus, RunState};

use crate::common::command::vmferry;
use crate::common::lab::Lab;
use crate::common::vm::Vm;

const MACHINE: [&str; 2] = ["--memory", "128M"];
const KERNEL: [&str; 4] = ["--kernel", "guest:dirtier", "--cmdline", "ws=16M"];
const INCOMING: [&str; 2] = ["--incoming", "tcp:127.0.0.1:0"];

fn image(lab: &Lab) -> String {
    let path = lab.path("image");
    File::create(&path).unwrap().set_len(4 << 20).unwrap();
    path.display().to_string()
}

#[test]
fn a_disk_goes_with_its_guest_and_comes_back_when_that_fails() {
    let Some(lab) = Lab::new() else { return };
    let disk = format!("path={},id=root", image(&lab));
    let disk = ["--disk", &disk, "--rng", "--console", "null"];
    let mut source = Vm::start(&lab, &[&MACHINE[..], &KERNEL, &disk].concat());
    let another = || {
        let machine = [&["run", "--serial", "null"], &MACHINE[..], &KERNEL, &disk];
        vmferry(machine.concat()).failed()
    };
    assert!(another().contains("cannot lock the disk 'root'"));

    // A destination without the disk, and one whose disk somebody else has.
    let mut without = Vm::start(&lab, &[&MACHINE[..], &INCOMING].concat());
    let uri = without.uri();
    let says = source.migrate_command(&uri, &[]).failed();
    assert!(
        says.contains("--disk path=IMAGE,id=root --console"),
        "{says}"
    );
    assert_eq!(source.run_state(), RunState::Running);
    let mut other = Vm::start(&lab, &[&MACHINE[..], &disk, &INCOMING].concat());
    let uri = other.uri();
    other.kill();
    assert_eq!(
        source.try_migrate(&uri).status,
        Some(MigrationStatus::Failed)
    );
    assert_eq!(source.run_state(), RunState::Running);
    assert!(another().contains("another process uses"));

    let mut destination = Vm::start(&lab, &[&MACHINE[..], &disk, &INCOMING].concat());
    let active = |vm: &mut Vm| {
        let disks = vm.execute("query-block", Value::Null);
        assert_eq!(disks[0]["device"], "root");
        assert_eq!(disks[0]["inserted"]["image"]["virtual-size"], 4 << 20);
        disks[0]["inserted"]["active"].as_bool().unwrap()
    };
    assert!(active(&mut source) && !active(&mut destination));
    let uri = destination.uri();
    source.migrate(&uri);
    destination.wait_for_state(RunState::Running);
    assert!(!active(&mut source) && active(&mut destination));
    assert!(another().contains("another process uses"));
    let insist = serde_json::json!({"x-vmferry-run-twice": true});
    let refused = source.refuse("cont", insist.clone());
    assert!(refused.contains("cannot lock the disk 'root'"), "{refused}");

    // The end of its host frees it.
    destination.kill();
    source.execute("cont", insist);
    assert_eq!(source.run_state(), RunState::Running);
    assert!(another().contains("another process uses"));
}

#[test]
fn readers_share_an_image() {
    let Some(lab) = Lab::new() else { return };
    let disk = format!("path={},ro=on", image(&lab));
    let args = [&MACHINE[..], &KERNEL, &["--disk", &disk]].concat();
    let readers = [Vm::start(&lab, &args), Vm::start(&lab, &args)];
    for mut reader in readers {
        let disks = reader.execute("query-block", Value::Null);
        assert_eq!(disks[0]["device"], "disk0");
        assert_eq!(disks[0]["inserted"]["ro"], true);
    }
}

#[test]
fn the_power_button_is_pressed() {
    let Some(lab) = Lab::new() else { return };
    let mut vm = Vm::start(&lab, &[&MACHINE[..], &KERNEL].concat());
    vm.wait_for_state(RunState::Running);
    vm.forget_events();
    vm.execute("system_powerdown", Value::Null);
    assert_eq!(vm.events_until("POWERDOWN"), ["POWERDOWN"]);
    // The guest looks at no button.
    assert_eq!(vm.run_state(), RunState::Running);
}

#[test]
fn a_snapshot_is_refused_when_its_disk_has_changed() {
    let Some(lab) = Lab::new() else { return };
    let path = image(&lab);
    let disk = format!("path={path},id=root");
    let snapshot = lab.uri("file", "snapshot");
    let mut source = Vm::start(&lab, &[&MACHINE[..], &KERNEL, &["--disk", &disk]].concat());
    source.execute("block_resize", json!({"device": "root", "size": 8 << 20}));
    let disks = source.execute("query-block", Value::Null);
    assert_eq!(disks[0]["inserted"]["image"]["virtual-size"], 8 << 20);
    for (arguments, words) in [
        (
            json!({"device": "no", "size": 512}),
            "Cannot find device='no' nor node-name=''",
        ),
        (
            json!({"device": "root", "size": -1}),
            "Parameter 'size' expects a >0 size",
        ),
    ] {
        let refused = source.refuse("block_resize", arguments);
        assert!(refused.contains(words), "{refused}");
    }
    source.migrate(&snapshot);
    assert!(source.quit().success());

    let arrival = ["--disk", &disk, "--incoming", &snapshot];
    let arrival = [&MACHINE[..], &arrival].concat();
    for _ in 0..2 {
        let mut resumed = Vm::start(&lab, &arrival);
        resumed.wait_for_state(RunState::Running);
        assert!(resumed.quit().success());
    }
    std::fs::write(&path, vec![1; 8 << 20]).unwrap();
    let machine = [&["run", "--serial", "null"], &arrival[..]].concat();
    let words = vmferry(machine).failed();
    assert!(words.contains("has changed since"), "{words}");
    let mut resumed = Vm::start(&lab, &[&arrival[..], &["--allow-changed-disks"]].concat());
    resumed.wait_for_state(RunState::Running);
}

#[test]
fn an_image_is_used_for_one_thing() {
    let Some(lab) = Lab::new() else { return };
    let path = image(&lab);
    let (link, name) = (lab.path("link"), lab.path("name"));
    std::os::unix::fs::symlink(&path, &link).unwrap();
    std::fs::hard_link(&path, &name).unwrap();
    let disk = format!("path={path},id=root");
    for other in [&link, &name] {
        let other = other.display().to_string();
        let twin = format!("path={other},id=twin");
        let machine = [&["run", "--serial", "null"], &KERNEL[..]].concat();
        let twice = vmferry([&machine[..], &["--disk", &disk, "--disk", &twin]].concat());
        let words = twice.failed();
        assert!(words.contains("are one image"), "{words}");
        let output = format!("file:{other}");
        for port in ["--serial", "--console"] {
            let mut machine = [&["run", "--disk", &disk, port, &output], &KERNEL[..]].concat();
            if port == "--console" {
                machine.extend(["--serial", "null"]);
            }
            let words = vmferry(machine).failed();
            assert!(words.contains("that is its disk 'root'"), "{words}");
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4 << 20);
    }
    let mut vm = Vm::start(&lab, &[&MACHINE[..], &KERNEL, &["--disk", &disk]].concat());
    for to in [path.as_str(), &link.display().to_string()] {
        let refused = vm.refuse("migrate", json!({"uri": format!("file:{to}")}));
        assert!(refused.contains("the guest's disk 'root'"), "{refused}");
    }
    assert_eq!(vm.run_state(), RunState::Running);
}

#[test]
fn an_image_of_another_format_is_refused_until_it_is_said_to_be_raw() {
    let Some(lab) = Lab::new() else { return };
    let path = image(&lab);
    let mut content = vec![0; 4 << 20];
    content[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    std::fs::write(&path, content).unwrap();
    let disk = format!("path={path},id=root");
    let start = [
        &["run", "--serial", "null"],
        &KERNEL[..],
        &["--disk", &disk],
    ]
    .concat();
    let words = vmferry(start).failed();
    assert!(words.contains("qemu-img convert -f qcow2"), "{words}");
    let raw = format!("{disk},format=raw");
    let mut source = Vm::start(&lab, &[&MACHINE[..], &KERNEL, &["--disk", &raw]].concat());
    // The guest may have written that itself, and can be moved.
    let waits = [&MACHINE[..], &["--disk", &disk], &INCOMING].concat();
    let mut destination = Vm::start(&lab, &waits);
    let uri = destination.uri();
    source.migrate(&uri);
    destination.wait_for_state(RunState::Running);
    let qcow2 = format!("{disk},format=qcow2");
    let usage = vmferry(["run", "--disk", &qcow2]);
    assert_eq!(usage.status.code(), Some(2), "{usage:#?}");
    assert!(usage.stderr.contains("disks are raw images"), "{usage:#?}");
}
