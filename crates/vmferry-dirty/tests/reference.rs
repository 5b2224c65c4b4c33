//! Long random histories against a plain reference model: a set of page numbers.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use vmferry_dirty::{
    Batch, BlockIndex, Cursor, DirtySet, Discipline, PUBLISH_INTERVAL, PageRange, Run, Slice,
};

const BLOCKS: [usize; 3] = [1, 200, 64 * 5];

#[derive(Clone, Debug)]
enum Op {
    Mark(usize, PageRange),
    Merge(usize, Vec<u64>),
    Clear(usize, PageRange),
    /// Take up to so many runs, or batches of them, of so many pages, and give every n-th back.
    Slice {
        take: Take,
        times: usize,
        max: usize,
        give_back: usize,
    },
    /// A COLO flush: a log is merged and everything taken in one slice.
    Flush(usize, Vec<u64>),
    Rewind,
}

#[derive(Clone, Copy, Debug)]
enum Take {
    Runs,
    Batches,
}

fn range() -> impl Strategy<Value = PageRange> {
    (0..400usize, 0..300usize).prop_map(|(start, len)| PageRange::new(start, start + len))
}

fn op() -> impl Strategy<Value = Op> {
    let block = 0..BLOCKS.len();
    prop_oneof![
        (block.clone(), range()).prop_map(|(b, r)| Op::Mark(b, r)),
        (block.clone(), prop::collection::vec(any::<u64>(), 5)).prop_map(|(b, w)| Op::Merge(b, w)),
        (block, range()).prop_map(|(b, r)| Op::Clear(b, r)),
        (
            prop_oneof![Just(Take::Runs), Just(Take::Batches)],
            1..40usize,
            1..300usize,
            1..5usize
        )
            .prop_map(|(take, times, max, give_back)| Op::Slice {
                take,
                times,
                max,
                give_back
            }),
        (0..BLOCKS.len(), prop::collection::vec(any::<u64>(), 5))
            .prop_map(|(b, w)| Op::Flush(b, w)),
        Just(Op::Rewind),
    ]
}

type Model = BTreeSet<(usize, usize)>;

fn check(set: &DirtySet, model: &Model) {
    assert_eq!(set.dirty_pages(), model.len() as u64, "law 2: the count");
    for (block, &pages) in BLOCKS.iter().enumerate() {
        let bitmap = set.bitmap(BlockIndex(block));
        let expected = model.iter().filter(|(b, _)| *b == block).count() as u64;
        assert_eq!(bitmap.count(), expected);
        let mut visited = Vec::new();
        bitmap.visit(|run| {
            let gap = visited.last().is_none_or(|&last| last + 1 < run.start.0);
            assert!(gap && !run.is_empty(), "runs are whole and in order");
            visited.extend(run.indices());
        });
        assert!(
            visited
                .iter()
                .map(|&p| (block, p))
                .eq(model.iter().copied().filter(|(b, _)| *b == block))
        );
        for page in 0..pages + 3 {
            assert_eq!(bitmap.is_dirty(page), model.contains(&(block, page)));
        }
    }
}

/// What is taken next: one run, or those of a batch.
fn take(slice: &mut Slice<'_>, how: Take, max: usize) -> Vec<Run> {
    match how {
        Take::Runs => slice.next_run(max).into_iter().collect(),
        Take::Batches => {
            let mut batch = Batch::new();
            assert_eq!(slice.next_batch(&mut batch, max), !batch.is_empty());
            let block = batch.block();
            assert!(batch.runs().is_sorted_by(|a, b| a.end < b.start));
            let runs: Vec<_> = batch
                .runs()
                .iter()
                .map(|&pages| Run { block, pages })
                .collect();
            let pages = runs.iter().map(|run| run.pages.len()).sum::<usize>();
            assert_eq!(pages, batch.pages());
            runs
        }
    }
}

fn run_slice(
    set: &DirtySet,
    model: &mut Model,
    cursor: &mut Cursor,
    (how, times, max, give_back): (Take, usize, usize, usize),
) {
    let mut slice = set.slice(cursor);
    let mut returned: Vec<Run> = Vec::new();
    for i in 0..times {
        let runs = take(&mut slice, how, max);
        assert!(runs.iter().map(|run| run.pages.len()).sum::<usize>() <= max);
        for run in runs {
            assert!(!run.pages.is_empty());
            for page in run.pages.indices() {
                assert!(model.remove(&(run.block.0, page)), "a clean page was taken");
            }
            if i % give_back == 0 {
                returned.push(run);
            }
        }
    }
    for run in returned {
        slice.give_back(run);
        model.extend(run.pages.indices().map(|p| (run.block.0, p)));
    }
}

/// Words as a log of `block`, with nothing beyond its end, and the pages in them.
fn log(block: usize, words: &[u64]) -> (Vec<u64>, Vec<usize>) {
    let pages = BLOCKS[block];
    let mut log = words[..pages.div_ceil(64)].to_vec();
    if !pages.is_multiple_of(64) {
        *log.last_mut().unwrap() &= (1 << (pages % 64)) - 1;
    }
    let bits = (0..pages).filter(|p| log[p / 64] >> (p % 64) & 1 == 1);
    let bits = bits.collect();
    (log, bits)
}

fn apply(set: &DirtySet, model: &mut Model, cursor: &mut Cursor, op: &Op) {
    match *op {
        Op::Mark(block, range) => {
            let pages = range.clamp_to(BLOCKS[block]).indices();
            let new = pages.filter(|&p| model.insert((block, p))).count();
            assert_eq!(set.mark(BlockIndex(block), range), new as u64);
        }
        Op::Merge(block, ref words) => {
            let (log, bits) = log(block, words);
            let new = bits
                .into_iter()
                .filter(|&p| model.insert((block, p)))
                .count();
            assert_eq!(set.merge(BlockIndex(block), &log), new as u64);
        }
        Op::Flush(block, ref words) => {
            let (log, bits) = log(block, words);
            let new = bits
                .into_iter()
                .filter(|&p| model.insert((block, p)))
                .count();
            *cursor = Cursor::default();
            let mut slice = set.slice(cursor);
            assert_eq!(slice.merge(BlockIndex(block), &log), new as u64);
            while let [_, ..] = take(&mut slice, Take::Batches, Batch::MAX_PAGES)[..] {}
            model.clear();
        }
        Op::Clear(block, range) => {
            let pages = range.clamp_to(BLOCKS[block]).indices();
            let gone = pages.filter(|&p| model.remove(&(block, p))).count();
            assert_eq!(set.clear(BlockIndex(block), range), gone as u64);
        }
        Op::Slice {
            take,
            times,
            max,
            give_back,
        } => run_slice(set, model, cursor, (take, times, max, give_back)),
        Op::Rewind => *cursor = Cursor::default(),
    }
}

/// What a whole pass from the start takes is exactly what the model holds.
fn drain(set: &DirtySet, model: &mut Model) {
    let mut cursor = Cursor::default();
    let mut slice = set.slice(&mut cursor);
    while let Some(run) = slice.next_run(64) {
        for page in run.pages.indices() {
            assert!(model.remove(&(run.block.0, page)));
        }
    }
    drop(slice);
    assert!(model.is_empty(), "a pass left pages behind");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn every_discipline_behaves_like_a_set_of_pages(ops in prop::collection::vec(op(), 1..400)) {
        for discipline in Discipline::ALL {
            let set = DirtySet::new(&BLOCKS, discipline);
            let mut model = Model::new();
            let mut cursor = Cursor::default();
            for op in &ops {
                apply(&set, &mut model, &mut cursor, op);
                check(&set, &model);
            }
            drain(&set, &mut model);
            check(&set, &model);
        }
    }
}

/// Real threads: a taker, a marker and a hinter at once. Every page that was marked is taken or cleared,
/// and the count is exact when all have stopped.
#[test]
fn the_count_is_exact_after_threads_have_raced() {
    const PAGES: usize = 64 * 64;
    for discipline in Discipline::ALL {
        let set = DirtySet::new(&[PAGES], discipline);
        let mut balance = 0;
        std::thread::scope(|s| {
            let marker = s.spawn(|| {
                (0..2000usize)
                    .map(|i| {
                        let start = i * 37 % PAGES;
                        set.mark(BlockIndex(0), PageRange::new(start, start + 100))
                    })
                    .sum::<u64>()
            });
            let hinter = s.spawn(|| {
                (0..2000usize)
                    .map(|i| {
                        let start = i * 101 % PAGES;
                        set.clear(BlockIndex(0), PageRange::new(start, start + 30))
                    })
                    .sum::<u64>()
            });
            let taker = s.spawn(|| {
                let mut taken = 0;
                for _ in 0..200 {
                    let mut cursor = Cursor::default();
                    let mut slice = set.slice(&mut cursor);
                    while let Some(run) = slice.next_run(50) {
                        taken += run.pages.len() as u64;
                    }
                }
                taken
            });
            balance += marker.join().unwrap() as i64;
            balance -= hinter.join().unwrap() as i64;
            balance -= taker.join().unwrap() as i64;
        });
        assert_eq!(
            set.dirty_pages(),
            set.bitmap(BlockIndex(0)).count(),
            "{discipline}"
        );
        assert_eq!(set.dirty_pages() as i64, balance, "{discipline}");
    }
}

#[test]
fn the_published_count_is_never_more_than_an_interval_behind() {
    const PAGES: usize = 1 << 20;
    for discipline in Discipline::ALL {
        for how in [Take::Runs, Take::Batches] {
            let set = DirtySet::new(&[PAGES], discipline);
            set.mark_all();
            let mut cursor = Cursor::default();
            let mut slice = set.slice(&mut cursor);
            let mut left = PAGES as u64;
            for max in (1..2000).step_by(7) {
                left -= take(&mut slice, how, max)
                    .iter()
                    .map(|run| run.pages.len() as u64)
                    .sum::<u64>();
                let behind = set.dirty_pages() as i64 - set.bitmap(BlockIndex(0)).count() as i64;
                let interval = 0..=PUBLISH_INTERVAL as i64;
                assert!(interval.contains(&behind), "{discipline}: {behind} pages");
            }
            drop(slice);
            assert_eq!(set.dirty_pages(), left, "{discipline}: wrong at rest");
        }
    }
}

#[test]
fn pages_that_are_given_back_count_at_once() {
    const PAGES: usize = 1 << 14;
    for discipline in Discipline::ALL {
        let set = DirtySet::new(&[PAGES], discipline);
        set.mark_all();
        let mut cursor = Cursor::default();
        let mut slice = set.slice(&mut cursor);
        let mut taken = Vec::new();
        while let [run] = take(&mut slice, Take::Runs, 1000)[..] {
            taken.push(run);
        }
        for run in taken {
            slice.give_back(run);
            let left = set.bitmap(BlockIndex(0)).count();
            assert!(set.dirty_pages() >= left, "{discipline}: law 2");
        }
        drop(slice);
        assert_eq!(set.dirty_pages(), PAGES as u64, "{discipline}");
    }
}

/// Slices that follow each other at once let a hint in between: it waits for the slice that is open, and not for the
/// next one. Nobody promises that of a mutex that is not fair.
#[test]
fn a_hint_waits_for_one_slice_at_most() {
    const SLICE: Duration = Duration::from_millis(20);
    let set = DirtySet::new(&[64], Discipline::SliceLock);
    let (over, slices) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let mut cursor = Cursor::default();
                let _slice = set.slice(&mut cursor);
                slices.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(SLICE);
            }
        });
        for _ in 0..20 {
            set.clear(BlockIndex(0), PageRange::new(0, 1));
        }
        over.store(true, Ordering::Relaxed);
        // One begun before the hint, and one while this thread waits for its turn on the CPU, more than once at times.
        let slices = slices.load(Ordering::Relaxed);
        assert!(slices <= 20 * 5, "20 hints waited for {slices} slices");
    });
}
