//! Machines that have something to do before their guest is paused, and those that cannot pause it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vmferry_dirty::DirtyLog;
use vmferry_engine::seam::{Activity, DeviceState, Guest, GuestError, PauseError};
use vmferry_engine::{MigrationError, RamBlock, Source, Wait};

use crate::common::{Watched, any_port, listen, move_on, parameters, running_guest, wait_until};
use crate::toy::Quiet;

/// A guest whose machine has disks.
struct WithDisks {
    guest: Arc<Watched>,
    /// How long it takes to flush them.
    flush: Duration,
    flushes: AtomicU32,
    /// So many attempts to pause it take too long.
    busy: AtomicU32,
    /// What it fails with.
    flush_error: Option<&'static str>,
    pause_error: Option<&'static str>,
    save_error: Option<&'static str>,
    resume_error: Option<&'static str>,
}

impl WithDisks {
    fn new() -> Self {
        WithDisks {
            guest: running_guest(),
            flush: Duration::ZERO,
            flushes: AtomicU32::new(0),
            busy: AtomicU32::new(0),
            flush_error: None,
            pause_error: None,
            save_error: None,
            resume_error: None,
        }
    }
}

fn fail_with(why: Option<&str>) -> Result<(), GuestError> {
    why.map_or(Ok(()), |why| Err(GuestError::new(why)))
}

impl Guest for WithDisks {
    fn ram(&self) -> &[RamBlock] {
        self.guest.ram()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        self.guest.dirty_log()
    }

    fn describe(&self) -> Result<DeviceState, GuestError> {
        self.guest.describe()
    }

    fn check_description(&self, source: &DeviceState) -> Result<(), GuestError> {
        self.guest.check_description(source)
    }

    fn prepare_pause(&self) -> Result<(), GuestError> {
        assert!(self.guest.is_running());
        self.flushes.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(self.flush);
        fail_with(self.flush_error)
    }

    fn pause(&self, limit: Duration) -> Result<Activity, PauseError> {
        assert_ne!(self.flushes.load(Ordering::Relaxed), 0);
        fail_with(self.pause_error)?;
        if self.busy.load(Ordering::Relaxed) > 0 {
            self.busy.fetch_sub(1, Ordering::Relaxed);
            std::thread::sleep(limit);
            return Err(PauseError::Busy("requests in flight: 'root': 3".into()));
        }
        self.guest.pause(limit)
    }

    fn resume(&self, was: Activity) -> Result<(), GuestError> {
        fail_with(self.resume_error)?;
        self.guest.resume(was)
    }

    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError> {
        fail_with(self.save_error)?;
        self.guest.save_devices()
    }

    fn load_devices(&self, states: &[DeviceState]) -> Result<(), GuestError> {
        self.guest.load_devices(states)
    }

    fn start(&self, activity: Activity, paused_for: Duration) -> Result<(), GuestError> {
        self.guest.start(activity, paused_for)
    }
}

/// Migrates it; gives back the guest where it was to go, and the migration.
fn migrate(here: &Arc<WithDisks>) -> (Arc<Watched>, Source) {
    let there = Watched::new(here.guest.runners());
    let incoming = listen(&there, &any_port());
    let uri = incoming.uri().clone();
    let outgoing = Source::start(here.clone(), uri, parameters(), Box::new(Quiet)).unwrap();
    wait_until("the end", || outgoing.info().status.is_final());
    let _ = incoming.wait();
    (there, outgoing)
}

/// What the guest writes while its machine is busy is sent before the pause, not in it.
#[test]
fn a_long_preparation_is_no_downtime() {
    let here = Arc::new(WithDisks {
        flush: Duration::from_millis(600),
        ..WithDisks::new()
    });
    let (there, outgoing) = migrate(&here);
    let info = outgoing.info();
    outgoing.wait().unwrap();
    there.stop_and_verify();
    assert_eq!(here.flushes.load(Ordering::Relaxed), 2);
    // One to begin with, one before and one behind each preparation, and the one of the switch-over.
    assert!(info.ram.dirty_sync_count >= 5, "{info:?}");
    let downtime = info.downtime.unwrap();
    assert!(downtime < here.flush, "{downtime:?}");
}

#[test]
fn a_short_one_costs_no_pass() {
    let here = Arc::new(WithDisks::new());
    let (there, outgoing) = migrate(&here);
    outgoing.wait().unwrap();
    there.stop_and_verify();
    // A busy machine can make it long.
    assert!(here.flushes.load(Ordering::Relaxed) <= 2);
}

#[test]
fn a_preparation_that_hangs_can_be_cancelled() {
    let here = Arc::new(WithDisks {
        flush: Duration::from_secs(5),
        ..WithDisks::new()
    });
    let there = Watched::new(here.guest.runners());
    let incoming = listen(&there, &any_port());
    let uri = incoming.uri().clone();
    let outgoing = Source::start(here.clone(), uri, parameters(), Box::new(Quiet)).unwrap();
    wait_until("the preparation", || {
        here.flushes.load(Ordering::Relaxed) == 1
    });
    let waiting = outgoing.info().waiting.map(|waiting| waiting.wait);
    assert_eq!(waiting, Some(Wait::PausePreparation));
    let start = Instant::now();
    outgoing.cancel().unwrap();
    let end = outgoing.wait();
    assert!(matches!(end, Err(MigrationError::Cancelled)), "{end:?}");
    assert!(start.elapsed() < here.flush, "{:?}", start.elapsed());
    assert!(incoming.wait().is_err());
    here.guest.run_some();
    move_on(&here.guest, parameters()).stop_and_verify();
}

/// Its disks have requests in flight, longer than the guest may stand still.
#[test]
fn a_guest_that_does_not_stand_still_in_time_is_tried_again() {
    let here = Arc::new(WithDisks {
        busy: AtomicU32::new(3),
        ..WithDisks::new()
    });
    let (there, outgoing) = migrate(&here);
    let info = outgoing.info();
    outgoing.wait().unwrap();
    there.stop_and_verify();
    // What it did in the meantime was sent before it was tried again.
    assert!(info.ram.dirty_sync_count >= 3 + 3, "{info:?}");

    let here = Arc::new(WithDisks {
        busy: AtomicU32::new(u32::MAX),
        ..WithDisks::new()
    });
    let (there, outgoing) = migrate(&here);
    let error = outgoing.wait().unwrap_err().to_string();
    for part in ["in flight: 'root': 3", "5 attempts", "downtime-limit"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!there.is_running());
    here.guest.run_some();
}

#[test]
fn a_guest_that_cannot_be_paused_runs_on() {
    let why = "the disk 'root' has 3 requests in flight";
    for here in [
        WithDisks {
            pause_error: Some(why),
            ..WithDisks::new()
        },
        WithDisks {
            flush_error: Some(why),
            ..WithDisks::new()
        },
    ] {
        let here = Arc::new(here);
        let (there, outgoing) = migrate(&here);
        let error = outgoing.wait().unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert!(!there.is_running());
        here.guest.run_some();
        move_on(&here.guest, parameters()).stop_and_verify();
    }
}

#[test]
fn a_guest_that_cannot_go_on_is_its_users() {
    let here = Arc::new(WithDisks {
        save_error: Some("the disk 'root' cannot be flushed"),
        resume_error: Some("another process uses the disk 'root'"),
        ..WithDisks::new()
    });
    let (there, outgoing) = migrate(&here);
    let error = outgoing.wait().unwrap_err().to_string();
    for part in ["cannot be flushed", "another process uses", "'cont'"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!there.is_running() && !here.guest.is_running());
    here.guest.run();
    here.guest.run_some();
}
