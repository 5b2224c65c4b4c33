//! A guest of two pages whose writes a log like KVM's reports, and its migration.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use loom::sync::Mutex;
use loom::sync::atomic::AtomicU64;
use vmferry_dirty::{
    ArmingChunk, BlockIndex, Cursor, DirtyLog, DirtyTracker, Discipline, HintRound, LogError,
    PageRange,
};

use super::BLOCK;

/// Where the guest's two pages lie in its RAM block. The pages between them are never dirty.
#[derive(Clone, Copy)]
pub enum Layout {
    /// Side by side, so that one atomic operation sets or takes the bits of both.
    OneWord,
    /// In two words of the bitmap, but in one chunk of the log: their bits come and go one after the other, and
    /// they are armed together.
    TwoWords,
}

impl Layout {
    fn index(self, page: usize) -> usize {
        match self {
            Layout::OneWord => page,
            Layout::TwoWords => page * 64,
        }
    }

    fn pages(self) -> usize {
        self.index(1) + 1
    }

    fn words(self) -> usize {
        self.pages().div_ceil(64)
    }

    /// The range of the block that is page `page` of the guest.
    fn range(self, page: usize) -> PageRange {
        PageRange::new(self.index(page), self.index(page) + 1)
    }
}

/// The guest, with a log that behaves as KVM's does with manual protect and initially-set. A clone is the same guest.
#[derive(Clone)]
pub struct Guest(Arc<State>);

struct State {
    layout: Layout,
    log: Mutex<Log>,
    pages: [AtomicU64; 2],
}

/// One word of the bitmap for each of the two pages, or one for both.
struct Log {
    dirty: Vec<u64>,
    armed: Vec<u64>,
}

impl Guest {
    /// A guest whose pages hold 0, and are dirty in a log that was never armed.
    pub fn new(layout: Layout) -> Self {
        let mut dirty = vec![0; layout.words()];
        for page in 0..2 {
            dirty[layout.index(page) / 64] |= 1 << (layout.index(page) % 64);
        }
        Guest(Arc::new(State {
            layout,
            log: Mutex::new(Log {
                armed: vec![0; dirty.len()],
                dirty,
            }),
            pages: [AtomicU64::new(0), AtomicU64::new(0)],
        }))
    }

    pub fn layout(&self) -> Layout {
        self.0.layout
    }

    /// A vCPU's write: KVM logs it before the store, if the page is armed. The store itself orders nothing: what
    /// makes it visible is what the tracker does.
    pub fn write(&self, page: usize, value: u64) {
        let index = self.0.layout.index(page);
        let (word, bit) = (index / 64, 1 << (index % 64));
        let mut log = self.0.log.lock().unwrap();
        if log.armed[word] & bit != 0 {
            log.armed[word] &= !bit;
            log.dirty[word] |= bit;
        }
        self.0.pages[page].store(value, Relaxed);
    }

    /// A write by the VMM itself, which KVM's log does not see.
    pub fn write_unlogged(&self, page: usize, value: u64) {
        self.0.pages[page].store(value, Relaxed);
    }

    pub fn read(&self, page: usize) -> u64 {
        self.0.pages[page].load(Relaxed)
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
        let log = self.0.log.lock().unwrap();
        for (into, dirty) in into.iter_mut().zip(&log.dirty) {
            *into |= dirty;
        }
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        true
    }

    fn arm(&self, _: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError> {
        let mut log = self.0.log.lock().unwrap();
        for (word, pages) in (range.start.0 / 64..).zip(pages) {
            log.dirty[word] &= !pages;
            log.armed[word] |= pages;
        }
        Ok(())
    }
}

/// A migration of the guest under way. A clone is the same migration.
#[derive(Clone)]
pub struct Migration {
    pub guest: Guest,
    pub tracker: Arc<DirtyTracker>,
}

impl Migration {
    /// Nothing has been sent yet, and nothing is armed.
    pub fn start(discipline: Discipline, layout: Layout) -> Self {
        let guest = Guest::new(layout);
        Migration::with_log(&guest, Arc::new(guest.clone()), discipline)
    }

    /// The same with `log` in place of the guest's own.
    pub fn with_log(guest: &Guest, log: Arc<dyn DirtyLog>, discipline: Discipline) -> Self {
        let pages = [guest.layout().pages()];
        let tracker = DirtyTracker::start(log, &pages, discipline, ArmingChunk::default()).unwrap();
        // Between the two pages of `Layout::TwoWords` there are none that the guest has.
        let unused = PageRange::new(1, guest.layout().index(1));
        tracker.set().clear(BLOCK, unused);
        Migration {
            guest: guest.clone(),
            tracker: tracker.into(),
        }
    }

    /// Sends what is dirty.
    pub fn pass(&self, sent: &mut [u64; 2]) {
        self.pass_and_write(sent, |_| ());
    }

    /// Sends what is dirty, in slices of one run. Calls `after_reading` with every page as soon as that was read.
    pub fn pass_and_write(&self, sent: &mut [u64; 2], mut after_reading: impl FnMut(usize)) {
        let layout = self.guest.layout();
        let mut cursor = Cursor::default();
        let mut slice = self.tracker.slice(&mut cursor);
        while let Some(run) = slice.next_run(64).unwrap() {
            for index in run.pages.indices() {
                let page = (0..2).find(|&page| layout.index(page) == index);
                let page = page.expect("only the guest's pages are dirty");
                sent[page] = self.guest.read(page);
                after_reading(page);
            }
        }
    }

    pub fn sync(&self) {
        self.tracker.sync().unwrap();
    }

    pub fn begin_hints(&self) -> HintRound {
        self.tracker.begin_hints().unwrap()
    }

    /// The balloon says that a page is free.
    pub fn hint(&self, round: HintRound, page: usize) {
        let range = self.guest.layout().range(page);
        self.tracker.hint(round, BLOCK, range);
    }

    /// Ends the migration: what is dirty now is sent. Checks the count.
    pub fn finish(&self, sent: &mut [u64; 2]) {
        self.sync();
        let set = self.tracker.set();
        assert_eq!(set.dirty_pages(), set.bitmap(BLOCK).count(), "law 2");
        self.pass(sent);
        assert_eq!(set.dirty_pages(), set.bitmap(BLOCK).count(), "law 2");
    }
}

/// Runs a model under each of `disciplines`, with at most `switches` switches of the running thread at points where
/// that is not forced. There are some 50 such points: without a bound it takes hours.
pub fn check(disciplines: &[Discipline], switches: usize, model: fn(Discipline)) {
    for &discipline in disciplines {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(switches);
        builder.check(move || model(discipline));
    }
}
