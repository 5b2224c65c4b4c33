//! The log costs whoever does not read it some lines, and nobody else anything.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use rustix::fs::OFlags;
use serde_json::Value;
use vmferry_control::schema::RunState;

use crate::common::command::{Running, VMFERRY};
use crate::common::lab::Lab;
use crate::common::vm::Vm;
use crate::common::{PATIENCE, eventually};

/// The writing end of a full pipe, by name, and the reader who does not read.
fn stuck_pipe(lab: &Lab) -> (String, File) {
    let fifo = lab.path("stderr");
    let made = Command::new("mkfifo").arg(&fifo).status();
    assert!(made.expect("mkfifo can be run").success());
    let mut reader = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(&fifo)
        .expect("a pipe");
    let full = loop {
        if let Err(error) = reader.write(b".") {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    (fifo.display().to_string(), reader)
}

#[test]
fn a_reader_that_sleeps_holds_nothing_up() {
    let Some(lab) = Lab::new() else { return };
    let (fifo, mut reader) = stuck_pipe(&lab);
    let mut command = Command::new("sh");
    let script = format!("exec \"$0\" \"$@\" 2> {fifo}");
    command
        .args(["-c", &script, VMFERRY])
        .env("VMFERRY_LOG", "debug");
    let guest = ["--kernel", "guest:dirtier", "--memory", "128M"];
    let mut vm = Vm::start_with(&lab, command, &guest);
    // A failed migration, one that succeeds, and more warnings than the queue has room for.
    vm.try_migrate("tcp:127.0.0.1:1");
    vm.wait_for_state(RunState::Running);
    vm.migrate("exec:cat > /dev/null");
    vm.execute("cont", Value::Null);
    // A real-time signal is queued, and each costs a line.
    let script = format!("for i in $(seq 3000); do kill -40 {}; done", vm.pid());
    let status = Command::new("sh").args(["-c", &script]).status();
    assert!(status.expect("a shell").success());
    assert_eq!(vm.run_state(), RunState::Running);

    // Who reads on learns how much is missing.
    let mut text = Vec::new();
    eventually("the number of lost lines", || {
        let mut some = [0; 4096];
        while let Ok(length @ 1..) = reader.read(&mut some) {
            text.extend_from_slice(&some[..length]);
        }
        let text = String::from_utf8_lossy(&text);
        text.contains("lines of the log are missing").then_some(())
    });
    assert!(vm.quit().success());
}

/// The end is not held up either.
#[test]
fn a_process_ends_although_nobody_reads_its_last_words() {
    let lab = Lab::without_kvm();
    let (fifo, _reader) = stuck_pipe(&lab);
    let script = format!("exec \"$0\" status --qmp unix:/nowhere 2> {fifo}");
    let mut command = Command::new("sh");
    let finished = Running::start(command.args(["-c", &script, VMFERRY])).finish_within(PATIENCE);
    assert_eq!(finished.status.code(), Some(1));
}

#[test]
fn a_filter_that_makes_no_sense_is_refused() {
    for wrong in ["inof", "vmferry=loud", "info,vmferry_vmm=", "debug,wran"] {
        let mut command = Command::new(VMFERRY);
        let command = command.args(["status", "--qmp", "unix:/nowhere"]);
        let words = Running::start(command.env("VMFERRY_LOG", wrong))
            .finish_within(PATIENCE)
            .failed();
        let named = words.contains(&format!("VMFERRY_LOG={wrong}"));
        assert!(named, "{wrong}: {words}");
        assert!(words.contains("it takes error, warn, info"), "{words}");
    }
    for right in [
        "",
        "off",
        "info",
        "INFO",
        "warn,vmferry_vmm=trace",
        "vmferry_engine=debug",
    ] {
        let mut command = Command::new(VMFERRY);
        let command = command.args(["status", "--qmp", "unix:/nowhere"]);
        let words = Running::start(command.env("VMFERRY_LOG", right))
            .finish_within(PATIENCE)
            .failed();
        assert!(words.contains("/nowhere"), "{right}: {words}");
    }
}
