//! Measuring how fast a guest dirties its memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmferry_dirty::{BlockIndex, DirtyLog, LogError, PageRange};
use vmferry_engine::dirty_rate::{DirtyRateError, Method, Progress, Rate};
use vmferry_engine::seam::{Activity, DeviceState, Guest, GuestError, PauseError};
use vmferry_engine::{DirtyRate, RamBlock};

use crate::common::{ArmingLog, move_on, parameters, running_guest, wait_until};
use crate::toy::{PAGES, Toy};

/// Every page of any guest.
const EVERY_PAGE: Method = Method::PageSampling {
    pages_per_gib: 1 << 18,
};

/// A toy and one of the logs below.
struct WithLog<L> {
    toy: Arc<Toy>,
    log: L,
}

impl<L: DirtyLog> Guest for WithLog<L> {
    fn ram(&self) -> &[RamBlock] {
        self.toy.ram()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.log
    }

    fn describe(&self) -> Result<DeviceState, GuestError> {
        unreachable!("it is only measured")
    }

    fn check_description(&self, _: &DeviceState) -> Result<(), GuestError> {
        unreachable!("it is only measured")
    }

    fn pause(&self, _: Duration) -> Result<Activity, PauseError> {
        unreachable!("it is only measured")
    }

    fn resume(&self, _: Activity) -> Result<(), GuestError> {
        unreachable!("it is only measured")
    }

    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError> {
        unreachable!("it is only measured")
    }

    fn load_devices(&self, _: &[DeviceState]) -> Result<(), GuestError> {
        unreachable!("it is only measured")
    }

    fn start(&self, _: Activity, _: Duration) -> Result<(), GuestError> {
        unreachable!("it is only measured")
    }
}

fn arming(toy: &Arc<Toy>) -> Arc<dyn Guest> {
    Arc::new(WithLog {
        toy: toy.clone(),
        log: ArmingLog::new(toy),
    })
}

/// A log like the rings of two vCPUs: every fourth page is the first one's, and every page is logged twice.
struct Rings {
    toy: Arc<Toy>,
    written: [AtomicU64; 2],
}

impl DirtyLog for Rings {
    fn start(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        const FIRST: u64 = 0x1111_1111_1111_1111;
        let mut new = vec![0; into.len()];
        self.toy.dirty_log().fetch(block, &mut new)?;
        for (into, new) in into.iter_mut().zip(new) {
            for (written, mask) in self.written.iter().zip([FIRST, !FIRST]) {
                let pages = u64::from((new & mask).count_ones());
                written.fetch_add(2 * pages, Ordering::Relaxed);
            }
            *into |= new;
        }
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        false
    }

    fn arm(&self, _: BlockIndex, _: PageRange, _: &[u64]) -> Result<(), LogError> {
        Ok(())
    }

    fn written_per_vcpu(&self) -> Option<Vec<u64>> {
        let written = self.written.iter();
        Some(written.map(|w| w.load(Ordering::Relaxed)).collect())
    }
}

fn ringed(toy: &Arc<Toy>) -> Arc<dyn Guest> {
    Arc::new(WithLog {
        toy: toy.clone(),
        log: Rings {
            toy: toy.clone(),
            written: Default::default(),
        },
    })
}

fn finish(measurement: &DirtyRate) -> Rate {
    wait_until("measured", || measurement.progress() != Progress::Measuring);
    match measurement.progress() {
        Progress::Measured(rate) => rate,
        other => panic!("{other:?}"),
    }
}

fn measure(guest: Arc<dyn Guest>, method: Method, time: Duration) -> Rate {
    finish(&DirtyRate::start(guest, method, time).unwrap())
}

/// Writes to a page now and then, and never twice to one. Steps a second are returned when `meanwhile` is over.
fn while_it_writes_slowly<T>(toy: &Toy, meanwhile: impl FnOnce() -> T) -> (f64, T) {
    let quit = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !quit.load(Ordering::Relaxed) {
                // A paused toy takes a step when it is saved.
                toy.save_devices().unwrap();
                std::thread::sleep(Duration::from_micros(1500));
            }
        });
        let (start, before) = (Instant::now(), toy.steps());
        let done = meanwhile();
        let rate = (toy.steps() - before) as f64 / start.elapsed().as_secs_f64();
        quit.store(true, Ordering::Relaxed);
        (rate, done)
    })
}

#[test]
fn a_known_rate_by_every_method() {
    const TIME: Duration = Duration::from_millis(1500);
    for (name, method, guest) in [
        ("sampling", EVERY_PAGE, arming as fn(&Arc<Toy>) -> _),
        ("bitmap", Method::DirtyBitmap, arming),
        ("bitmap of a ring", Method::DirtyBitmap, ringed),
        ("ring", Method::DirtyRing, ringed),
    ] {
        let toy = Toy::new();
        // Page 0 is written with what it holds at first, and so seems clean to who looks at the content.
        let (written, rate) = while_it_writes_slowly(&toy, || measure(guest(&toy), method, TIME));
        assert!(toy.steps() < PAGES as u64, "too fast for this test");
        let measured = rate.pages_per_second as f64;
        println!("{name}: {measured} measured, {written:.0} written");
        assert!(
            (0.7..1.3).contains(&(measured / written)),
            "{name}: {measured} measured, {written} written"
        );
        assert_eq!(rate.per_vcpu.is_some(), method == Method::DirtyRing);
        if let Some(vcpus) = rate.per_vcpu {
            assert_eq!(vcpus.iter().sum::<u64>(), rate.pages_per_second);
            let share = vcpus[0] as f64 / measured;
            assert!((0.2..0.3).contains(&share), "{vcpus:?}");
        }
    }
}

#[test]
fn pages_written_again_and_again() {
    const TIME: Duration = Duration::from_secs(2);
    let toy = Toy::new();
    toy.start(Activity::Running, Duration::ZERO).unwrap();
    // No page counts twice: at most all RAM in the time.
    let most = PAGES as f64 / TIME.as_secs_f64();
    let mut once = 0;
    for method in [EVERY_PAGE, Method::DirtyBitmap] {
        let rate = measure(arming(&toy), method, TIME);
        assert!(rate.pages_per_second as f64 <= most, "{method}: {rate:?}");
        once = rate.pages_per_second;
    }
    let rate = measure(ringed(&toy), Method::DirtyRing, TIME);
    assert!(rate.pages_per_second > 2 * once, "{rate:?}");
}

#[test]
fn a_paused_guest_dirties_nothing() {
    let toy = Toy::new();
    toy.save_devices().unwrap();
    for method in Method::ALL {
        let rate = measure(ringed(&toy), method, Duration::from_millis(50));
        assert_eq!(rate.pages_per_second, 0, "{method}");
    }
}

/// A log that remembers whether it is on.
struct Switched {
    inner: ArmingLog,
    on: AtomicBool,
}

impl DirtyLog for Switched {
    fn start(&self) -> Result<(), LogError> {
        self.on.store(true, Ordering::SeqCst);
        self.inner.start()
    }

    fn stop(&self) -> Result<(), LogError> {
        self.on.store(false, Ordering::SeqCst);
        self.inner.stop()
    }

    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        self.inner.fetch(block, into)
    }

    fn needs_arming(&self) -> bool {
        self.inner.needs_arming()
    }

    fn arm(&self, block: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError> {
        self.inner.arm(block, range, pages)
    }

    fn written_per_vcpu(&self) -> Option<Vec<u64>> {
        Some(vec![0])
    }
}

#[test]
fn ended_at_once_whenever_that_is() {
    let toy = Toy::new();
    toy.start(Activity::Running, Duration::ZERO).unwrap();
    let guest = Arc::new(WithLog {
        log: Switched {
            inner: ArmingLog::new(&toy),
            on: AtomicBool::new(false),
        },
        toy,
    });
    for method in Method::ALL {
        for wait in [0, 1, 30, 150] {
            let measurement =
                DirtyRate::start(guest.clone(), method, Duration::from_secs(60)).unwrap();
            std::thread::sleep(Duration::from_millis(wait));
            assert_eq!(measurement.progress(), Progress::Measuring);
            let start = Instant::now();
            drop(measurement);
            assert!(start.elapsed() < Duration::from_secs(20), "{method}");
            assert!(!guest.log.on.load(Ordering::SeqCst), "{method}");
        }
    }
    // And switched off after one that came to its end.
    let measurement = DirtyRate::start(
        guest.clone(),
        Method::DirtyBitmap,
        Duration::from_millis(50),
    );
    finish(&measurement.unwrap());
    assert!(!guest.log.on.load(Ordering::SeqCst));
}

/// A log that does not work.
struct Broken {
    panics: bool,
}

impl DirtyLog for Broken {
    fn start(&self) -> Result<(), LogError> {
        assert!(!self.panics, "a log with a bug, on purpose");
        Err(LogError::Kernel {
            action: "switch the log on",
            block: BlockIndex(0),
            source: std::io::ErrorKind::PermissionDenied.into(),
        })
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, _: BlockIndex, _: &mut [u64]) -> Result<(), LogError> {
        unreachable!("it was not started")
    }

    fn needs_arming(&self) -> bool {
        false
    }

    fn arm(&self, _: BlockIndex, _: PageRange, _: &[u64]) -> Result<(), LogError> {
        unreachable!("it was not started")
    }
}

#[test]
fn a_log_that_fails() {
    for (panics, part) in [(false, "cannot switch the log on"), (true, "panicked")] {
        let guest = Arc::new(WithLog {
            toy: Toy::new(),
            log: Broken { panics },
        });
        let time = Duration::from_millis(50);
        let measurement = DirtyRate::start(guest.clone(), Method::DirtyBitmap, time).unwrap();
        wait_until("it has failed", || {
            measurement.progress() != Progress::Measuring
        });
        match measurement.progress() {
            Progress::Failed(why) => assert!(why.contains(part), "{why}"),
            other => panic!("{other:?}"),
        }
        // Sampling does not need it.
        measure(guest, EVERY_PAGE, time);
    }
}

#[test]
fn a_log_that_is_no_ring() {
    let start = DirtyRate::start(arming(&Toy::new()), Method::DirtyRing, Duration::ZERO);
    let Err(error) = start else {
        panic!("it was started")
    };
    assert!(matches!(error, DirtyRateError::NoRing));
    assert!(error.to_string().contains("'--dirty-log ring'"), "{error}");
}

/// A guest that was measured, to the end or not, migrates as any other.
#[test]
fn a_guest_moves_after_it_was_measured() {
    let mut guest = running_guest();
    for method in [Method::DirtyBitmap, EVERY_PAGE] {
        let time = Duration::from_millis(50);
        measure(guest.clone(), method, time);
        let given_up = DirtyRate::start(guest.clone(), method, Duration::from_secs(60)).unwrap();
        std::thread::sleep(time);
        drop(given_up);
        guest = move_on(&guest, parameters());
    }
    guest.stop_and_verify();
}
