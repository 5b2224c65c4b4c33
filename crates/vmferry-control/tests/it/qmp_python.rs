//! The `qemu.qmp` package from PyPI drives the server. Skipped, loudly, where `tests/setup-qemu-qmp.sh` has not been run.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use crate::fake::Rig;

#[test]
fn the_qemu_qmp_package_drives_the_server() {
    let python = Path::new(env!("CARGO_TARGET_TMPDIR")).join("qemu-qmp/bin/python");
    if !python.exists() {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: no qemu.qmp package; crates/vmferry-control/tests/setup-qemu-qmp.sh {} gets it",
            python.parent().unwrap().parent().unwrap().display()
        );
        return;
    }
    let rig = Rig::new();
    // The script bounds its own time.
    let output = Command::new(python)
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/it/qmp_python.py"
        ))
        .arg(&rig.path)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
