//! Operations on the dirty bitmap of a 4 GiB guest, with criterion's statistics. `cargo run --release -p
//! vmferry-bench --bin bitmap` has the large guests, and one table.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vmferry_bench::bitmap::contender::Contender;
use vmferry_bench::bitmap::pattern::{Pattern, Shape, dirty_pages};
use vmferry_dirty::{BlockIndex, DirtySet, Discipline, PageRange};

const WORDS: usize = (4 << 30) / 4096 / 64;
const BLOCK: BlockIndex = BlockIndex(0);

/// Taking all dirty pages.
fn drain(criterion: &mut Criterion) {
    for shape in Shape::ALL {
        let mut group = criterion.benchmark_group(format!("drain/{shape}"));
        for percent in [1.0, 10.0, 50.0, 100.0] {
            let words = Pattern { percent, shape }.words(WORDS);
            group.throughput(Throughput::Elements(dirty_pages(&words)));
            for contender in Contender::ALL {
                let id = BenchmarkId::new(contender.to_string(), format!("{percent}%"));
                let mut bitmap = contender.bitmap(WORDS);
                group.bench_function(id, |bencher| {
                    bencher.iter_custom(|times| {
                        let mut total = Duration::ZERO;
                        for _ in 0..times {
                            bitmap.fill(&words);
                            let start = Instant::now();
                            bitmap.drain();
                            total += start.elapsed();
                        }
                        total
                    });
                });
            }
        }
    }
}

/// Merging a fetched log.
fn merge(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("merge");
    group.throughput(Throughput::Bytes((WORDS * 8) as u64));
    for percent in [0.01, 1.0, 100.0] {
        let shape = Shape::Scattered;
        let words = Pattern { percent, shape }.words(WORDS);
        for discipline in [Discipline::LockFree, Discipline::SliceLock] {
            let set = DirtySet::new(&[WORDS * 64], discipline);
            let id = BenchmarkId::new(discipline.as_str(), format!("{percent}%"));
            group.bench_function(id, |bencher| bencher.iter(|| set.merge(BLOCK, &words)));
        }
    }
}

/// A hint, with nobody else at work.
fn hint(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hint");
    for pages in [1, 64, 1024] {
        for discipline in Discipline::ALL {
            let set = DirtySet::new(&[WORDS * 64], discipline);
            let id = BenchmarkId::new(discipline.as_str(), format!("{pages} pages"));
            let range = PageRange::new(100, 100 + pages);
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|times| {
                    let mut total = Duration::ZERO;
                    for _ in 0..times {
                        set.mark(BLOCK, range);
                        let start = Instant::now();
                        set.clear(BLOCK, range);
                        total += start.elapsed();
                    }
                    total
                });
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = drain, merge, hint
}
criterion_main!(benches);
