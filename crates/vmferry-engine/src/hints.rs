//! Free-page hints: the guest says which pages hold nothing, and they are not sent (law 4).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use vmferry_dirty::{BlockIndex, DirtyTracker, HintRound, LogError, PageRange};

use crate::seam::FreePageHinting;

/// Takes the free pages of a guest, in answer to one [`FreePageHinting::start`].
#[derive(Clone)]
pub struct FreePageHints {
    tracked: Arc<Tracked>,
    round: HintRound,
}

impl FreePageHints {
    /// The guest does not need what these pages held when it was asked: unless it has written to them since, that need
    /// not get to the destination. It may write to them at any time, before or after this call. Returns how many pages
    /// less are to be sent.
    ///
    /// A hint that comes when the question is out of date, and what lies outside of the guest's RAM, changes
    /// nothing.
    pub fn free(&self, block: BlockIndex, pages: PageRange) -> u64 {
        let tracker = self.tracked.read();
        let Some(tracker) = &*tracker else {
            return 0;
        };
        let spared = tracker.hint(self.round, block, pages);
        self.tracked.spared.fetch_add(spared, Ordering::Relaxed);
        spared
    }
}

/// The dirty tracking of a migration, as long as there is one; hints may still hold this when it is over.
pub(crate) struct Tracked {
    tracker: RwLock<Option<DirtyTracker>>,
    /// Pages that need not be sent, thanks to hints.
    spared: AtomicU64,
}

impl Tracked {
    pub(crate) fn new(tracker: DirtyTracker) -> Arc<Self> {
        Arc::new(Tracked {
            tracker: RwLock::new(Some(tracker)),
            spared: AtomicU64::new(0),
        })
    }

    /// Runs `work`, with hints beside it, and ends the tracking.
    pub(crate) fn during<T>(&self, work: impl FnOnce(&DirtyTracker) -> T) -> T {
        let result = {
            let tracker = self.read();
            work(tracker.as_ref().expect("tracking ends only below"))
        };
        // Waits for a hint that is being carried out. Those to come find nobody.
        let tracker = self
            .tracker
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(tracker);
        result
    }

    fn read(&self) -> RwLockReadGuard<'_, Option<DirtyTracker>> {
        // A panic leaves nothing half changed here.
        self.tracker.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks a guest for its free pages, round after round; tells it when dropped that nobody wants to know any more.
pub(crate) struct Questions<'g> {
    hinting: &'g dyn FreePageHinting,
    tracked: Arc<Tracked>,
}

impl<'g> Questions<'g> {
    pub(crate) fn new(hinting: &'g dyn FreePageHinting, tracked: Arc<Tracked>) -> Self {
        Questions { hinting, tracked }
    }

    /// A sync is done: hints count from here on.
    pub(crate) fn ask(&self, tracker: &DirtyTracker) -> Result<(), LogError> {
        let round = tracker.begin_hints()?;
        self.hinting.start(FreePageHints {
            tracked: self.tracked.clone(),
            round,
        });
        Ok(())
    }

    /// A sync is to come.
    pub(crate) fn stop(&self) {
        self.hinting.stop();
    }

    /// Pages that need not be sent, thanks to all answers so far.
    pub(crate) fn spared(&self) -> u64 {
        self.tracked.spared.load(Ordering::Relaxed)
    }
}

impl Drop for Questions<'_> {
    fn drop(&mut self) {
        self.hinting.done();
    }
}
