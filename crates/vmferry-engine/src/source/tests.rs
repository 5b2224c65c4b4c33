//! Law 5: a slice of work ends, whatever the channel does.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::mmap::MmapRegion;
use vmferry_dirty::{
    ArmingChunk, BlockIndex, Cursor, DirtyLog, DirtyTracker, Discipline, LogError, PAGE_SIZE,
    PageIndex, PageRange,
};
use vmferry_wire::{Encoder, RamLayout};

use super::bandwidth::BandwidthMeter;
use super::driver::{Driver, Hold};
use super::pace::RateLimiter;
use super::precopy::{MAX_WAIT, Pace, SliceEnd};
use super::shared::Shared;
use super::writer::StreamWriter;
use crate::cancel::CancelToken;
use crate::error::MigrationError;
use crate::info::Observer;
use crate::params::Parameters;
use crate::ram::RamBlock;
use crate::seam::{Activity, DeviceState, Guest, GuestError, PauseError};
use crate::status::Status;
use crate::transport::Channel;

/// More than any socket buffer holds.
const PAGES: usize = (256 << 20) / PAGE_SIZE;

/// What a busy machine may add, now and then.
const SLACK: Duration = Duration::from_millis(100);

/// How long is waited for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest that is nothing but memory.
struct Memory(Vec<RamBlock>);

impl Memory {
    fn new() -> Self {
        let region: Arc<MmapRegion> = Arc::new(MmapRegion::new(PAGES * PAGE_SIZE).unwrap());
        let (host, len) = (region.as_ptr(), PAGES * PAGE_SIZE);
        // SAFETY: mapped as long as the Arc lives, and nobody else reaches it.
        let block = unsafe { RamBlock::new("ram", host, len, region) }.unwrap();
        // A first byte is enough for a page to be sent as data.
        let mut content = [0; PAGE_SIZE];
        content[0] = 1;
        for page in 0..PAGES {
            block.write_page(PageIndex(page), &content);
        }
        Memory(vec![block])
    }
}

impl Guest for Memory {
    fn ram(&self) -> &[RamBlock] {
        &self.0
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &NoLog
    }

    fn describe(&self) -> Result<DeviceState, GuestError> {
        unreachable!("a slice is only about RAM")
    }

    fn check_description(&self, _: &DeviceState) -> Result<(), GuestError> {
        unreachable!("a slice is only about RAM")
    }

    fn pause(&self, _: Duration) -> Result<Activity, PauseError> {
        unreachable!("a slice is only about RAM")
    }

    fn resume(&self, _: Activity) -> Result<(), GuestError> {
        unreachable!("a slice is only about RAM")
    }

    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError> {
        unreachable!("a slice is only about RAM")
    }

    fn load_devices(&self, _: &[DeviceState]) -> Result<(), GuestError> {
        unreachable!("a slice is only about RAM")
    }

    fn start(&self, _: Activity, _: Duration) -> Result<(), GuestError> {
        unreachable!("a slice is only about RAM")
    }
}

struct NoLog;

impl DirtyLog for NoLog {
    fn start(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, _: BlockIndex, _: &mut [u64]) -> Result<(), LogError> {
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        false
    }

    fn arm(&self, _: BlockIndex, _: PageRange, _: &[u64]) -> Result<(), LogError> {
        Ok(())
    }
}

struct Nobody;

impl Observer for Nobody {
    fn status(&self, _: Status) {}
    fn pass(&self, _: u64) {}
}

/// Runs `test` for a driver under each discipline, with the other end of its channel.
fn with_driver(parameters: Parameters, test: impl Fn(&mut Driver<'_>, &DirtyTracker, UnixStream)) {
    let guest: Arc<dyn Guest> = Arc::new(Memory::new());
    for discipline in Discipline::ALL {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let cancel = CancelToken::new().unwrap();
        let channel = Channel::new(ours.into(), cancel.clone()).unwrap();
        let shared = Shared::new(cancel, parameters, Box::new(Nobody));
        let layout = RamLayout::new([("ram", (PAGES * PAGE_SIZE) as u64)]).unwrap();
        let mut driver = Driver {
            guest: &guest,
            shared: &shared,
            channel: &channel,
            writer: StreamWriter::new(Encoder::new(layout)),
            return_path: None,
            limiter: RateLimiter::new(Instant::now()),
            meter: BandwidthMeter::new(),
            hold: Hold::None,
            pinging: None,
        };
        let tracker = DirtyTracker::start(
            Arc::new(NoLog),
            &[PAGES],
            discipline,
            ArmingChunk::default(),
        )
        .unwrap();
        test(&mut driver, &tracker, theirs);
    }
}

/// Does a slice: how it ended, and how long it took.
fn timed(
    driver: &mut Driver<'_>,
    tracker: &DirtyTracker,
    cursor: &mut Cursor,
) -> (SliceEnd, Duration) {
    let start = Instant::now();
    let end = driver.slice(tracker, cursor, Pace::Limited).unwrap();
    (end, start.elapsed())
}

/// Does so many slices, none of which gets through its pass.
fn out_of_time(driver: &mut Driver<'_>, tracker: &DirtyTracker, slices: usize) {
    let (mut cursor, mut took) = (Cursor::default(), Vec::new());
    for _ in 0..slices {
        let (end, time) = timed(driver, tracker, &mut cursor);
        assert_eq!(end, SliceEnd::TimeIsUp);
        took.push(time);
    }
    assert_bounded(&took);
}

/// Slices are over in time. The machine may take its CPU away from any of them, but not from every one.
fn assert_bounded(took: &[Duration]) {
    let shortest = took.iter().min().expect("there was a slice");
    assert!(*shortest < MAX_WAIT + SLACK, "{took:?}");
}

#[test]
fn when_nobody_reads() {
    with_driver(Parameters::default(), |driver, tracker, _theirs| {
        out_of_time(driver, tracker, 5);
    });
}

#[test]
fn when_somebody_reads_slowly() {
    with_driver(Parameters::default(), |driver, tracker, mut theirs| {
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            while theirs.read(&mut buffer).is_ok_and(|n| n > 0) {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        out_of_time(driver, tracker, 10);
        driver.channel.shutdown();
        reader.join().unwrap();
    });
}

#[test]
fn when_somebody_reads_as_fast_as_we_write() {
    with_driver(Parameters::default(), |driver, tracker, mut theirs| {
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            while theirs.read(&mut buffer).is_ok_and(|n| n > 0) {}
        });
        let (mut cursor, mut took) = (Cursor::default(), Vec::new());
        loop {
            let (end, time) = timed(driver, tracker, &mut cursor);
            took.push(time);
            if end == SliceEnd::PassDone {
                break;
            }
        }
        assert_bounded(&took);
        assert_eq!(tracker.set().dirty_pages(), 0);
        driver.channel.shutdown();
        reader.join().unwrap();
    });
}

#[test]
fn when_the_limit_is_reached() {
    let limited = Parameters {
        max_bandwidth: Some(200_000),
        ..Parameters::default()
    };
    with_driver(limited, |driver, tracker, _theirs| {
        let mut cursor = Cursor::default();
        let end = driver.slice(tracker, &mut cursor, Pace::Limited).unwrap();
        // A tenth of a second's worth is 20000 bytes: four pages and the one that goes beyond.
        assert!(matches!(end, SliceEnd::RateLimit(_)), "{end:?}");
        assert!(driver.writer.written() < 30_000);
        // Nothing is held back that was taken: what is not written is still dirty.
        let left = tracker.set().dirty_pages();
        assert_eq!(
            left,
            PAGES as u64 - driver.writer.written() / PAGE_SIZE as u64
        );
    });
}

#[test]
fn when_told_to_stop() {
    with_driver(Parameters::default(), |driver, tracker, _theirs| {
        let mut cursor = Cursor::default();
        let canceller = driver.shared.cancel.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            canceller.cancel();
        });
        let start = Instant::now();
        // Slices whose time is up before it is told.
        let error = loop {
            let end = driver.slice(tracker, &mut cursor, Pace::Limited);
            if end.is_err() || start.elapsed() > PATIENCE {
                break end;
            }
        };
        thread.join().unwrap();
        assert!(
            matches!(
                error,
                Err(MigrationError::Cancelled | MigrationError::Connection { .. })
            ),
            "{error:?}"
        );
    });
}
