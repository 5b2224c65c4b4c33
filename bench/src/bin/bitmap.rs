//! What taking dirty pages out of a bitmap costs, up to guests of 16 TiB, under each discipline and elsewhere.

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use vmferry_bench::bitmap::contender::{Contender, scan};
use vmferry_bench::bitmap::hints::{self, Latency};
use vmferry_bench::bitmap::pattern::{Pattern, Shape, dirty_pages};
use vmferry_bench::host::Host;
use vmferry_bench::median::Median;
use vmferry_dirty::{BlockIndex, DirtySet, Discipline};

const GIB: u64 = 1 << 30;

/// Dirty pages of 100.
const DENSITIES: [f64; 5] = [0.01, 1.0, 10.0, 50.0, 100.0];

const LOCK_FREE: Contender = Contender::Vmferry(Discipline::LockFree);
const SLICE_LOCK: Contender = Contender::Vmferry(Discipline::SliceLock);
const PER_BIT_LOCK: Contender = Contender::Vmferry(Discipline::PerBitLock);

/// Measures dirty bitmaps: draining, merging, hints.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Options {
    /// Sizes of guests in GiB
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [256, 1024, 16384])]
    guests: Vec<u64>,
    /// Measurements of each kind; of guests above 1 TiB, and of what is slow, a third of that
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// How long hints arrive under each discipline, in seconds; 0: not at all
    #[arg(long, value_name = "N", default_value_t = 10)]
    hint_seconds: u64,
}

/// A figure that was promised.
struct Target {
    promise: String,
    measured: String,
    kept: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    println!("host     {}", Host::this());
    println!("Medians; [the smallest, the largest] of their runs, which take turns.");
    let mut targets = Vec::new();
    let mut clean = Vec::new();
    for &gib in &options.guests {
        let runs = if gib > 1024 {
            options.runs.div_ceil(3)
        } else {
            options.runs
        };
        println!(
            "\n{gib} GiB of guest, {} MiB of bitmap",
            (gib * GIB / 4096 / 8) >> 20
        );
        drains(gib, runs, &mut targets);
        clean.push(clean_drain(gib, options.runs, &mut targets));
        merges(gib, runs);
    }
    if let [first, .., last] = &clean[..] {
        let growth = |of: fn(&Clean) -> f64| of(last) / of(first);
        let (drain, reading) = (growth(|clean| clean.drain), growth(|clean| clean.reading));
        targets.push(Target {
            promise: "from the smallest guest to the largest, a clean gigabyte costs no more, but for what reading it \
                      costs more outside of the caches (1.2 times that at most)"
                .to_owned(),
            measured: format!("{drain:.2} times, reading {reading:.2} times"),
            kept: drain <= 1.2 * reading.max(1.0),
        });
    }
    if options.hint_seconds > 0 {
        hint_latency(Duration::from_secs(options.hint_seconds), &mut targets);
    }
    println!("\npromised");
    for target in &targets {
        let verdict = if target.kept { "kept  " } else { "MISSED" };
        println!("  {verdict} {}: {}", target.promise, target.measured);
    }
    match targets.iter().all(|target| target.kept) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn words(gib: u64) -> usize {
    (gib * GIB / 4096 / 64) as usize
}

/// Draining at all densities.
fn drains(gib: u64, runs: u32, targets: &mut Vec<Target>) {
    let all = Contender::ALL.iter();
    let mut bitmaps: Vec<_> = all
        .clone()
        .map(|contender| contender.bitmap(words(gib)))
        .collect();
    print!("  drain, ns a dirty page");
    for contender in Contender::ALL {
        print!(" {contender:>24}");
    }
    println!("{:>26}", "slice-, per-bit- by -free");
    for percent in DENSITIES {
        for shape in Shape::ALL {
            if percent == 100.0 && shape == Shape::Scattered {
                continue; // there is but one way to be all dirty
            }
            let pattern = Pattern { percent, shape }.words(words(gib));
            let pages = dirty_pages(&pattern);
            if pages == 0 {
                continue; // a small guest
            }
            let mut times = vec![Vec::new(); bitmaps.len()];
            for run in 0..runs {
                let mut turns: Vec<_> = all.clone().zip(&mut bitmaps).zip(&mut times).collect();
                if run % 2 == 1 {
                    // What one leaves behind in the caches must not always meet the same other.
                    turns.reverse();
                }
                for ((contender, bitmap), times) in turns {
                    let slow = matches!(contender, &PER_BIT_LOCK | Contender::AtomicBitmap);
                    if slow && run % 3 > 0 {
                        continue;
                    }
                    bitmap.fill(&pattern);
                    let start = Instant::now();
                    let drained = bitmap.drain();
                    times.push(start.elapsed().as_nanos() as f64 / pages as f64);
                    assert_eq!(drained, pages, "a drain has lost pages");
                }
            }
            print!("  {percent:>8} %  {shape:<10}");
            for times in &times {
                let Median { median, min, max } =
                    Median::of(times.iter().copied()).expect("there are runs");
                print!(" {:>24}", format!("{median:.2} [{min:.2}, {max:.2}]"));
            }
            // By turns: what else the machine does then hits both sides of a ratio alike.
            let by = |contender: Contender| {
                let of = |who| {
                    &times[all
                        .clone()
                        .position(|c| *c == who)
                        .expect("it is one of all")]
                };
                let (free, other) = (of(LOCK_FREE), of(contender));
                let stride = free.len().div_ceil(other.len());
                let ratios = free
                    .iter()
                    .step_by(stride)
                    .zip(other)
                    .map(|(free, other)| other / free);
                Median::of(ratios).expect("there are runs").median
            };
            let (slice, per_bit) = (by(SLICE_LOCK), by(PER_BIT_LOCK));
            println!("{:>26}", format!("{slice:.2}  {per_bit:.1}"));
            let case = format!("{gib} GiB, {percent} % {shape}");
            let against = 1.0 / slice;
            targets.push(Target {
                promise: format!("{case}: lock-free at most 1.05 times slice-lock"),
                measured: format!("{against:.2}"),
                kept: against <= 1.05,
            });
            let least = match percent {
                50.0.. => 12.0,
                10.0.. => 5.0,
                _ => continue,
            };
            targets.push(Target {
                promise: format!(
                    "{case}: lock-free at least {least} times faster than per-bit-lock"
                ),
                measured: format!("{per_bit:.1}"),
                kept: per_bit >= least,
            });
        }
    }
}

/// What a clean bitmap costs, in nanoseconds a gigabyte of guest.
struct Clean {
    drain: f64,
    reading: f64,
}

/// Draining a clean bitmap against reading it.
fn clean_drain(gib: u64, runs: u32, targets: &mut Vec<Target>) -> Clean {
    let mut bitmap = LOCK_FREE.bitmap(words(gib));
    let plain = vec![1u64; words(gib)];
    // Memory that nobody has written to is one and the same page of zeros, over and over.
    bitmap.fill(&plain);
    bitmap.drain();
    let (mut drains, mut scans, mut shares) = (Vec::new(), Vec::new(), Vec::new());
    let timed = |work: &mut dyn FnMut() -> u64| {
        let start = Instant::now();
        std::hint::black_box(work());
        start.elapsed().as_nanos() as f64 / gib as f64
    };
    // The first time warms up.
    for run in 0..=runs * 3 {
        let (drain, limit) = (timed(&mut || bitmap.drain()), timed(&mut || scan(&plain)));
        if run > 0 {
            drains.push(drain);
            scans.push(limit);
            shares.push(limit / drain);
        }
    }
    let median = |all: Vec<f64>| Median::of(all.into_iter()).expect("there are runs");
    let (drain, limit, share) = (median(drains), median(scans), median(shares));
    println!(
        "  clean: {:.0} ns a GiB of guest; reading alone {:.0} ns ({:.1} GB/s), so {:.0} % of that speed",
        drain.median,
        limit.median,
        (GIB / 4096 / 8) as f64 / limit.median,
        share.median * 100.0
    );
    targets.push(Target {
        promise: format!("{gib} GiB: a clean drain has 80 % of the speed of reading"),
        measured: format!("{:.0} %", share.median * 100.0),
        kept: share.median >= 0.8,
    });
    Clean {
        drain: drain.median,
        reading: limit.median,
    }
}

/// Merging a fetched log.
fn merges(gib: u64, runs: u32) {
    let block = BlockIndex(0);
    let set = DirtySet::new(&[words(gib) * 64], Discipline::LockFree);
    let shape = Shape::Scattered;
    for (name, percent) in [("clean", 0.0), ("1 % scattered", 1.0), ("all dirty", 100.0)] {
        let log = Pattern { percent, shape }.words(words(gib));
        let times = (0..runs).map(|_| {
            let start = Instant::now();
            set.merge(block, &log);
            start.elapsed().as_nanos() as f64 / gib as f64
        });
        let median = Median::of(times).expect("there are runs").median;
        println!("  merge of a log, {name}: {median:.0} ns a GiB of guest");
    }
}

/// Hints while a drain is running.
fn hint_latency(time: Duration, targets: &mut Vec<Target>) {
    println!(
        "\nhints of 1 page to 4 MiB, 10,000 a second, while a drain copies pages in slices of 50 ms"
    );
    println!(
        "  {:16}{:>12}{:>12}{:>12}{:>12}{:>16}",
        "", "p50, us", "p99, us", "max, us", "hints", "drained, pages/s"
    );
    let measured: HashMap<Discipline, Latency> = Discipline::ALL
        .into_iter()
        .map(|discipline| (discipline, hints::measure(discipline, time)))
        .collect();
    let us = |time: Duration| time.as_nanos() as f64 / 1e3;
    for discipline in Discipline::ALL {
        let l = &measured[&discipline];
        println!(
            "  {:16}{:>12.1}{:>12.1}{:>12.1}{:>12}{:>16.0}",
            discipline.as_str(),
            us(l.p50),
            us(l.p99),
            us(l.max),
            l.hints,
            l.taken as f64 / time.as_secs_f64()
        );
    }
    let p99 = |discipline: Discipline| us(measured[&discipline].p99);
    let (free, slice) = (p99(Discipline::LockFree), p99(Discipline::SliceLock));
    targets.push(Target {
        promise: "99 of 100 hints take at most 20 us with lock-free".to_owned(),
        measured: format!("{free:.1} us"),
        kept: free <= 20.0,
    });
    targets.push(Target {
        promise: "that is at least 100 times shorter than with slice-lock".to_owned(),
        measured: format!("{:.0}", slice / free),
        kept: slice / free >= 100.0,
    });
}
