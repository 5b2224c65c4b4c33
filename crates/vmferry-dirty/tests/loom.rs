//! Models of the concurrent parties, checked over every interleaving that loom finds. Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p vmferry-dirty --release --test loom`.
#![cfg(loom)]

use loom::sync::Arc;
use loom::thread;
use vmferry_dirty::{BlockIndex, Cursor, DirtySet, Discipline, PageRange};

const BLOCK: BlockIndex = BlockIndex(0);

fn drain(set: &DirtySet) -> u64 {
    let mut cursor = Cursor::default();
    let mut slice = set.slice(&mut cursor);
    let mut bits = 0;
    while let Some(run) = slice.next_run(64) {
        for page in run.pages.indices() {
            assert_eq!(
                bits >> page & 1,
                0,
                "a page was taken twice without being set between"
            );
            bits |= 1 << page;
        }
    }
    bits
}

/// Covers: one pass of the taker against one hint and one sync, all on the same word. No bit is lost (each is
/// taken, hinted away, or still set), none is counted twice, and the count is exact in the end.
fn taker_hinter_sync(discipline: Discipline) {
    loom::model(move || {
        let set = Arc::new(DirtySet::new(&[8], discipline));
        set.mark(BLOCK, PageRange::new(0, 4));
        let hinter = {
            let set = set.clone();
            thread::spawn(move || set.clear(BLOCK, PageRange::new(2, 6)))
        };
        let sync = {
            let set = set.clone();
            thread::spawn(move || set.merge(BLOCK, &[0b11_0010]))
        };
        let taken = drain(&set);
        let hinted = hinter.join().unwrap();
        let merged = sync.join().unwrap();
        let left = set.bitmap(BLOCK).count();
        assert_eq!(set.dirty_pages(), left, "law 2");
        assert_eq!(4 + merged, u64::from(taken.count_ones()) + hinted + left);
        // Pages 0 and 1 were not hinted: sent, or still to be sent.
        assert!((0..2).all(|p| taken >> p & 1 == 1 || set.bitmap(BLOCK).is_dirty(p)));
    });
}

#[test]
fn taker_hinter_sync_lock_free() {
    taker_hinter_sync(Discipline::LockFree);
}

#[test]
fn taker_hinter_sync_slice_lock() {
    taker_hinter_sync(Discipline::SliceLock);
}

/// Covers: the publication of page content. A writer stores to a "page" and merges its bit; a taker that gets
/// the bit reads what was written (law 1).
#[test]
fn who_takes_a_bit_sees_what_was_written_before_it_was_set() {
    use loom::sync::atomic::{AtomicU64, Ordering};
    loom::model(|| {
        let set = Arc::new(DirtySet::new(&[8], Discipline::LockFree));
        let page = Arc::new(AtomicU64::new(0));
        // The bit may be set already, from an earlier write.
        set.mark(BLOCK, PageRange::new(0, 1));
        let writer = {
            let (set, page) = (set.clone(), page.clone());
            thread::spawn(move || {
                page.store(1, Ordering::Relaxed);
                set.merge(BLOCK, &[1]);
            })
        };
        let mut last_read = None;
        if drain(&set) != 0 {
            last_read = Some(page.load(Ordering::Relaxed));
        }
        writer.join().unwrap();
        if drain(&set) != 0 {
            last_read = Some(page.load(Ordering::Relaxed));
        }
        assert_eq!(last_read, Some(1), "law 1: the last content was never sent");
    });
}
