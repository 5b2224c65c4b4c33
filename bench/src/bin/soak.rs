//! A soak of the dirty tracking: real threads for a minute, and every page checked in the end.
//!
//! A guest (threads that write pages, free them, and take them into use again) is copied by a migration thread
//! over and over, while a balloon hints what was freed. When the guest stops, the last pages are copied, and the
//! copy must equal the guest's memory wherever the guest has not freed it.

use std::collections::VecDeque;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use vmferry_bench::host::Host;
use vmferry_dirty::{
    ArmingChunk, Batch, BlockIndex, Cursor, DirtyLog, DirtyTracker, Discipline, HintRound,
    LogError, PageRange, Run,
};

const BLOCK: BlockIndex = BlockIndex(0);

/// The guest: 256 MiB, and a bit, so that the last word is not full.
const PAGES: usize = 65536 + 13;

/// Pages that one lock of the log guards.
const STRIPE: usize = 64;

/// Lets threads race over the dirty tracking, and checks every page.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Options {
    /// How long, in seconds, all disciplines together
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Seed of the guest's choices [default: the time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// The guest's memory, a word for each page, and its dirty log: what KVM's with manual protect does, in software. As
/// there, a page is logged before its content changes, and arming a page is one step with respect to that.
struct Guest {
    content: Vec<AtomicU64>,
    log: Vec<Mutex<Stripe>>,
}

/// The log of [`STRIPE`] pages, and which of them the guest does not use.
#[derive(Default)]
struct Stripe {
    dirty: u64,
    armed: u64,
    free: u64,
}

impl Guest {
    fn new() -> Self {
        Guest {
            content: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            log: (0..PAGES.div_ceil(STRIPE))
                .map(|_| Mutex::default())
                .collect(),
        }
    }

    fn stripe(&self, number: usize) -> MutexGuard<'_, Stripe> {
        self.log[number]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes to a page, and takes it into use if it was free, whether or not its hint was heard.
    fn write(&self, page: usize, value: u64) {
        let (mut stripe, bit) = (self.stripe(page / STRIPE), 1 << (page % STRIPE));
        stripe.free &= !bit;
        if stripe.armed & bit != 0 {
            stripe.armed &= !bit;
            stripe.dirty |= bit;
        }
        self.content[page].store(value, Ordering::Release);
    }

    /// Frees the pages of a range in one stripe: their content no longer matters.
    fn free(&self, range: PageRange) {
        let mut stripe = self.stripe(range.start.0 / STRIPE);
        for page in range.indices() {
            stripe.free |= 1 << (page % STRIPE);
        }
    }

    fn is_free(&self, page: usize) -> bool {
        self.stripe(page / STRIPE).free >> (page % STRIPE) & 1 == 1
    }
}

impl DirtyLog for Guest {
    fn start(&self) -> Result<(), LogError> {
        for number in 0..self.log.len() {
            let mut stripe = self.stripe(number);
            let pages = (PAGES - number * STRIPE).min(STRIPE);
            stripe.dirty = u64::MAX >> (STRIPE - pages);
            stripe.armed = 0;
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, _: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        for (number, word) in into.iter_mut().enumerate() {
            *word |= self.stripe(number).dirty;
        }
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        true
    }

    fn arm(&self, _: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError> {
        for (number, bits) in (range.start.0 / STRIPE..).zip(pages) {
            let mut stripe = self.stripe(number);
            stripe.dirty &= !bits;
            stripe.armed |= bits;
        }
        Ok(())
    }
}

/// What came of one migration or of many.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    migrations: u64,
    sent: u64,
    written: u64,
    hinted: u64,
    given_back: u64,
    lost: u64,
    miscounted: u64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let seed = options.seed.unwrap_or_else(|| {
        let since_epoch = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        since_epoch.as_nanos() as u64
    });
    println!("host     {}\nseed     {seed}", Host::this());
    println!(
        "  {:14}{:>12}{:>14}{:>14}{:>14}{:>14}{:>8}{:>12}",
        "",
        "migrations",
        "pages sent",
        "written",
        "hinted away",
        "given back",
        "lost",
        "miscounted"
    );
    let each = Duration::from_secs(options.seconds) / Discipline::ALL.len() as u32;
    let mut clean = true;
    for discipline in Discipline::ALL {
        let (mut all, end) = (Tally::default(), Instant::now() + each);
        while Instant::now() < end {
            migration(discipline, seed.wrapping_add(all.migrations), &mut all);
        }
        println!(
            "  {:14}{:>12}{:>14}{:>14}{:>14}{:>14}{:>8}{:>12}",
            discipline.as_str(),
            all.migrations,
            all.sent,
            all.written,
            all.hinted,
            all.given_back,
            all.lost,
            all.miscounted
        );
        clean &= all.lost == 0 && all.miscounted == 0;
    }
    match clean {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// A guest under load is copied while hints flow; then it stops, and the copy is compared.
fn migration(discipline: Discipline, seed: u64, all: &mut Tally) {
    let guest = Arc::new(Guest::new());
    // Small chunks, so that there are many to arm.
    let chunk = ArmingChunk::from_bytes(1 << 20);
    let tracker = DirtyTracker::start(guest.clone(), &[PAGES], discipline, chunk)
        .expect("this log never fails");
    let over = AtomicBool::new(false);
    let round = Mutex::new(None);
    let mut copy = vec![0; PAGES];
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let (guest, over) = (&guest, &over);
                scope.spawn(move || write(guest, writer, seed, over))
            })
            .collect();
        let balloon = scope.spawn(|| balloon(&guest, &tracker, &round, seed, &over));
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..random.usize(4..12) {
            // What the engine does: hints flow from after a sync to the next one.
            *lock(&round) = Some(tracker.begin_hints().expect("this log never fails"));
            pass(&tracker, &guest, &mut copy, Some(&mut random), all);
            tracker.sync().expect("this log never fails");
        }
        over.store(true, Ordering::Relaxed);
        for writer in writers {
            all.written += writer.join().expect("the guest does not panic");
        }
        all.hinted += balloon.join().expect("the balloon does not panic");
        tracker.sync().expect("this log never fails");
        pass(&tracker, &guest, &mut copy, None, all);
    });
    all.migrations += 1;
    let counted = tracker.set().dirty_pages();
    all.miscounted += u64::from(counted != tracker.set().bitmap(BLOCK).count());
    let lost = |page: &usize| {
        copy[*page] != guest.content[*page].load(Ordering::Relaxed) && !guest.is_free(*page)
    };
    all.lost += (0..PAGES).filter(lost).count() as u64;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A vCPU: writes pages here and there, some again and again.
fn write(guest: &Guest, writer: u64, seed: u64, over: &AtomicBool) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed ^ (writer + 1) << 32);
    let mut written = 0;
    while !over.load(Ordering::Relaxed) {
        let page = match random.bool() {
            true => random.usize(..PAGES),
            false => random.usize(..256),
        };
        written += 1;
        guest.write(page, written << 1 | writer);
    }
    written
}

/// Frees pages, hints them, and uses some of them again as soon as the hint was heard; the vCPUs do not wait for that.
/// Some hints come late: in a later round than the one they are of.
fn balloon(
    guest: &Guest,
    tracker: &DirtyTracker,
    round: &Mutex<Option<HintRound>>,
    seed: u64,
    over: &AtomicBool,
) -> u64 {
    let mut random = fastrand::Rng::with_seed(!seed);
    let mut late = VecDeque::new();
    let (mut hinted, mut value) = (0, u64::MAX);
    while !over.load(Ordering::Relaxed) {
        let Some(current) = *lock(round) else {
            continue;
        };
        let start = random.usize(..PAGES);
        let end = (start + random.usize(1..STRIPE))
            .min(start.next_multiple_of(STRIPE))
            .min(PAGES);
        let range = PageRange::new(start, end);
        let hint = |round, range| tracker.hint(round, BLOCK, range);
        if random.u8(..) < 16 {
            late.push_back((current, range));
            if late.len() > 100
                && let Some((old, range)) = late.pop_front()
                && old != current
            {
                // The guest has long been using these pages again.
                assert_eq!(
                    hint(old, range),
                    0,
                    "a hint of a round that is over counted"
                );
            }
            continue;
        }
        guest.free(range);
        hinted += hint(current, range);
        for page in range.indices().filter(|page| page % 2 == 0) {
            value -= 1;
            guest.write(page, value);
        }
    }
    hinted
}

/// Copies every dirty page. With `whims`, in slices and batches of all lengths, and now and then what was taken is not
/// sent but given back.
fn pass(
    tracker: &DirtyTracker,
    guest: &Guest,
    copy: &mut [u64],
    mut whims: Option<&mut fastrand::Rng>,
    all: &mut Tally,
) {
    let (mut cursor, mut batch) = (Cursor::default(), Batch::new());
    let block = BLOCK;
    loop {
        let mut slice = tracker.slice(&mut cursor);
        for _ in 0..whims.as_mut().map_or(20, |random| random.usize(1..20)) {
            let max = whims
                .as_mut()
                .map_or(usize::MAX, |random| random.usize(1..300));
            if !slice
                .next_batch(&mut batch, max)
                .expect("this log never fails")
            {
                return;
            }
            if whims.as_mut().is_some_and(|random| random.u8(..) < 8) {
                for &pages in batch.runs() {
                    slice.give_back(Run { block, pages });
                    all.given_back += pages.len() as u64;
                }
                continue;
            }
            for page in batch.runs().iter().flat_map(|run| run.indices()) {
                copy[page] = guest.content[page].load(Ordering::Acquire);
                all.sent += 1;
            }
        }
    }
}
