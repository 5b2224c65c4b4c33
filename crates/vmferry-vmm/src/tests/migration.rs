//! Save and restore, from one machine to another in the same process.

use std::fs;
use std::time::{Duration, Instant};

use vmferry_engine::seam::{Activity, Departure, DeviceState, Guest};

use super::*;
use crate::RunState;

pub(super) fn incoming(cpus: u32, serial: &Path) -> MachineConfig {
    MachineConfig {
        incoming: true,
        ..config(cpus, serial)
    }
}

pub(super) fn copy_ram(from: &Machine, to: &Machine) {
    let mut chunk = vec![0; 1 << 20];
    for at in (0..from.config().memory).step_by(chunk.len()) {
        from.ram
            .memory
            .read_slice(&mut chunk, GuestAddress(at))
            .unwrap();
        if chunk.iter().any(|byte| *byte != 0) {
            to.ram.memory.write_slice(&chunk, GuestAddress(at)).unwrap();
        }
    }
}

/// kvmclock as the guest computes it at `tsc`.
fn kvmclock(machine: &Machine, tsc: u64) -> u64 {
    let base = u64_at(machine, guest::PVCLOCK + 8);
    let system_time = u64_at(machine, guest::PVCLOCK + 16);
    let mul = u32_at(machine, guest::PVCLOCK + 24);
    let shift = (u32_at(machine, guest::PVCLOCK + 28) & 0xff) as u8 as i8;
    let ticks = tsc.wrapping_sub(base);
    let ticks = if shift >= 0 {
        ticks << shift
    } else {
        ticks >> -shift
    };
    system_time.wrapping_add(((u128::from(ticks) * u128::from(mul)) >> 32) as u64)
}

pub(super) struct Timings {
    pause: Duration,
    save: Duration,
    load: Duration,
    start: Duration,
}

/// Moves the running guest; `source` is left as after a migration.
pub(super) fn migrate(source: &Machine, destination: &Machine) -> Timings {
    destination
        .check_description(&source.describe().unwrap())
        .unwrap();
    let stopped = Instant::now();
    assert_eq!(Guest::pause(source, PATIENCE).unwrap(), Activity::Running);
    let pause = stopped.elapsed();
    let at = Instant::now();
    let state = source.save_devices().unwrap();
    let save = at.elapsed();
    copy_ram(source, destination);
    let at = Instant::now();
    destination.load_devices(&state).unwrap();
    let load = at.elapsed();
    let at = Instant::now();
    let paused_for = stopped.elapsed() - pause;
    destination.start(Activity::Running, paused_for).unwrap();
    let start = at.elapsed();
    source.left(Departure::HandedOver);
    Timings {
        pause,
        save,
        load,
        start,
    }
}

#[test]
fn a_guest_goes_on_in_another_machine() {
    if !kvm() {
        return;
    }
    for cpus in [1, 2, 4] {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = (dir.path().join("here"), dir.path().join("there"));
        let (source, _) = machine(config(cpus, &here));
        let (destination, events) = machine(incoming(cpus, &there));
        assert_eq!(destination.run_state(), RunState::InMigrate);
        source.resume().unwrap();
        wait_for_progress(&source);

        let times = migrate(&source, &destination);
        eprintln!(
            "{cpus} vCPUs: pause {:?}, save {:?}, load {:?}, start {:?}",
            times.pause, times.save, times.load, times.start
        );
        assert_eq!(source.run_state(), RunState::PostMigrate);
        expect(&events, &MachineEvent::Resume);
        wait_for_progress(&destination);
        assert_eq!(u32_at(&destination, guest::BACKWARDS), 0);
        assert_eq!(u32_at(&destination, guest::BOOTS), 1);

        // The digits go on where they stopped.
        drop(source);
        wait_for("output", || fs::read(&there).unwrap().len() > 20);
        let mut digits = fs::read(&here).unwrap();
        digits.extend(fs::read(&there).unwrap());
        let in_order = digits
            .windows(2)
            .all(|w| (w[0] - b'0' + 1) % 10 == w[1] - b'0');
        assert!(in_order, "{}", String::from_utf8_lossy(&digits));

        // And on to a third machine, which has the source's events to itself.
        let (third, _) = machine(incoming(cpus, &dir.path().join("third")));
        migrate(&destination, &third);
        wait_for_progress(&third);
        third.reset().unwrap();
        wait_for_progress(&third);
    }
}

/// Waits until the guest has read its TSC once more, and returns a moment before it did.
fn reads_again(machine: &Machine) -> Instant {
    let (before, last) = (Instant::now(), u64_at(machine, guest::TSC));
    wait_for("a reading of the TSC", || {
        u64_at(machine, guest::TSC) != last
    });
    before
}

#[test]
fn the_clocks_jump_by_the_downtime_and_no_more() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(2, &dir.path().join("here")));
    let (destination, _) = machine(incoming(2, &dir.path().join("there")));
    source.resume().unwrap();
    wait_for_progress(&source);

    let before_last_reading = reads_again(&source);
    Guest::pause(&*source, PATIENCE).unwrap();
    let paused = Instant::now();
    let last_tsc = u64_at(&source, guest::TSC);
    let last_clock = kvmclock(&source, last_tsc);
    thread::sleep(Duration::from_millis(30));
    let state = source.save_devices().unwrap();
    copy_ram(&source, &destination);
    destination.load_devices(&state).unwrap();
    thread::sleep(Duration::from_millis(30));
    destination
        .start(Activity::Running, paused.elapsed())
        .unwrap();
    wait_for_progress(&destination);
    let before_next_reading = reads_again(&destination);
    Guest::pause(&*destination, PATIENCE).unwrap();
    let at_most = before_last_reading.elapsed();
    let at_least = before_next_reading - paused;
    let tsc = u64_at(&destination, guest::TSC);
    let clock = kvmclock(&destination, tsc);
    let khz = u64::from(destination.offers.tsc_khz);

    let by_tsc = Duration::from_nanos((tsc - last_tsc) * 1_000_000 / khz);
    let by_clock = Duration::from_nanos(clock - last_clock);
    eprintln!("TSC {by_tsc:?}, kvmclock {by_clock:?} in {at_least:?} to {at_most:?}");
    // What the clocks may be off by.
    let slack = Duration::from_millis(5);
    for guest_time in [by_tsc, by_clock] {
        assert!(
            guest_time <= at_most + slack,
            "{guest_time:?} > {at_most:?}"
        );
        assert!(
            guest_time + slack >= at_least,
            "{guest_time:?} < {at_least:?}"
        );
    }
    assert_eq!(u32_at(&destination, guest::BACKWARDS), 0);
}

#[test]
fn a_reset_that_is_under_way_moves_along() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(1, &dir.path().join("here")));
    let (destination, events) = machine(incoming(1, &dir.path().join("there")));
    source.resume().unwrap();
    wait_for_progress(&source);
    Guest::pause(&*source, PATIENCE).unwrap();
    source
        .gate
        .set_pending(Some(crate::vcpu::GuestRequest::Reset));
    copy_ram(&source, &destination);
    destination
        .load_devices(&source.save_devices().unwrap())
        .unwrap();
    destination
        .start(Activity::Running, Duration::ZERO)
        .unwrap();
    expect(&events, &MachineEvent::Resume);
    expect(&events, &MachineEvent::Reset { guest: true });
    wait_for_progress(&destination);
}

fn saved(cpus: u32, dir: &Path) -> (Arc<Machine>, Vec<DeviceState>) {
    let (source, _) = machine(config(cpus, &dir.join("here")));
    source.resume().unwrap();
    wait_for_progress(&source);
    Guest::pause(&*source, PATIENCE).unwrap();
    let state = source.save_devices().unwrap();
    (source, state)
}

#[test]
fn sections_that_do_not_belong_are_named() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_source, state) = saved(2, dir.path());
    let (destination, _) = machine(incoming(2, &dir.path().join("there")));
    let refusal = |change: &dyn Fn(&mut Vec<DeviceState>)| {
        let mut state = state.clone();
        change(&mut state);
        destination.load_devices(&state).unwrap_err().to_string()
    };
    let missing = refusal(&|s| drop(s.remove(1)));
    assert!(missing.contains("'vmferry/cpu' (instance 1)"), "{missing}");
    let duplicate = refusal(&|s| s.push(s[3].clone()));
    assert!(duplicate.contains("'vmferry/pit'"), "{duplicate}");
    let unknown = refusal(&|s| {
        s.push(DeviceState {
            idstr: "slirp".into(),
            instance_id: 0,
            version_id: 4,
            data: Vec::new(),
        });
    });
    assert!(unknown.contains("'slirp'"), "{unknown}");
    let instance = refusal(&|s| s[1].instance_id = 7);
    assert!(instance.contains("(instance 1)"), "{instance}");
    let version = refusal(&|s| s[2].version_id = 9);
    assert!(version.contains("format version 9"), "{version}");
    let trailing = refusal(&|s| s[0].data.push(0));
    assert!(trailing.contains("1 bytes follow its end"), "{trailing}");
    assert!(
        destination
            .start(Activity::Running, Duration::ZERO)
            .is_err()
    );
    assert_eq!(destination.run_state(), RunState::InMigrate);
    destination.load_devices(&state).unwrap();
    destination.start(Activity::Paused, Duration::ZERO).unwrap();
    assert_eq!(destination.run_state(), RunState::Paused);
}

#[test]
fn hostile_state_gives_errors_and_nothing_worse() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_source, state) = saved(1, dir.path());
    let (destination, _) = machine(incoming(1, &dir.path().join("there")));
    for section in 0..state.len() {
        let whole = state[section].data.len();
        for len in 0..whole {
            let mut truncated = state.clone();
            truncated[section].data.truncate(len);
            assert!(
                destination.load_devices(&truncated).is_err(),
                "{} cut to {len} of {whole} bytes was accepted",
                state[section].idstr
            );
        }
    }
    // A small generator is enough to flip bytes, and repeatable.
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    let (mut accepted, mut refused) = (0, 0);
    let start = Instant::now();
    while accepted + refused < 3000 && start.elapsed() < Duration::from_secs(8) {
        let mut damaged = state.clone();
        let section = next(damaged.len());
        for _ in 0..1 + next(4) {
            let len = damaged[section].data.len();
            damaged[section].data[next(len)] = next(256) as u8;
        }
        match destination.load_devices(&damaged) {
            Ok(()) => accepted += 1,
            Err(_) => refused += 1,
        }
    }
    eprintln!("{accepted} damaged states accepted, {refused} refused");
    let (other, _) = machine(incoming(2, &dir.path().join("other")));
    assert!(other.load_devices(&state).is_err());
}

#[test]
fn a_machine_that_does_not_fit_says_how_to_start_it() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(4, &dir.path().join("here")));
    let description = source.describe().unwrap();
    let refusal = |config: MachineConfig| {
        let (destination, _) = machine(config);
        match destination.check_description(&description) {
            Ok(()) => String::new(),
            Err(e) => e.to_string(),
        }
    };
    let there = dir.path().join("there");
    assert_eq!(refusal(incoming(4, &there)), "");
    assert!(refusal(incoming(2, &there)).ends_with("start it with --cpus 4"));
    let larger = MachineConfig {
        memory: 128 << 20,
        ..incoming(4, &there)
    };
    assert!(refusal(larger).ends_with("start it with --memory 64MiB"));
    let mut foreign = description.clone();
    foreign.idstr = "configuration".into();
    assert!(source.check_description(&foreign).is_err());
    for len in 0..description.data.len() {
        let mut truncated = description.clone();
        truncated.data.truncate(len);
        assert!(source.check_description(&truncated).is_err());
    }
}
