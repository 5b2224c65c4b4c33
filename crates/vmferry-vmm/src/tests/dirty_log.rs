//! KVM's dirty logs under a guest that writes without pause: everything it writes is reported.

use kvm_ioctls::Kvm;
use vmferry_dirty::log::KvmDirtyRings;
use vmferry_dirty::{BlockIndex, DirtyLog, PAGE_SIZE, PageRange};
use vmferry_engine::seam::{Activity, Departure, Guest};

use super::migration::{copy_ram, incoming};
use super::payload::heartbeats;
use super::*;
use crate::{DirtyLogKind, KernelSource, RingSize};

const CPUS: u32 = 2;

/// The smallest ring that this host has; says so if it has none.
fn tiny_ring() -> Option<RingSize> {
    if !kvm() {
        return None;
    }
    let enables = |size: &RingSize| {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        KvmDirtyRings::enable(Arc::new(vm), *size).is_ok()
    };
    let sizes = [256, 1024].map(|entries| RingSize::new(entries).unwrap());
    let tiny = sizes.into_iter().find(enables);
    if tiny.is_none() {
        eprintln!("SKIPPED: this host's KVM has no dirty ring");
    }
    tiny
}

/// A machine whose guest rewrites 16 MiB as fast as it can, and verifies them.
fn busy(
    dirty_log: DirtyLogChoice,
    config: MachineConfig,
) -> (Arc<Machine>, Receiver<MachineEvent>) {
    let elf = vmferry_guests::find("dirtier").expect("the guest is built in");
    machine(MachineConfig {
        kernel: Some(KernelSource::Bytes(elf.into())),
        cmdline: format!("vcpus={CPUS} ws=16M rate=0 pattern=random sweep=4096"),
        dirty_log,
        ..config
    })
}

fn written(log: &dyn DirtyLog) -> Vec<u64> {
    log.written_per_vcpu().expect("a ring can tell")
}

/// What the log reports.
fn fetch(machine: &Machine) -> Vec<u64> {
    let mut words = vec![0; machine.config().memory as usize / PAGE_SIZE / 64];
    machine
        .dirty_log()
        .fetch(BlockIndex(0), &mut words)
        .unwrap();
    words
}

/// Copies what the log reports, as a migration does. Returns how many pages that were.
fn copy_written(from: &Machine, to: &Machine) -> u32 {
    let words = fetch(from);
    let log = from.dirty_log();
    let pages = from.config().memory as usize / PAGE_SIZE;
    if log.needs_arming() {
        let all = PageRange::new(0, pages);
        log.arm(BlockIndex(0), all, &words).unwrap();
    }
    let mut bytes = [0; PAGE_SIZE];
    for page in (0..pages).filter(|page| words[page / 64] >> (page % 64) & 1 == 1) {
        let at = GuestAddress((page * PAGE_SIZE) as u64);
        from.ram.memory.read_slice(&mut bytes, at).unwrap();
        to.ram.memory.write_slice(&bytes, at).unwrap();
    }
    words.iter().map(|word| word.count_ones()).sum()
}

/// The pages in which two machines differ.
fn different(one: &Machine, other: &Machine) -> Vec<u64> {
    let page = |machine: &Machine, number: u64| {
        let mut bytes = vec![0; PAGE_SIZE];
        let at = GuestAddress(number * PAGE_SIZE as u64);
        machine.ram.memory.read_slice(&mut bytes, at).unwrap();
        bytes
    };
    let pages = 0..one.config().memory / PAGE_SIZE as u64;
    pages
        .filter(|number| page(one, *number) != page(other, *number))
        .collect()
}

fn everything_is_reported(choice: DirtyLogChoice) {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let (source, _) = busy(choice, config(CPUS, &here));
    let (destination, events) = busy(choice, incoming(CPUS, &there));
    source.resume().unwrap();
    wait_for("heartbeats", || heartbeats(&here).len() >= 2);

    let log = source.dirty_log();
    log.start().unwrap();
    // All that was written before, also by the VMM.
    copy_written(&source, &destination);
    copy_ram(&source, &destination);
    let mut copied = Vec::new();
    for _ in 0..20 {
        copied.push(copy_written(&source, &destination));
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(Guest::pause(&*source, PATIENCE).unwrap(), Activity::Running);
    copied.push(copy_written(&source, &destination));
    let lost = different(&source, &destination);
    let some = &lost[..lost.len().min(10)];
    assert!(lost.is_empty(), "{} lost pages: {some:?}", lost.len());
    assert_eq!(copy_written(&source, &destination), 0, "nobody writes");
    eprintln!("{}: pages copied {copied:?}", source.dirty_log_kind());
    if matches!(choice, DirtyLogChoice::Ring(_)) {
        let written = written(log);
        assert_eq!(written.len(), CPUS as usize);
        assert!(written.iter().all(|pages| *pages > 0), "{written:?}");
        // A page may be written twice between two fetches, but not be copied unwritten.
        let all: u64 = written.iter().sum();
        assert!(all >= copied.iter().map(|n| u64::from(*n)).sum());
    }
    log.stop().unwrap();

    destination
        .load_devices(&source.save_devices().unwrap())
        .unwrap();
    destination
        .start(Activity::Running, Duration::ZERO)
        .unwrap();
    source.left(Departure::HandedOver);
    expect(&events, &MachineEvent::Resume);
    wait_for("all of the memory to be verified", || {
        let beats = heartbeats(&there);
        (0..CPUS).all(|vcpu| {
            let mut of_vcpu = beats.iter().filter(|beat| beat.vcpu == vcpu);
            let first = of_vcpu.next().map(|beat| beat.sweeps);
            let last = of_vcpu.next_back().map(|beat| beat.sweeps);
            first
                .zip(last)
                .is_some_and(|(first, last)| last >= first + 2)
        })
    });
    assert!(heartbeats(&there).iter().all(|beat| beat.corrupt == 0));
}

#[test]
fn the_bitmap_reports_everything() {
    if kvm() {
        everything_is_reported(DirtyLogChoice::Log);
    }
}

#[test]
fn rings_of_the_usual_size_report_everything() {
    if tiny_ring().is_some() {
        everything_is_reported(DirtyLogChoice::Ring(RingSize::default()));
    }
}

#[test]
fn rings_that_are_full_all_the_time_report_everything() {
    if let Some(tiny) = tiny_ring() {
        everything_is_reported(DirtyLogChoice::Ring(tiny));
    }
}

#[test]
fn a_guest_with_full_rings_goes_on_with_or_without_a_log() {
    let Some(tiny) = tiny_ring() else { return };
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    let (machine, _) = busy(DirtyLogChoice::Ring(tiny), config(CPUS, &serial));
    let entries = tiny.entries();
    assert_eq!(machine.dirty_log_kind(), DirtyLogKind::Ring { entries });
    machine.resume().unwrap();
    wait_for("heartbeats", || heartbeats(&serial).len() >= 2);

    let log = machine.dirty_log();
    fetch(&machine); // What the VMM wrote.
    for _ in 0..2 {
        log.start().unwrap();
        // Nobody fetches, so what grows is what vCPUs have harvested whose ring was full.
        let enough = u64::from(entries) * 3;
        wait_for("rings that were full", || {
            written(log).iter().all(|pages| *pages > enough)
        });
        log.stop().unwrap();
        let at_end = written(log);
        let left = fetch(&machine);
        assert!(left.iter().all(|word| *word == 0), "it was not empty");
        let before = heartbeats(&serial).len();
        wait_for("heartbeats without a log", || {
            heartbeats(&serial).len() >= before + 4
        });
        assert_eq!(written(log), at_end, "a stopped log counted");
    }
    assert!(heartbeats(&serial).iter().all(|beat| beat.corrupt == 0));
}

#[test]
fn rings_that_cannot_be_are_refused_with_the_reason() {
    if tiny_ring().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let too_large = RingSize::new(1 << 31).unwrap();
    let config = MachineConfig {
        dirty_log: DirtyLogChoice::Ring(too_large),
        ..config(1, &dir.path().join("serial"))
    };
    let Err(error) = Machine::new(config, Box::new(|_| {})) else {
        panic!("a ring of 32 GiB");
    };
    let error = error.to_string();
    assert!(
        error.contains("2147483648 entries") && error.contains("has at most"),
        "{error}"
    );
}
