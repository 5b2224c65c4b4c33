//! The payload guest, which verifies its own memory and runs Rust code with SSE registers in ring 3.

use std::fs;

use vmferry_guests::Heartbeat;

use super::migration::{incoming, migrate};
use super::*;
use crate::KernelSource;

pub(super) fn heartbeats(path: &Path) -> Vec<Heartbeat> {
    let output = String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
    output.lines().filter_map(Heartbeat::parse).collect()
}

#[test]
fn a_guest_that_checks_its_memory_goes_on_unharmed() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let elf = vmferry_guests::find("dirtier").expect("the guest is built in");
    let with_guest = |config: MachineConfig| MachineConfig {
        kernel: Some(KernelSource::Bytes(elf.into())),
        memory: 128 << 20,
        cmdline: "rate=2000 vcpus=2".into(),
        ..config
    };
    let (source, _) = machine(with_guest(config(2, &here)));
    let (destination, _) = machine(with_guest(incoming(2, &there)));
    let of_both = |file: &Path| {
        let beats = heartbeats(file);
        (0..2).all(|vcpu| beats.iter().any(|beat| beat.vcpu == vcpu))
    };
    source.resume().unwrap();
    wait_for("heartbeats", || of_both(&here));
    migrate(&source, &destination);
    drop(source);
    wait_for("heartbeats on the destination", || of_both(&there));
    let before = heartbeats(&here);
    let after = heartbeats(&there);
    assert!(before.iter().chain(&after).all(|beat| beat.corrupt == 0));
    for vcpu in 0..2 {
        let of_vcpu = |beats: &[Heartbeat]| {
            let beat = beats.iter().rev().find(|beat| beat.vcpu == vcpu);
            beat.map_or((0, 0), |beat| (beat.t, beat.verified))
        };
        let ((t, verified), (later, more)) = (of_vcpu(&before), of_vcpu(&after));
        assert!(
            later > t && later < t + 20,
            "vCPU {vcpu}: {t} s, then {later} s"
        );
        assert!(more > verified);
    }
    let gap = after.iter().map(|beat| beat.gap_us).max();
    eprintln!("longest gap seen by the guest: {gap:?} us");
}
