//! The balloon as the machine sees it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use vmferry_dirty::{BlockIndex, PAGE_SIZE};
use vmferry_engine::seam::{FreePageHinting, FreePageHints};

use super::STATISTICS_QUEUE;
use super::hinting::{Hinting, Hints};
use crate::machine::BalloonInfo;
use crate::virtio::signal;
use crate::virtio::slot::Slot;

/// Whether the guest is to tell its statistics anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refresh {
    NotWanted,
    Wanted,
}

/// What the device and the machine both know. The lock is held for moments only, never while hints are carried out,
/// and no other is taken under it.
pub(super) struct Knowledge {
    /// Pages of RAM.
    pub pages: u64,
    /// Pages that the guest should give up.
    pub target: u32,
    /// Pages that it has given up, as it says.
    pub actual: u32,
    /// What the driver has chosen, if there is one.
    pub features: Option<u64>,
    pub hinting: Hinting,
    pub statistics: BTreeMap<&'static str, u64>,
    pub refresh: Refresh,
    /// Counts changes of the configuration.
    pub generation: u32,
}

impl Knowledge {
    /// Bytes that the guest has left.
    pub fn bytes(&self) -> u64 {
        self.pages.saturating_sub(self.actual.into()) * PAGE_SIZE as u64
    }
}

#[derive(Clone)]
pub(super) struct Shared(Arc<Mutex<Knowledge>>);

impl Shared {
    pub fn new(memory: u64) -> Self {
        Shared(Arc::new(Mutex::new(Knowledge {
            pages: memory / PAGE_SIZE as u64,
            target: 0,
            actual: 0,
            features: None,
            hinting: Hinting::new(0),
            statistics: BTreeMap::new(),
            refresh: Refresh::NotWanted,
            generation: 0,
        })))
    }

    pub fn lock(&self) -> MutexGuard<'_, Knowledge> {
        self.0.lock().expect("no holder of the balloon panics")
    }
}

/// The machine's end of a balloon.
pub(crate) struct BalloonPort {
    shared: Shared,
    slot: Arc<Slot>,
}

impl BalloonPort {
    pub(super) fn new(shared: Shared, slot: Arc<Slot>) -> Self {
        BalloonPort { shared, slot }
    }

    /// What is known of the guest's memory. Asks the guest for its statistics, for the next time.
    pub fn info(&self) -> BalloonInfo {
        let mut known = self.shared.lock();
        known.refresh = Refresh::Wanted;
        let info = BalloonInfo {
            actual: known.bytes(),
            statistics: known.statistics.clone(),
        };
        drop(known);
        // If the driver has not taken the statistics, this is another queue of the device, which does not mind.
        signal(&self.slot.kicks().of(STATISTICS_QUEUE));
        info
    }

    /// Asks the guest to make do with so many bytes.
    pub fn set_target(&self, bytes: u64) {
        self.configure(|known| {
            let target = known.pages.saturating_sub(bytes / PAGE_SIZE as u64);
            known.target = u32::try_from(target).unwrap_or(u32::MAX);
        });
    }

    /// The balloon, if its driver tells free pages.
    pub fn hinting(&self) -> Option<&dyn FreePageHinting> {
        let features = self.shared.lock().features?;
        (features & super::FREE_PAGE_HINT != 0).then_some(self)
    }

    /// Asks the guest for its free pages.
    pub fn ask(&self, hints: Hints) {
        self.configure(|known| known.hinting.ask(hints));
    }

    /// Changes the configuration and tells the driver, if there is one.
    fn configure(&self, change: impl FnOnce(&mut Knowledge)) {
        let mut known = self.shared.lock();
        change(&mut known);
        known.generation = known.generation.wrapping_add(1);
        if known.features.is_some() {
            self.slot.config_changed();
        }
    }
}

impl FreePageHinting for BalloonPort {
    fn start(&self, hints: FreePageHints) {
        // All RAM is one block.
        self.ask(Arc::new(move |pages| {
            hints.free(BlockIndex(0), pages);
        }));
    }

    fn stop(&self) {
        self.configure(|known| known.hinting.withdraw());
    }

    fn done(&self) {
        self.configure(|known| known.hinting.finish());
    }
}
