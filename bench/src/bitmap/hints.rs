//! How long a free-page hint takes while the migration thread is at work.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmferry_dirty::{Batch, BlockIndex, Cursor, DirtySet, Discipline, PAGE_SIZE, PageRange};

use super::pattern::{Pattern, Shape};

/// The guest: 256 GiB.
const PAGES: usize = 64 << 20;

/// Between two hints: 10,000 a second.
const INTERVAL: Duration = Duration::from_micros(100);

/// The migration thread's slices, as the engine has them.
const SLICE: Duration = Duration::from_millis(50);

/// Sizes of hints in pages: one page to 4 MiB.
const SIZES: [usize; 4] = [1, 16, 256, 1024];

/// What hints took.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// Half of them took no longer.
    pub p50: Duration,
    /// 99 of 100 took no longer.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
    /// How many there were; 10,000 a second were to be sent.
    pub hints: usize,
    /// Pages that the migration thread took meanwhile.
    pub taken: u64,
    /// Pages that hints cleared.
    pub cleared: u64,
}

/// Lets hints arrive for `time` while another thread drains a bitmap of which every other page is dirty, in slices,
/// copying each page as a stream writer would. They are sent by one thread, as a balloon's queue is served: while
/// one waits no other comes, and those that should have come meanwhile are left out.
pub fn measure(discipline: Discipline, time: Duration) -> Latency {
    let pattern = Pattern {
        percent: 50.0,
        shape: Shape::Scattered,
    };
    let set = DirtySet::new(&[PAGES], discipline);
    let dirty = pattern.words(PAGES / 64);
    set.merge(BlockIndex(0), &dirty);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let migration = scope.spawn(|| migrate(&set, &dirty, &over));
        let (mut times, cleared) = hint(&set, time);
        over.store(true, Ordering::Relaxed);
        let taken = migration
            .join()
            .expect("the draining thread does not panic");
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        Latency {
            p50: at(0.5),
            p99: at(0.99),
            max: at(1.0),
            hints: times.len(),
            taken,
            cleared,
        }
    })
}

/// Drains until `over`, slice after slice; returns how many pages.
fn migrate(set: &DirtySet, dirty: &[u64], over: &AtomicBool) -> u64 {
    /// Enough pages that they do not all sit in the nearest cache.
    const SOURCE_PAGES: usize = 16384;
    let source = vec![1u8; SOURCE_PAGES * PAGE_SIZE];
    let mut stream = vec![0; Batch::MAX_PAGES * PAGE_SIZE];
    let (mut cursor, mut batch) = (Cursor::default(), Batch::new());
    let mut taken = 0;
    while !over.load(Ordering::Relaxed) {
        let end = Instant::now() + SLICE;
        let mut slice = set.slice(&mut cursor);
        let mut more = true;
        while more && Instant::now() < end {
            more = slice.next_batch(&mut batch, Batch::MAX_PAGES);
            let pages = batch.runs().iter().flat_map(|run| run.indices());
            for (to, page) in stream.chunks_exact_mut(PAGE_SIZE).zip(pages) {
                to.copy_from_slice(&source[page % SOURCE_PAGES * PAGE_SIZE..][..PAGE_SIZE]);
            }
            black_box(&stream);
            taken += batch.pages() as u64;
        }
        drop(slice);
        if !more {
            set.merge(BlockIndex(0), dirty);
            cursor = Cursor::default();
        }
    }
    taken
}

/// Sends hints for `time`; returns what each took, and how many pages they cleared.
fn hint(set: &DirtySet, time: Duration) -> (Vec<Duration>, u64) {
    let mut random = fastrand::Rng::with_seed(1);
    let (mut times, mut cleared) = (Vec::new(), 0);
    let begin = Instant::now();
    let mut due = begin;
    while due < begin + time {
        while Instant::now() < due {
            std::hint::spin_loop();
        }
        let pages = SIZES[times.len() % SIZES.len()];
        let first = random.usize(..PAGES - pages);
        let start = Instant::now();
        cleared += set.clear(BlockIndex(0), PageRange::new(first, first + pages));
        times.push(start.elapsed());
        due = (due + INTERVAL).max(Instant::now());
    }
    (times, cleared)
}
