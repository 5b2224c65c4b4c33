//! Start, pause, reset, end.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmferry_engine::seam::{Activity, Departure, Guest};

use super::*;
use crate::vcpu::{GuestRequest, Wanted};
use crate::{KernelSource, RunState, ShutdownCause};

fn output(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// Who only listens to events knows that it does not run.
#[test]
fn a_guest_that_cannot_go_on_has_stopped() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (machine, events) = machine(config(1, &dir.path().join("serial")));
    machine.resume().unwrap();
    wait_for_progress(&machine);
    expect(&events, &MachineEvent::Resume);
    let (vcpu, reason) = (0, "it has lost its way".to_owned());
    machine.gate.set_pending(Some(GuestRequest::InternalError {
        vcpu,
        reason: reason.clone(),
    }));
    machine.gate.set(Wanted::Run);
    expect(&events, &MachineEvent::Stop);
    expect(&events, &MachineEvent::InternalError { vcpu, reason });
    assert_eq!(machine.run_state(), RunState::InternalError);
    machine.reset().unwrap();
    machine.resume().unwrap();
    wait_for_progress(&machine);
}

#[test]
fn a_guest_boots_and_prints() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    let (machine, events) = machine(config(1, &serial));
    assert_eq!(machine.run_state(), RunState::Prelaunch);
    machine.resume().unwrap();
    expect(&events, &MachineEvent::Resume);
    wait_for("output", || output(&serial).len() > 25);
    assert!(output(&serial).starts_with(b"0123456789012345678901234"));
    assert_eq!(u32_at(&machine, guest::BOOTS), 1);
    wait_for_progress(&machine);
    assert!(machine.vcpus()[0].thread_id > 0);

    command(&machine, guest::UNKNOWN_IO);
    wait_for("unknown I/O", || u64_at(&machine, 0xb060) == u64::MAX);
    wait_for_progress(&machine);

    let start = Instant::now();
    drop(machine);
    assert!(start.elapsed() < Duration::from_secs(20));
    let at_end = output(&serial).len();
    assert!(at_end > 25);
}

#[test]
fn a_running_smp_guest_is_paused_and_resumed_200_times() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (machine, events) = machine(config(4, &dir.path().join("serial")));
    machine.resume().unwrap();
    wait_for_progress(&machine);
    let mut pauses: Vec<Duration> = Vec::new();
    for _ in 0..200 {
        let start = Instant::now();
        machine.pause().unwrap();
        pauses.push(start.elapsed());
        assert_eq!(machine.run_state(), RunState::Paused);
        let still = (
            u64_at(&machine, guest::TSC),
            u32_at(&machine, guest::AP_COUNTER),
        );
        machine.pause().unwrap();
        assert_eq!(
            still,
            (
                u64_at(&machine, guest::TSC),
                u32_at(&machine, guest::AP_COUNTER)
            )
        );
        machine.resume().unwrap();
    }
    wait_for_progress(&machine);
    assert_eq!(u32_at(&machine, guest::BACKWARDS), 0);
    assert_eq!(events.try_iter().count(), 401);
    pauses.sort();
    eprintln!(
        "pause of 4 vCPUs: median {:?}, longest {:?}",
        pauses[100], pauses[199]
    );
}

#[test]
fn a_reset_starts_anew_whoever_asks() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (machine, events) = machine(config(2, &dir.path().join("serial")));
    machine.resume().unwrap();
    expect(&events, &MachineEvent::Resume);
    for how in [guest::RESET, guest::TRIPLE_FAULT] {
        wait_for_progress(&machine);
        command(&machine, how);
        expect(&events, &MachineEvent::Reset { guest: true });
    }
    wait_for_progress(&machine);
    machine.reset().unwrap();
    expect(&events, &MachineEvent::Reset { guest: false });
    wait_for_progress(&machine);
    assert_eq!(u32_at(&machine, guest::BOOTS), 1, ".bss was not cleared");
    assert_eq!(machine.run_state(), RunState::Running);

    machine.pause().unwrap();
    expect(&events, &MachineEvent::Stop);
    machine.reset().unwrap();
    assert_eq!(machine.run_state(), RunState::Prelaunch);
    let output = output(&dir.path().join("serial"));
    assert!(!output.contains(&b'!'), "a CPU ran on after its reset");
}

#[test]
fn a_reset_can_be_the_end() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = MachineConfig {
        on_reset: OnReset::Shutdown,
        ..config(2, &dir.path().join("serial"))
    };
    let (machine, events) = machine(config);
    machine.resume().unwrap();
    wait_for_progress(&machine);
    command(&machine, guest::RESET);
    expect(&events, &MachineEvent::Resume);
    expect(
        &events,
        &MachineEvent::Shutdown {
            cause: ShutdownCause::GuestReset,
        },
    );
    assert_eq!(machine.run_state(), RunState::Shutdown);
    let error = machine.resume().unwrap_err().to_string();
    assert!(
        error.contains("'shutdown'") && error.contains("reset it first"),
        "{error}"
    );
    machine.reset().unwrap();
    machine.resume().unwrap();
    wait_for_progress(&machine);
    machine.quit();
    assert_eq!(machine.run_state(), RunState::Shutdown);
}

#[test]
fn the_user_and_a_migration_do_not_race() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (machine, events) = machine(config(2, &dir.path().join("serial")));
    assert_eq!(Guest::pause(&*machine, PATIENCE).unwrap(), Activity::Paused);
    assert!(Guest::pause(&*machine, PATIENCE).is_err());
    Guest::resume(&*machine, Activity::Paused).unwrap();
    assert_eq!(machine.run_state(), RunState::Prelaunch);

    machine.resume().unwrap();
    wait_for_progress(&machine);
    assert_eq!(
        Guest::pause(&*machine, PATIENCE).unwrap(),
        Activity::Running
    );
    assert_eq!(machine.run_state(), RunState::FinishMigrate);
    for refused in [machine.resume(), machine.pause(), machine.reset()] {
        assert!(refused.unwrap_err().to_string().contains("finish-migrate"));
    }
    Guest::resume(&*machine, Activity::Running).unwrap();
    wait_for_progress(&machine);
    assert_eq!(
        Guest::pause(&*machine, PATIENCE).unwrap(),
        Activity::Running
    );
    machine.left(Departure::Written);
    assert_eq!(machine.run_state(), RunState::PostMigrate);
    assert!(Guest::resume(&*machine, Activity::Running).is_err());
    machine.resume().unwrap();
    wait_for_progress(&machine);
    use MachineEvent::{Resume, Stop};
    let seen: Vec<_> = events.try_iter().collect();
    assert_eq!(seen, [Resume, Stop, Resume, Stop, Resume]);
}

#[test]
fn a_client_of_the_serial_socket_never_holds_the_guest_up() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("serial");
    let mut config = config(1, &socket);
    config.serial = SerialConfig::Unix(socket.clone());
    let (machine, _events) = machine(config);
    machine.resume().unwrap();
    wait_for_progress(&machine);
    for _ in 0..2 {
        let mut client = UnixStream::connect(&socket).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut digits = [0; 30];
        client.read_exact(&mut digits).unwrap();
        assert!(
            digits
                .windows(2)
                .all(|w| (w[0] - b'0' + 1) % 10 == w[1] - b'0')
        );
    }
    wait_for_progress(&machine);
    drop(machine);
    assert!(!socket.exists());
}

#[test]
fn kernels_find_their_command_line_disk_and_memory_map() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let initrd = dir.path().join("initrd");
    fs::write(&initrd, vec![0xd5; 5000]).unwrap();
    let with = |image: Vec<u8>| MachineConfig {
        kernel: Some(KernelSource::Bytes(image.into())),
        initrd: Some(initrd.clone()),
        ..config(1, &dir.path().join("serial"))
    };
    let string_at = |machine: &Machine, at: u64| {
        let mut bytes = [0; 14];
        machine
            .ram
            .memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    };
    let disk: u32 = (64 << 20) - 8192;

    let (linux, _) = machine(with(guest::bzimage()));
    let params = 0x8000;
    assert_eq!(u32_at(&linux, params + 0x218), disk);
    assert_eq!(u32_at(&linux, params + 0x21c), 5000);
    let cmdline = u32_at(&linux, params + 0x228).into();
    assert_eq!(&string_at(&linux, cmdline), b"console=ttyS0\0");
    assert_eq!(u32_at(&linux, params + 0x1e8) & 0xff, 3);
    assert_eq!(u64_at(&linux, params + 0x2d0 + 2 * 20), 0x10_0000);
    assert_eq!(u64_at(&linux, disk.into()), 0xd5d5_d5d5_d5d5_d5d5);
    linux.resume().unwrap();
    wait_for_progress(&linux);

    let (pvh, _) = machine(with(guest::elf()));
    let info = 0x6000;
    let module = u64_at(&pvh, info + 16);
    assert_eq!(u64_at(&pvh, module), u64::from(disk));
    assert_eq!(u64_at(&pvh, module + 8), 5000);
    let cmdline = u64_at(&pvh, info + 24);
    assert_eq!(&string_at(&pvh, cmdline), b"console=ttyS0\0");
    assert_eq!(u32_at(&pvh, info + 48), 3);
}

#[test]
fn what_cannot_boot_is_named() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let refusal = |image: Vec<u8>| {
        let mut config = config(1, &dir.path().join("serial"));
        config.kernel = Some(KernelSource::Bytes(image.into()));
        match Machine::new(config, Box::new(drop)) {
            Ok(_) => String::new(),
            Err(e) => e.to_string(),
        }
    };
    assert!(refusal(b"#!/bin/sh".to_vec()).contains("neither an ELF file nor a bzImage"));
    let elf = guest::elf();
    assert!(refusal(elf[..100].to_vec()).contains("damaged"));
    let mut without_note = elf.clone();
    without_note[64 + 56] = 0;
    assert!(refusal(without_note).contains("no PVH entry note"));
    let mut too_high = elf.clone();
    too_high[64 + 24 + 4] = 1;
    assert!(refusal(too_high).contains("memory large enough"));
    // Whatever the image is, there is an answer.
    for at in 0..64 + 2 * 56 {
        let mut damaged = elf.clone();
        damaged[at] ^= 0xff;
        refusal(damaged);
    }
    let mut bzimage = vec![0; 2048];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    assert!(refusal(bzimage).contains("cannot be started"));
    let missing = MachineConfig {
        kernel: Some(KernelSource::Path("/no/such/kernel".into())),
        ..config(1, &dir.path().join("serial"))
    };
    let error = Machine::new(missing, Box::new(drop)).err().unwrap();
    assert!(error.to_string().contains("/no/such/kernel"));
}
