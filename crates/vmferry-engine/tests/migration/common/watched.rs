//! The toy under watch: two copies of one guest that run at the same time are noticed at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use vmferry_dirty::DirtyLog;
use vmferry_engine::RamBlock;
use vmferry_engine::seam::{Activity, DeviceState, Guest, GuestError, PauseError};

use super::arming_log::ArmingLog;
use crate::toy::{PAGES, Toy};

/// How many copies of a guest run. Law 7 says at most one.
#[derive(Default)]
pub struct Runners {
    now: AtomicUsize,
    /// Remembered, because the engine's threads may swallow a panic where it happens.
    too_many: AtomicBool,
}

impl Runners {
    pub fn none() -> Arc<Self> {
        Arc::default()
    }
}

/// One copy of a guest.
pub struct Watched {
    toy: Arc<Toy>,
    log: ArmingLog,
    runners: Arc<Runners>,
}

impl Watched {
    pub fn new(runners: &Arc<Runners>) -> Arc<Self> {
        let toy = Toy::new();
        Arc::new(Watched {
            log: ArmingLog::new(&toy),
            toy,
            runners: runners.clone(),
        })
    }

    pub fn runners(&self) -> &Arc<Runners> {
        &self.runners
    }

    /// The user starts it.
    pub fn run(&self) {
        self.resume(Activity::Running).unwrap();
    }

    /// The user pauses it; all of its memory must be right then.
    pub fn stop_and_verify(&self) -> u64 {
        self.pause(Duration::ZERO).unwrap();
        self.verify()
    }

    /// Checks the memory of a guest that is paused already.
    pub fn verify(&self) -> u64 {
        self.assert_one_runner();
        assert!(!self.is_running());
        self.toy.verify()
    }

    /// Looks at a guest that has just arrived, before it has written over what may be wrong.
    pub fn verify_arrival(&self) {
        let was = self.pause(Duration::ZERO).unwrap();
        self.verify();
        self.resume(was).unwrap();
    }

    pub fn steps(&self) -> u64 {
        self.toy.steps()
    }

    pub fn is_running(&self) -> bool {
        self.toy.is_running()
    }

    /// Waits until it has gone on for long enough to write to each of its pages.
    pub fn run_some(&self) {
        let enough = self.steps() + PAGES as u64;
        super::wait_until("the guest runs", || self.steps() >= enough);
    }

    pub fn assert_one_runner(&self) {
        let too_many = self.runners.too_many.load(Ordering::SeqCst);
        assert!(!too_many, "two copies of the guest ran at once");
    }

    /// Counts before the guest runs, so that the moments of two copies cannot touch unseen.
    fn count_start(&self, activity: Activity) {
        if activity == Activity::Running
            && !self.is_running()
            && self.runners.now.fetch_add(1, Ordering::SeqCst) > 0
        {
            self.runners.too_many.store(true, Ordering::SeqCst);
        }
    }
}

impl Guest for Watched {
    fn ram(&self) -> &[RamBlock] {
        self.toy.ram()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.log
    }

    fn describe(&self) -> Result<DeviceState, GuestError> {
        self.toy.describe()
    }

    fn check_description(&self, source: &DeviceState) -> Result<(), GuestError> {
        self.toy.check_description(source)
    }

    fn pause(&self, limit: Duration) -> Result<Activity, PauseError> {
        let was = self.toy.pause(limit)?;
        if was == Activity::Running {
            self.runners.now.fetch_sub(1, Ordering::SeqCst);
        }
        Ok(was)
    }

    fn resume(&self, was: Activity) -> Result<(), GuestError> {
        self.count_start(was);
        self.toy.resume(was)
    }

    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError> {
        self.toy.save_devices()
    }

    fn load_devices(&self, states: &[DeviceState]) -> Result<(), GuestError> {
        self.toy.load_devices(states)
    }

    fn start(&self, activity: Activity, paused_for: Duration) -> Result<(), GuestError> {
        self.count_start(activity);
        self.toy.start(activity, paused_for)
    }
}
