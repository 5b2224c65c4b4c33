//! Models of the concurrent parties, checked over every interleaving and every outcome of relaxed loads that loom
//! finds. Run with `RUSTFLAGS="--cfg loom" cargo test -p vmferry-dirty --release --test loom`.
//!
//! | model | parties | shows |
//! |---|---|---|
//! | [`taker_hinter_sync`] | a pass, a hint, a sync, on one word | no bit lost, none counted twice, law 2 |
//! | [`batches_beside_hint_and_sync`] | a pass that takes a word ahead, a hint, a sync, on two words | the same |
//! | [`held_bits_go_back_beside_hint_and_sync`] | a slice that ends in the middle of a word, a hint, a sync | the same |
//! | [`flush_beside_a_hint`] | a COLO flush (merge and pass in one slice), a hint | the same |
//! | [`who_takes_a_bit_sees_what_was_written_before_it_was_set`] | a pass, a writer that merges | law 1: page content is published with the bit |
//! | [`a_page_in_use_again_is_not_lost`] | arming passes and a sync, a guest that hints and then writes | laws 1, 3 and 4 |
//! | [`a_page_in_use_again_before_it_was_heard_is_not_lost`] | the same, a guest that writes and is heard later | law 4 |
//! | [`a_hint_that_comes_late_changes_nothing`] | the same, a hint that a sync has overtaken | law 4 |
//!
//! All run under `LockFree` and `SliceLock`; the first one under `PerBitLock` as well.
#![cfg(loom)]

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use loom::sync::atomic::AtomicU64;
use loom::sync::{Arc, Mutex};
use loom::thread;
use vmferry_dirty::{
    ArmingChunk, Batch, BlockIndex, Cursor, DirtyLog, DirtySet, DirtyTracker, Discipline,
    HintRound, LogError, PageRange,
};

const BLOCK: BlockIndex = BlockIndex(0);

const BOTH: [Discipline; 2] = [Discipline::LockFree, Discipline::SliceLock];

fn range(start: usize, end: usize) -> PageRange {
    PageRange::new(start, end)
}

/// One pass; the pages that it took, which must be different ones.
fn drain(set: &DirtySet) -> Vec<usize> {
    let mut cursor = Cursor::default();
    let mut slice = set.slice(&mut cursor);
    let mut pages = Vec::new();
    while let Some(run) = slice.next_run(64) {
        for page in run.pages.indices() {
            assert!(!pages.contains(&page), "taken twice, set once");
            pages.push(page);
        }
    }
    pages
}

/// The same in batches.
fn drain_in_batches(set: &DirtySet) -> Vec<usize> {
    let (mut cursor, mut batch) = (Cursor::default(), Batch::new());
    let mut slice = set.slice(&mut cursor);
    let mut pages = Vec::new();
    while slice.next_batch(&mut batch, Batch::MAX_PAGES) {
        pages.extend(batch.runs().iter().flat_map(|run| run.indices()));
    }
    pages
}

/// Runs `take` beside a hint for `hint` and a sync that brings `log`, on a set in which `dirty` is dirty, and
/// checks the books: what became dirty is what was taken, was hinted, or is still dirty; and the count says so.
fn balance(
    discipline: Discipline,
    pages: usize,
    dirty: PageRange,
    hint: PageRange,
    log: &'static [u64],
    take: fn(&DirtySet) -> Vec<usize>,
) {
    loom::model(move || {
        let set = Arc::new(DirtySet::new(&[pages], discipline));
        set.mark(BLOCK, dirty);
        let hinter = {
            let set = set.clone();
            thread::spawn(move || set.clear(BLOCK, hint))
        };
        let sync = {
            let set = set.clone();
            thread::spawn(move || set.merge(BLOCK, log))
        };
        let taken = take(&set);
        let hinted = hinter.join().unwrap();
        let merged = sync.join().unwrap();
        let left = set.bitmap(BLOCK).count();
        assert_eq!(set.dirty_pages(), left, "law 2");
        let dirtied = dirty.len() as u64 + merged;
        assert_eq!(dirtied, taken.len() as u64 + hinted + left);
        let unhinted = dirty.indices().filter(|p| !hint.indices().contains(p));
        for page in unhinted {
            let there = taken.contains(&page) || set.bitmap(BLOCK).is_dirty(page);
            assert!(there, "page {page} is lost");
        }
    });
}

#[test]
fn taker_hinter_sync() {
    for discipline in BOTH {
        balance(discipline, 8, range(0, 4), range(2, 6), &[0b11_0010], drain);
    }
    // Fewer bits: each is an operation of its own.
    balance(
        Discipline::PerBitLock,
        3,
        range(0, 2),
        range(1, 3),
        &[0b110],
        drain,
    );
}

#[test]
fn batches_beside_hint_and_sync() {
    for discipline in BOTH {
        balance(
            discipline,
            128,
            range(63, 66),
            range(64, 67),
            &[1 << 63, 0b101],
            drain_in_batches,
        );
    }
}

#[test]
fn held_bits_go_back_beside_hint_and_sync() {
    for discipline in BOTH {
        balance(discipline, 8, range(0, 3), range(1, 4), &[0b1001], |set| {
            let mut cursor = Cursor::default();
            let mut slice = set.slice(&mut cursor);
            let run = slice.next_run(1);
            run.map_or(Vec::new(), |run| run.pages.indices().collect())
        });
    }
}

#[test]
fn flush_beside_a_hint() {
    for discipline in BOTH {
        loom::model(move || {
            let set = Arc::new(DirtySet::new(&[8], discipline));
            set.mark(BLOCK, range(0, 2));
            let hinter = {
                let set = set.clone();
                thread::spawn(move || set.clear(BLOCK, range(1, 4)))
            };
            let mut cursor = Cursor::default();
            let mut slice = set.slice(&mut cursor);
            let merged = slice.merge(BLOCK, &[0b1100]);
            let mut taken = 0;
            while let Some(run) = slice.next_run(64) {
                taken += run.pages.len() as u64;
            }
            drop(slice);
            let hinted = hinter.join().unwrap();
            let left = set.bitmap(BLOCK).count();
            assert_eq!((set.dirty_pages(), left), (0, 0), "law 2");
            assert_eq!(2 + merged, taken + hinted);
            if discipline == Discipline::SliceLock {
                let whole = matches!(hinted, 0 | 1);
                assert!(whole, "a hint came between the flush's sync and its clears");
            }
        });
    }
}

#[test]
fn who_takes_a_bit_sees_what_was_written_before_it_was_set() {
    for discipline in BOTH {
        loom::model(move || {
            let set = Arc::new(DirtySet::new(&[8], discipline));
            let page = Arc::new(AtomicU64::new(0));
            // The bit may be set already, from an earlier write.
            set.mark(BLOCK, range(0, 1));
            let writer = {
                let (set, page) = (set.clone(), page.clone());
                thread::spawn(move || {
                    page.store(1, Relaxed);
                    set.merge(BLOCK, &[1]);
                })
            };
            let mut last_read = None;
            if !drain(&set).is_empty() {
                last_read = Some(page.load(Relaxed));
            }
            writer.join().unwrap();
            if !drain(&set).is_empty() {
                last_read = Some(page.load(Relaxed));
            }
            assert_eq!(last_read, Some(1), "law 1: the last content was never sent");
        });
    }
}

/// A log of two pages that behaves as KVM's does with manual protect and initially-set, and the pages.
struct Guest {
    log: Mutex<Log>,
    pages: [AtomicU64; 2],
}

struct Log {
    dirty: u64,
    armed: u64,
}

impl Guest {
    /// A vCPU's write: KVM logs it before the store, if the page is armed.
    fn write(&self, page: usize, value: u64) {
        let mut log = self.log.lock().unwrap();
        if log.armed >> page & 1 == 1 {
            log.armed &= !(1 << page);
            log.dirty |= 1 << page;
        }
        self.pages[page].store(value, Release);
    }
}

impl DirtyLog for Guest {
    fn start(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, _: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        into[0] |= self.log.lock().unwrap().dirty;
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        true
    }

    fn arm(&self, _: BlockIndex, _: PageRange, pages: &[u64]) -> Result<(), LogError> {
        let mut log = self.log.lock().unwrap();
        log.dirty &= !pages[0];
        log.armed |= pages[0];
        Ok(())
    }
}

/// A migration of the two pages under way, in its first round of hints.
#[derive(Clone)]
struct Migration {
    guest: std::sync::Arc<Guest>,
    tracker: std::sync::Arc<DirtyTracker>,
    round: HintRound,
}

impl Migration {
    fn start(discipline: Discipline) -> Self {
        let guest = std::sync::Arc::new(Guest {
            log: Mutex::new(Log { dirty: 3, armed: 0 }),
            pages: [AtomicU64::new(0), AtomicU64::new(0)],
        });
        let chunk = ArmingChunk::default();
        let tracker = DirtyTracker::start(guest.clone(), &[2], discipline, chunk).unwrap();
        let round = tracker.begin_hints().unwrap();
        Migration {
            guest,
            tracker: tracker.into(),
            round,
        }
    }

    /// The balloon says that page 0 is free.
    fn hint(&self) {
        self.tracker.hint(self.round, BLOCK, range(0, 1));
    }

    /// Sends what is dirty.
    fn pass(&self, sent: &mut [u64; 2]) {
        let mut cursor = Cursor::default();
        let mut slice = self.tracker.slice(&mut cursor);
        while let Some(run) = slice.next_run(64).unwrap() {
            for page in run.pages.indices() {
                sent[page] = self.guest.pages[page].load(Acquire);
            }
        }
    }

    /// Checks that page 0 was sent as it is now, and the count.
    fn check(&self, sent: &[u64; 2]) {
        assert_eq!(sent[0], 1, "the page was lost");
        let set = self.tracker.set();
        assert_eq!(set.dirty_pages(), set.bitmap(BLOCK).count(), "law 2");
    }
}

/// Runs a model under each discipline. There are some 50 points to switch at: with more than three switches it takes
/// hours.
fn check_with_three_switches(model: fn(Discipline)) {
    for discipline in BOTH {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || model(discipline));
    }
}

/// A guest says that page 0 is free, and, once that was heard, uses it again. Meanwhile the migration sends page 1,
/// which is in the same chunk, and may come to a sync. Whatever was overtaken by what, the last content of page 0
/// is sent.
#[test]
fn a_page_in_use_again_is_not_lost() {
    check_with_three_switches(|discipline| {
        let migration = Migration::start(discipline);
        let other = migration.clone();
        let balloon = thread::spawn(move || {
            other.hint();
            other.guest.write(0, 1);
        });
        let mut sent = [0, 0];
        migration.pass(&mut sent);
        migration.tracker.sync().unwrap();
        migration.pass(&mut sent);
        balloon.join().unwrap();
        migration.tracker.sync().unwrap();
        migration.pass(&mut sent);
        migration.check(&sent);
    });
}

/// The same, but the guest does not wait until it was heard.
#[test]
fn a_page_in_use_again_before_it_was_heard_is_not_lost() {
    check_with_three_switches(|discipline| {
        let migration = Migration::start(discipline);
        let other = migration.clone();
        let balloon = thread::spawn(move || {
            other.guest.write(0, 1);
            other.hint();
        });
        let mut sent = [0, 0];
        migration.pass(&mut sent);
        migration.tracker.sync().unwrap();
        migration.pass(&mut sent);
        balloon.join().unwrap();
        migration.tracker.sync().unwrap();
        migration.pass(&mut sent);
        migration.check(&sent);
    });
}

/// A guest has said that page 0 is free, but before that is heard a sync comes, the guest is told that its round is
/// over, and uses the page again. No other round follows: the migration is about to end.
#[test]
fn a_hint_that_comes_late_changes_nothing() {
    check_with_three_switches(|discipline| {
        let migration = Migration::start(discipline);
        let other = migration.clone();
        let balloon = thread::spawn(move || other.hint());
        let mut sent = [0, 0];
        migration.pass(&mut sent);
        migration.tracker.sync().unwrap();
        migration.guest.write(0, 1);
        migration.tracker.sync().unwrap();
        migration.pass(&mut sent);
        balloon.join().unwrap();
        migration.check(&sent);
    });
}
