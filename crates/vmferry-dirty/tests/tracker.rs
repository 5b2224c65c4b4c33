//! Laws 1 and 3: pages are armed before they are handed out, and a write after that shows in the next sync.

use std::sync::{Arc, Mutex};

use vmferry_dirty::log::LogError;
use vmferry_dirty::{
    ArmingChunk, Batch, BlockIndex, Cursor, DirtyLog, DirtyTracker, Discipline, PageRange,
};

const PAGES: usize = 64 * 10 + 7;

/// A log of one block that behaves as KVM's does with manual protect and initially-set.
struct ManualLog(Mutex<State>);

#[derive(Default)]
struct State {
    dirty: Vec<bool>,
    armed: Vec<bool>,
    arm_calls: usize,
    /// The next fetch reports the first half of the pages, and fails then.
    fails: bool,
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
            fails: false,
        };
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        let mut state = self.0.lock().unwrap();
        let fails = std::mem::take(&mut state.fails);
        let reported = if fails { PAGES / 2 } else { PAGES };
        for page in (0..reported).filter(|&page| state.dirty[page]) {
            into[page / 64] |= 1 << (page % 64);
        }
        match fails {
            true => Err(LogError::Kernel {
                action: "fetch the dirty log",
                block,
                source: std::io::ErrorKind::OutOfMemory.into(),
            }),
            false => Ok(()),
        }
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
        let log = Arc::new(ManualLog::new());
        let chunk = ArmingChunk::from_bytes(128 * 4096);
        let tracker = DirtyTracker::start(log.clone(), &[PAGES], discipline, chunk).unwrap();
        assert_eq!(tracker.set().dirty_pages(), PAGES as u64);
        for pass in 0..6 {
            let expected = tracker.set().dirty_pages();
            let mut sent = vec![false; PAGES];
            let mut written = 0;
            let mut send = |page: usize| {
                assert!(
                    log.is_armed(page),
                    "law 3: {page} is read before it is armed"
                );
                sent[page] = true;
                if page % 7 == pass {
                    log.write(page); // after it was read: must show up again
                    written += 1;
                }
            };
            let mut cursor = Cursor::default();
            let mut slice = tracker.slice(&mut cursor);
            match pass % 2 {
                0 => {
                    while let Some(run) = slice.next_run(13).unwrap() {
                        run.pages.indices().for_each(&mut send);
                    }
                }
                _ => {
                    let mut batch = Batch::new();
                    while slice.next_batch(&mut batch, 200).unwrap() {
                        let pages = batch.runs().iter().flat_map(|run| run.indices());
                        pages.for_each(&mut send);
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

/// Everything that is dirty, taken.
fn drain(tracker: &DirtyTracker) -> Vec<usize> {
    let (mut cursor, mut batch) = (Cursor::default(), Batch::new());
    let mut slice = tracker.slice(&mut cursor);
    let mut pages = Vec::new();
    while slice.next_batch(&mut batch, 256).unwrap() {
        pages.extend(batch.runs().iter().flat_map(|run| run.indices()));
    }
    pages
}

const BLOCK: BlockIndex = BlockIndex(0);

#[test]
fn a_page_may_be_used_again_as_soon_as_the_question_is_put() {
    for discipline in Discipline::ALL {
        let log = Arc::new(ManualLog::new());
        let chunk = ArmingChunk::from_bytes(128 * 4096);
        let tracker = DirtyTracker::start(log.clone(), &[PAGES], discipline, chunk).unwrap();
        let round = tracker.begin_hints().unwrap();
        assert!((0..PAGES).all(|page| log.is_armed(page)));
        // Its guest takes some pages into use again, one before its hint is heard and one after. Other pages of their
        // chunk are read after that, which must not arm the chunk once more.
        log.write(131);
        assert_eq!(tracker.hint(round, BLOCK, PageRange::new(130, 140)), 10);
        log.write(135);
        assert_eq!(drain(&tracker).len(), PAGES - 10);
        assert_eq!(tracker.sync().unwrap(), 2, "law 4: a write is lost");
        assert_eq!(drain(&tracker), [131, 135]);
    }
}

#[test]
fn a_hint_counts_only_in_its_round_and_inside_the_guest() {
    for discipline in Discipline::ALL {
        let log = Arc::new(ManualLog::new());
        let tracker =
            DirtyTracker::start(log.clone(), &[PAGES], discipline, ArmingChunk::default()).unwrap();
        let pages = |start, end| PageRange::new(start, end);
        let first = tracker.begin_hints().unwrap();
        assert_eq!(tracker.hint(first, BLOCK, pages(0, 3)), 3);
        assert_eq!(tracker.hint(first, BLOCK, pages(0, 4)), 1);
        let beyond = pages(PAGES - 1, usize::MAX);
        assert_eq!(tracker.hint(first, BLOCK, beyond), 1);
        assert_eq!(tracker.hint(first, BLOCK, pages(usize::MAX, 0)), 0);
        assert_eq!(tracker.hint(first, BlockIndex(1), pages(0, 9)), 0);
        tracker.sync().unwrap();
        let dirty = tracker.set().dirty_pages();
        let all = pages(0, PAGES);
        assert_eq!(tracker.hint(first, BLOCK, all), 0, "after a sync");
        let second = tracker.begin_hints().unwrap();
        assert_eq!(tracker.hint(first, BLOCK, all), 0, "of the last round");
        assert_eq!(tracker.set().dirty_pages(), dirty);
        assert_eq!(tracker.hint(second, BLOCK, all), dirty);
        assert_eq!(tracker.set().dirty_pages(), 0);
    }
}

#[test]
fn a_flush_syncs_and_takes_in_one_slice() {
    for discipline in Discipline::ALL {
        let log = Arc::new(ManualLog::new());
        let tracker =
            DirtyTracker::start(log.clone(), &[PAGES], discipline, ArmingChunk::default()).unwrap();
        drain(&tracker);
        let round = tracker.begin_hints().unwrap();
        log.write(77);
        let mut cursor = Cursor::default();
        let mut slice = tracker.slice(&mut cursor);
        assert_eq!(slice.sync().unwrap(), 1);
        assert_eq!(
            slice.next_run(64).unwrap().unwrap().pages,
            PageRange::new(77, 78)
        );
        assert!(log.is_armed(77));
        drop(slice);
        tracker.set().mark(BLOCK, PageRange::new(0, 1));
        assert_eq!(tracker.hint(round, BLOCK, PageRange::new(0, 1)), 0);
    }
}

/// Two pages of one chunk are written. A sync reports one of them before it fails. The chunk, which had something to arm
/// already, is armed then: that must not forget what was reported.
#[test]
fn what_a_sync_reports_before_it_fails_is_not_lost() {
    for discipline in Discipline::ALL {
        let log = Arc::new(ManualLog::new());
        let tracker =
            DirtyTracker::start(log.clone(), &[PAGES], discipline, ArmingChunk::default()).unwrap();
        drain(&tracker);
        log.write(1);
        tracker.sync().unwrap();
        log.write(2);
        log.write(PAGES - 1);
        log.0.lock().unwrap().fails = true;
        tracker.sync().unwrap_err();
        let set = tracker.set();
        assert_eq!(set.dirty_pages(), set.bitmap(BLOCK).count(), "law 2");
        assert_eq!(drain(&tracker), [1, 2], "law 1: a page is lost");
        tracker.sync().unwrap();
        assert_eq!(drain(&tracker), [PAGES - 1]);
    }
}

#[test]
fn a_chunk_is_armed_once_a_round() {
    let log = Arc::new(ManualLog::new());
    let chunk = ArmingChunk::from_bytes(128 * 4096);
    let tracker = DirtyTracker::start(log.clone(), &[PAGES], Discipline::LockFree, chunk).unwrap();
    let mut cursor = Cursor::default();
    let mut slice = tracker.slice(&mut cursor);
    while slice.next_run(1).unwrap().is_some() {}
    drop(slice);
    assert_eq!(log.0.lock().unwrap().arm_calls, PAGES.div_ceil(128));
}
