//! Laws 1 and 3: pages are armed before they are handed out, and a write after that shows in the next sync.

use std::sync::Mutex;

use vmferry_dirty::log::LogError;
use vmferry_dirty::{
    ArmingChunk, BlockIndex, Cursor, DirtyLog, DirtyTracker, Discipline, PageRange,
};

const PAGES: usize = 64 * 10 + 7;

/// A log of one block that behaves as KVM's does with manual protect and initially-set.
struct ManualLog(Mutex<State>);

#[derive(Default)]
struct State {
    dirty: Vec<bool>,
    armed: Vec<bool>,
    arm_calls: usize,
}

impl ManualLog {
    fn new() -> Self {
        ManualLog(Mutex::new(State::default()))
    }

    /// What the guest does: reported only if the page was armed, or is dirty already.
    fn write(&self, page: usize) {
        let mut state = self.0.lock().unwrap();
        if state.armed[page] {
            state.dirty[page] = true;
            state.armed[page] = false;
        }
    }

    fn is_armed(&self, page: usize) -> bool {
        self.0.lock().unwrap().armed[page]
    }
}

impl DirtyLog for ManualLog {
    fn start(&self) -> Result<(), LogError> {
        *self.0.lock().unwrap() = State {
            dirty: vec![true; PAGES],
            armed: vec![false; PAGES],
            arm_calls: 0,
        };
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, _: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        for (page, _) in self
            .0
            .lock()
            .unwrap()
            .dirty
            .iter()
            .enumerate()
            .filter(|(_, d)| **d)
        {
            into[page / 64] |= 1 << (page % 64);
        }
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        true
    }

    fn arm(&self, _: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError> {
        assert!(
            range.start.0.is_multiple_of(64)
                && (range.end.0.is_multiple_of(64) || range.end.0 == PAGES)
        );
        let mut state = self.0.lock().unwrap();
        state.arm_calls += 1;
        for (i, page) in range.indices().enumerate() {
            if pages[i / 64] >> (i % 64) & 1 == 1 {
                state.dirty[page] = false;
                state.armed[page] = true;
            }
        }
        Ok(())
    }
}

#[test]
fn a_page_is_armed_before_it_is_handed_out_and_a_later_write_is_not_lost() {
    for discipline in Discipline::ALL {
        let log = ManualLog::new();
        let chunk = ArmingChunk::from_bytes(128 * 4096);
        let tracker = DirtyTracker::start(&log, &[PAGES], discipline, chunk).unwrap();
        assert_eq!(tracker.set().dirty_pages(), PAGES as u64);
        for pass in 0..4 {
            let expected = tracker.set().dirty_pages();
            let mut sent = vec![false; PAGES];
            let mut cursor = Cursor::default();
            let mut slice = tracker.slice(&mut cursor);
            let mut written = 0;
            while let Some(run) = slice.next_run(13).unwrap() {
                for page in run.pages.indices() {
                    assert!(
                        log.is_armed(page),
                        "law 3: {page} is read before it is armed"
                    );
                    sent[page] = true;
                    if page % 5 == pass {
                        log.write(page); // after it was read: must show up again
                        written += 1;
                    }
                }
            }
            drop(slice);
            assert_eq!(sent.iter().filter(|s| **s).count() as u64, expected);
            assert_eq!(tracker.set().dirty_pages(), 0);
            assert_eq!(tracker.sync().unwrap(), written, "law 1: a write was lost");
        }
    }
}

#[test]
fn a_chunk_is_armed_once_a_round() {
    let log = ManualLog::new();
    let chunk = ArmingChunk::from_bytes(128 * 4096);
    let tracker = DirtyTracker::start(&log, &[PAGES], Discipline::LockFree, chunk).unwrap();
    let mut cursor = Cursor::default();
    let mut slice = tracker.slice(&mut cursor);
    while slice.next_run(1).unwrap().is_some() {}
    drop(slice);
    assert_eq!(log.0.lock().unwrap().arm_calls, PAGES.div_ceil(128));
}
