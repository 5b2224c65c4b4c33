//! virtio-balloon (virtio 1.2, section 5.5): the guest gives memory back, and tells which of its pages are free.
//!
//! | module | idea |
//! |---|---|
//! | `hinting` | the conversation about free pages while the guest migrates |
//! | `statistics` | what the guest tells of its memory |
//! | `port` | the balloon as the machine sees it |
//!
//! # Locks
//!
//! The device runs under its slot's mutex. What it shares with the machine has a lock of its own, so that the
//! migration's thread never waits for a device that waits for it: a hint may have to wait for the end of a slice.
//!
//! # Poison
//!
//! A guest that fills its free pages with a pattern wants to find it there. VIRTIO_BALLOON_F_PAGE_POISON, by which it
//! would say so, is not offered: its driver then does without reporting, and for the rest fills pages anew itself.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmferry_dirty::PAGE_SIZE;

use super::slot::Slot;
use super::{Broken, Chain, Kind, Requests, VirtioDevice};
use crate::config::BalloonConfig;
use crate::error::MachineError;
use crate::memory::GuestMemory;
use crate::reclaim::{discard, pages_within};

mod hinting;
mod port;
mod statistics;

use hinting::Hinting;
pub(crate) use port::BalloonPort;
use port::{Refresh, Shared};

/// Features, as bits.
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const FREE_PAGE_HINT: u64 = 1 << 3;
const REPORTING: u64 = 1 << 5;

/// Enough for the 32 descriptors of which Linux makes a report.
const QUEUE_SIZES: &[u16] = &[128; 5];
/// Where the statistics' queue is, which is always offered.
const STATISTICS_QUEUE: usize = 2;

/// Offset of `actual` in the configuration.
const ACTUAL: usize = 4;
/// The most page numbers that one request may have; Linux gives 256. What a hostile driver can make a pause wait for is
/// bounded by it.
const MOST_PAGES: usize = 16 << 10;
/// The most bytes of statistics that are read.
const MOST_STATISTICS: usize = 64 * statistics::ENTRY;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Statistics,
    Pages(Pages),
}

/// What becomes of the pages that a request names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    Inflate,
    Deflate,
    Hint,
    Report,
}

/// Is told how many bytes the guest has left, when that changes.
pub(crate) type OnChange = Box<dyn Fn(u64) + Send>;

/// The device.
pub(crate) struct Balloon {
    offered: u64,
    shared: Shared,
    /// What the driver has chosen.
    chosen: u64,
    /// The buffer for statistics that the device keeps, by its name in the rings.
    kept: Option<u16>,
    on_change: OnChange,
}

/// What the device knows, in the stream.
#[derive(Serialize, Deserialize)]
struct Saved {
    target: u32,
    actual: u32,
    last_question: u32,
    kept: Option<u16>,
}

impl Balloon {
    /// The balloon of a guest with `memory` bytes of RAM.
    pub fn new(config: BalloonConfig, memory: u64, on_change: OnChange) -> Self {
        let offer = |wanted: bool, feature| if wanted { feature } else { 0 };
        Balloon {
            offered: STATS_VQ
                | offer(config.deflate_on_oom, DEFLATE_ON_OOM)
                | offer(config.free_page_hint, FREE_PAGE_HINT)
                | offer(config.free_page_reporting, REPORTING),
            shared: Shared::new(memory),
            chosen: 0,
            kept: None,
            on_change,
        }
    }

    /// Queues of a device that is configured so.
    pub fn queues(config: BalloonConfig) -> usize {
        3 + usize::from(config.free_page_hint) + usize::from(config.free_page_reporting)
    }

    /// The machine's end of the balloon, given a way to the slot that the device will be in.
    pub fn port(&self) -> impl FnOnce(Arc<Slot>) -> BalloonPort + use<> {
        let shared = self.shared.clone();
        |slot| BalloonPort::new(shared, slot)
    }

    /// What queue `index` is for: queues that the driver has not chosen are left out of the numbering.
    fn role(&self, index: usize) -> Option<Role> {
        let optional = [
            (STATS_VQ, Role::Statistics),
            (FREE_PAGE_HINT, Role::Pages(Pages::Hint)),
            (REPORTING, Role::Pages(Pages::Report)),
        ];
        let chosen = optional
            .into_iter()
            .filter(|(feature, _)| self.chosen & feature != 0)
            .map(|(_, role)| role);
        [Pages::Inflate, Pages::Deflate]
            .map(Role::Pages)
            .into_iter()
            .chain(chosen)
            .nth(index)
    }

    /// Gives the pages back that the guest has put into the balloon.
    fn inflate(memory: &GuestMemory, chain: &Chain) {
        let mut bytes = vec![0; chain.readable.len().min(4 * MOST_PAGES as u64) as usize];
        chain.readable.read(memory, 0, &mut bytes);
        if chain.readable.len() > bytes.len() as u64 {
            tracing::debug!("a request has more than {MOST_PAGES} pages: the rest stays");
        }
        let numbers = bytes.as_chunks().0.iter();
        let mut numbers: Vec<u32> = numbers.map(|bytes| u32::from_le_bytes(*bytes)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|a, b| a + 1 == *b) {
            let start = u64::from(run[0]) * PAGE_SIZE as u64;
            give_back(memory, start, (run.len() * PAGE_SIZE) as u64);
        }
    }

    fn take_statistics(&mut self, requests: &mut Requests<'_>) -> Result<(), Broken> {
        while let Some(chain) = requests.next()? {
            let mut bytes = [0; MOST_STATISTICS];
            let len = chain.readable.read(requests.memory, 0, &mut bytes);
            self.shared.lock().statistics = statistics::parse(&bytes[..len]);
            // A driver has one such buffer. If it makes more, each is kept until the next comes.
            if let Some(previous) = self.kept.replace(chain.head()) {
                requests.give_back(previous, 0)?;
            }
        }
        let mut known = self.shared.lock();
        if known.refresh == Refresh::Wanted
            && let Some(head) = self.kept.take()
        {
            known.refresh = Refresh::NotWanted;
            drop(known);
            requests.give_back(head, 0)?;
        }
        Ok(())
    }

    /// Hears what the guest says about its free pages. It may be using them again by now.
    fn hear(&self, memory: &GuestMemory, chain: &Chain) {
        let mut id = [0; 4];
        if chain.readable.read(memory, 0, &mut id) == id.len() {
            self.shared.lock().hinting.hear(u32::from_le_bytes(id));
        }
        for (start, len) in chain.writable.ranges() {
            // Asked for each range anew: the question may have been withdrawn meanwhile.
            let listener = self.shared.lock().hinting.listener();
            let Some(hints) = listener else {
                tracing::debug!("free pages that nobody asked for are ignored");
                return;
            };
            pages_within(memory, start, len).for_each(|pages| hints(pages));
        }
    }
}

/// Gives back what is RAM.
fn give_back(memory: &GuestMemory, start: u64, len: u64) {
    let given = discard(memory, start, len);
    if given < len {
        tracing::debug!("of {len} bytes at {start:#x}, {given} could be given back");
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> &'static [u16] {
        let optional = self.offered & (STATS_VQ | FREE_PAGE_HINT | REPORTING);
        &QUEUE_SIZES[..2 + optional.count_ones() as usize]
    }

    /// How many pages the guest should give up, how many it has, the command id of free-page hints, and the poison,
    /// which is not offered.
    fn config(&self) -> Vec<u8> {
        let known = self.shared.lock();
        [known.target, known.actual, known.hinting.command(), 0]
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect()
    }

    fn config_generation(&self) -> u32 {
        self.shared.lock().generation
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let (ACTUAL, Ok(actual)) = (offset, data.try_into()) else {
            tracing::debug!(offset, ?data, "no configuration to write");
            return;
        };
        let mut known = self.shared.lock();
        let before = std::mem::replace(&mut known.actual, u32::from_le_bytes(actual));
        if known.actual != before {
            let bytes = known.bytes();
            drop(known);
            (self.on_change)(bytes);
        }
    }

    fn activate(&mut self, features: u64) {
        self.chosen = features;
        self.shared.lock().features = Some(features);
    }

    fn reset(&mut self) {
        self.chosen = 0;
        self.kept = None;
        let mut known = self.shared.lock();
        known.features = None;
        // Without a driver, nothing keeps the guest from using all of its memory.
        known.actual = 0;
        known.statistics.clear();
        known.hinting.hear(hinting::STOP);
    }

    fn serve(&mut self, index: usize, requests: &mut Requests<'_>) -> Result<(), Broken> {
        let role = match self.role(index) {
            None => return Ok(()),
            Some(Role::Statistics) => return self.take_statistics(requests),
            Some(Role::Pages(role)) => role,
        };
        while let Some(chain) = requests.next()? {
            let memory = requests.memory;
            match role {
                Pages::Inflate => Self::inflate(memory, &chain),
                // The memory is there again as soon as it is touched.
                Pages::Deflate => {}
                Pages::Hint => self.hear(memory, &chain),
                Pages::Report => chain
                    .writable
                    .ranges()
                    .for_each(|(start, len)| give_back(memory, start, len)),
            }
            requests.complete(&chain, 0)?;
        }
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        let known = self.shared.lock();
        let saved = Saved {
            target: known.target,
            actual: known.actual,
            last_question: known.hinting.last(),
            kept: self.kept,
        };
        postcard::to_stdvec(&saved).expect("a few numbers can be written to memory")
    }

    /// Who asked on the source has gone: the guest finds that all questions are done, and those to come have new ids.
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        let saved: Saved = postcard::from_bytes(state)
            .map_err(|e| MachineError::Misfit(format!("its state cannot be read: {e}")))?;
        let mut known = self.shared.lock();
        known.target = saved.target;
        known.actual = saved.actual;
        known.hinting = Hinting::new(saved.last_question);
        self.kept = saved.kept;
        Ok(())
    }
}
