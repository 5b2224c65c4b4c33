//! A control group with a memory limit: nobody in it is ended for memory that a destination prepares ahead of its guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use vmferry_control::schema::RunState;

use crate::common::command::VMFERRY;
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::say;
use crate::common::vm::Vm;

/// A control group of the test's own, removed at its end.
struct Group {
    directory: PathBuf,
}

impl Group {
    /// None, loudly, where no group with such a limit can be made.
    fn with_limit(bytes: u64) -> Option<Self> {
        let places = [
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ];
        for (parent, limit) in places {
            let name = format!("vmferry-test-{}-{bytes}", std::process::id());
            let directory = Path::new(parent).join(name);
            if !Path::new(parent).join("cgroup.procs").exists()
                || fs::create_dir(&directory).is_err()
            {
                continue;
            }
            let group = Group { directory };
            if fs::write(group.directory.join(limit), bytes.to_string()).is_ok() {
                return Some(group);
            }
        }
        say("SKIPPED: no control group with a memory limit can be made here (it takes root)");
        None
    }

    /// `vmferry` as a process of this group.
    fn vmferry(&self) -> Command {
        let mut shell = Command::new("sh");
        let enter = r#"echo $$ > "$0" && exec "$@""#;
        shell.args(["-c", enter]);
        shell.arg(self.directory.join("cgroup.procs")).arg(VMFERRY);
        shell
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The kernel may still be busy with its last process.
        for _ in 0..100 {
            if fs::remove_dir(&self.directory).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A guest that has more memory than the group allows, and uses less.
fn shape() -> Shape {
    Shape {
        load: "ws=32M rate=2000 pattern=random sweep=20000".to_owned(),
        ..Shape::small()
    }
}

fn wait_in(group: &Group, lab: &Lab) -> Vm {
    let machine = ["--memory", "256M", "--incoming", "tcp:127.0.0.1:0"];
    Vm::start_with(lab, group.vmferry(), &machine)
}

/// Long enough to populate all of the guest's memory, if nobody minds.
fn give_time() {
    std::thread::sleep(Duration::from_secs(1));
}

#[test]
fn a_destination_in_a_small_group_lives_and_its_guest_arrives() {
    let Some(lab) = Lab::new() else { return };
    let Some(group) = Group::with_limit(160 << 20) else {
        return;
    };
    let mut guest = Guest::boot(&lab, shape());
    let mut destination = wait_in(&group, &lab);
    give_time();
    assert!(destination.lives());
    let words = destination.words();
    assert!(
        words.contains("the guest has 256 MiB") && words.contains("160 MiB"),
        "{words}"
    );
    guest.vm.migrate(&destination.uri());
    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
    guest.verifies_all();
}

#[test]
fn a_neighbour_gets_its_memory() {
    let Some(lab) = Lab::new() else { return };
    let Some(group) = Group::with_limit(330 << 20) else {
        return;
    };
    let mut destination = wait_in(&group, &lab);
    give_time();
    // It needs nearly all that the group allows, and most of what the destination has prepared.
    let load = "vcpus=1 ws=200M rate=1000 pattern=random";
    let machine = [
        "--memory",
        "256M",
        "--kernel",
        "guest:dirtier",
        "--cmdline",
        load,
    ];
    let mut neighbour = Vm::start_with(&lab, group.vmferry(), &machine);
    crate::common::eventually("the neighbour's memory to be filled", || {
        assert!(neighbour.lives() && destination.lives());
        let printed = fs::read_to_string(&neighbour.serial).unwrap_or_default();
        printed.contains("dirtier: ready").then_some(())
    });
    neighbour.execute("query-status", json!({}));
    destination.execute("query-status", json!({}));
}
