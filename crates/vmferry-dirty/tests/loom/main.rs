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
//! | [`a_slice_that_begins_inside_a_word_sees_what_was_written`] | the same, where a slice goes on inside a word | law 1 |
//! | [`beside::a_sync_beside_a_pass`] | a sync, a pass that arms, a guest that writes what was just read | laws 1 and 3 |
//! | [`beside::a_sync_and_a_round_of_hints_beside_a_pass`] | the same, the begin of a round, a hint | laws 1, 3 and 4 |
//! | [`beside::an_arming_beside_a_pass`] | two threads that arm one chunk, a guest that writes | laws 1 and 3; it does not reach the moment at which a weaker memory order would show (see docs/mutants.md) |
//! | [`beside::a_write_of_the_vmm_beside_a_sync_and_a_pass`] | a device, a sync, a pass | law 1 for the VMM's own writes |
//! | [`hints::a_page_in_use_again_is_not_lost`] | arming passes and a sync, a guest that hints and then writes | laws 1, 3 and 4 |
//! | [`hints::a_page_in_use_again_before_it_was_heard_is_not_lost`] | the same, a guest that writes and is heard later | law 4 |
//! | [`hints::a_hint_that_comes_late_changes_nothing`] | the same, a hint that a sync has overtaken | law 4 |
//!
//! All run under `LockFree` and `SliceLock`; the first one under `PerBitLock` as well.
#![cfg(loom)]

mod beside;
mod guest;
mod hints;

use std::sync::atomic::Ordering::Relaxed;

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;
use vmferry_dirty::{Batch, BlockIndex, Cursor, DirtySet, Discipline, PageRange};

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

#[test]
fn a_slice_that_begins_inside_a_word_sees_what_was_written() {
    for discipline in BOTH {
        loom::model(move || {
            let set = Arc::new(DirtySet::new(&[8], discipline));
            let page = Arc::new(AtomicU64::new(0));
            set.mark(BLOCK, range(0, 2));
            let writer = {
                let (set, page) = (set.clone(), page.clone());
                thread::spawn(move || {
                    page.store(1, Relaxed);
                    set.merge(BLOCK, &[0b10]);
                })
            };
            let mut cursor = Cursor::default();
            set.slice(&mut cursor).next_run(1);
            let mut last_read = None;
            if set.slice(&mut cursor).next_run(1).is_some() {
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
