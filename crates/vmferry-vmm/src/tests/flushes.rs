//! Disks are safe when their guest has stopped for a migration, and their flushes know how long it may stand still.

use vmferry_engine::seam::{Activity, Guest, PauseError};

use super::disk_driver::{DiskDriver, OK, WRITE};
use super::storage::{Operation, Storage};
use super::*;
use crate::{Access, Caching, DiskConfig, ImageFormat, RunState};

/// A machine that runs, its disk on `storage`, and a driver that uses the disk.
fn running(storage: &Storage, dir: &Path, caching: Caching) -> (Arc<Machine>, DiskDriver) {
    let disk = DiskConfig {
        path: storage.image(),
        id: Some("root".into()),
        access: Access::ReadWrite,
        caching,
        format: ImageFormat::Unsaid,
    };
    let (machine, _) = machine(MachineConfig {
        disks: vec![disk],
        ..config(1, &dir.join("serial"))
    });
    machine.resume().unwrap();
    wait_for_progress(&machine);
    let driver = DiskDriver::start(&machine);
    (machine, driver)
}

/// Stops the guest for a migration, and lets it go on.
fn pause_and_resume(machine: &Machine) {
    assert_eq!(Guest::pause(machine, PATIENCE).unwrap(), Activity::Running);
    Guest::resume(machine, Activity::Running).unwrap();
}

#[test]
fn what_was_written_is_safe_when_the_guest_has_stopped() {
    let (true, Some(storage)) = (kvm(), Storage::new()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (machine, mut driver) = running(&storage, dir.path(), Caching::Cached);
    for round in 1..=3 {
        assert_eq!(driver.write(&machine, 8 * round, [round as u8; 512]), OK);
        assert_eq!(storage.writes_at_risk(), 1);
        assert_eq!(
            Guest::pause(&*machine, PATIENCE).unwrap(),
            Activity::Running
        );
        assert_eq!(storage.writes_at_risk(), 0);
        machine.save_devices().unwrap();
        Guest::resume(&*machine, Activity::Running).unwrap();
    }
    // A guest that its user has stopped is no exception.
    assert_eq!(driver.write(&machine, 1, [9; 512]), OK);
    machine.pause().unwrap();
    assert_eq!(Guest::pause(&*machine, PATIENCE).unwrap(), Activity::Paused);
    assert_eq!(storage.writes_at_risk(), 0);
}

#[test]
fn what_is_safe_already_is_not_flushed() {
    let (true, Some(storage)) = (kvm(), Storage::new()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (machine, mut driver) = running(&storage, dir.path(), Caching::Cached);
    storage.hold_flushes(true);
    machine.prepare_pause().unwrap();
    pause_and_resume(&machine);
    assert_eq!(storage.flushes(), 0, "nobody has written to it");
    // Nor is what the guest itself has flushed.
    storage.hold_flushes(false);
    assert_eq!(driver.write(&machine, 1, [1; 512]), OK);
    assert_eq!(driver.flush(&machine), OK);
    assert_eq!(driver.read(&machine, 1), (OK, [1; 512]));
    storage.hold_flushes(true);
    machine.prepare_pause().unwrap();
    pause_and_resume(&machine);
    assert_eq!((storage.flushes(), storage.writes_at_risk()), (1, 0));
}

#[test]
fn a_flush_that_takes_too_long_lets_the_guest_go_on() {
    let (true, Some(storage)) = (kvm(), Storage::new()) else {
        return;
    };
    const LIMIT: Duration = Duration::from_millis(100);
    let dir = tempfile::tempdir().unwrap();
    let (machine, mut driver) = running(&storage, dir.path(), Caching::Cached);
    assert_eq!(driver.write(&machine, 1, [1; 512]), OK);
    storage.hold_flushes(true);
    for _ in 0..3 {
        match Guest::pause(&*machine, LIMIT) {
            Err(PauseError::Busy(why)) => {
                assert!(why.contains("'root'") && why.contains("storage"), "{why}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(machine.run_state(), RunState::Running);
        wait_for_progress(&machine);
    }
    assert_eq!(storage.flushes(), 1, "one is enough to wait for");
    storage.hold_flushes(false);
    machine.prepare_pause().unwrap();
    assert_eq!(storage.writes_at_risk(), 0);
    pause_and_resume(&machine);
    assert_eq!(storage.flushes(), 1);
    assert_eq!(driver.write(&machine, 2, [2; 512]), OK);
    pause_and_resume(&machine);
    assert_eq!((storage.flushes(), storage.writes_at_risk()), (2, 0));
}

/// With direct I/O, a flush that has failed may succeed the next time.
#[test]
fn a_flush_that_fails_makes_nothing_safe() {
    let (true, Some(storage)) = (kvm(), Storage::new()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (machine, mut driver) = running(&storage, dir.path(), Caching::Direct);
    assert_eq!(driver.write(&machine, 1, [1; 512]), OK);
    storage.fail(Operation::Flush, Some(libc::EIO));
    for _ in 0..2 {
        let error = machine.prepare_pause().unwrap_err().to_string();
        assert!(error.contains("flush the disk 'root'"), "{error}");
        match Guest::pause(&*machine, PATIENCE) {
            Err(PauseError::Guest(error)) => {
                let error = error.to_string();
                assert!(error.contains("flush the disk 'root'"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        wait_for_progress(&machine);
    }
    assert_ne!(driver.flush(&machine), OK);
    storage.fail(Operation::Flush, None);
    assert_eq!(storage.writes_at_risk(), 1);
    pause_and_resume(&machine);
    assert_eq!(storage.writes_at_risk(), 0);
}

#[test]
fn a_read_only_disk_is_never_flushed() {
    let (true, Some(storage)) = (kvm(), Storage::new()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (machine, mut driver) = running(&storage, dir.path(), Caching::Cached);
    assert_eq!(driver.write(&machine, 1, [7; 512]), OK);
    drop(machine);
    let disk = DiskConfig {
        path: storage.image(),
        id: Some("root".into()),
        access: Access::ReadOnly,
        caching: Caching::Cached,
        format: ImageFormat::Unsaid,
    };
    let (machine, _) = super::machine(MachineConfig {
        disks: vec![disk],
        ..config(1, &dir.path().join("serial"))
    });
    machine.resume().unwrap();
    wait_for_progress(&machine);
    let mut driver = DiskDriver::start(&machine);
    assert_eq!(driver.read(&machine, 1), (OK, [7; 512]));
    assert_ne!(driver.request(&machine, WRITE, 1, [0; 512]), OK);
    pause_and_resume(&machine);
    assert_eq!(storage.flushes(), 0);
}
