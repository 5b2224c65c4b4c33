//! QEMU's own QMP library, `qemu.qmp` from PyPI, drives a whole migration, as it would with QEMU.

use std::path::Path;
use std::process::Command;

use vmferry_control::schema::RunState;

use crate::common::command::Running;
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::{PATIENCE, say};

#[test]
fn a_whole_migration() {
    let Some(lab) = Lab::new() else { return };
    let python = Path::new(env!("CARGO_TARGET_TMPDIR")).join("qemu-qmp/bin/python");
    if !python.exists() {
        say(
            "SKIPPED: qemu_qmp: no qemu.qmp package; crates/vmferry-control/tests/setup-qemu-qmp.sh gets it",
        );
        return;
    }
    let mut guest = Guest::boot(&lab, Shape::small());
    let mut destination = guest.destination("defer");
    // The script bounds its own time as well.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/qemu_qmp.py");
    let driven = Running::start(
        Command::new(python)
            .arg(script)
            .args([&guest.vm.socket, &destination.socket]),
    );
    driven.finish_within(PATIENCE).succeeded();
    assert!(guest.vm.ends().success());
    assert_eq!(destination.run_state(), RunState::Running);
    guest.moved_to(destination);
    guest.verifies_all();
}
