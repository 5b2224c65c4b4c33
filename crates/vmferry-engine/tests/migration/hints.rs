//! Free-page hints during whole migrations (law 4): a guest frees and uses its pages as fast as it can, tells of the free
//! ones, and finds all that it uses where it arrives.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use vmferry_dirty::{BlockIndex, DirtyLog, Discipline, LogError, PAGE_SIZE, PageRange};
use vmferry_engine::seam::{
    Activity, DeviceState, FreePageHinting, FreePageHints, Guest, GuestError, PauseError,
};
use vmferry_engine::{ArmingChunk, Destination, Parameters, RamBlock, Source};

use crate::common::{Random, any_port, wait_until, with_discipline};
use crate::toy::Quiet;

const PAGES: usize = 4096;

const BLOCK: BlockIndex = BlockIndex(0);

/// A guest of 16 MiB with a balloon.
struct Spender {
    ram: Vec<RamBlock>,
    memory: Memory,
    balloon: Balloon,
    /// Held by the guest's thread for a step, and by whoever pauses it.
    running: Mutex<Activity>,
}

/// The guest's memory. Each page in use begins with its content, a number.
struct Memory {
    region: Arc<MmapRegion>,
    log: Log,
    pages: Mutex<Vec<Page>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Free,
    Used(u64),
}

/// Behaves as KVM's log does with manual protect and initially-set.
struct Log(Mutex<LogState>);

struct LogState {
    dirty: Vec<u64>,
    armed: Vec<u64>,
}

#[derive(Default)]
struct Balloon {
    /// The question that the guest knows of.
    question: Mutex<Option<FreePageHints>>,
    questions: AtomicU64,
    done: AtomicBool,
}

impl Memory {
    fn new() -> (Self, RamBlock) {
        let region = MmapRegionBuilder::new(PAGES * PAGE_SIZE)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map(Arc::new)
            .expect("16 MiB of memory");
        let (start, len) = (region.as_ptr(), region.size());
        // SAFETY: the region is mapped as long as the Arc lives, and only reached through volatile accesses.
        let block = unsafe { RamBlock::new("spender.ram", start, len, region.clone()) };
        let log = LogState {
            dirty: vec![0; PAGES / 64],
            armed: vec![0; PAGES / 64],
        };
        let memory = Memory {
            region,
            log: Log(Mutex::new(log)),
            pages: Mutex::new(vec![Page::Used(0); PAGES]),
        };
        (memory, block.unwrap())
    }

    fn write(&self, page: usize, value: u64) {
        self.pages.lock().unwrap()[page] = Page::Used(value);
        // KVM logs the write before it happens, and arming does not come in between.
        let mut log = self.log.0.lock().unwrap();
        let bit = 1 << (page % 64);
        if log.armed[page / 64] & bit != 0 {
            log.armed[page / 64] &= !bit;
            log.dirty[page / 64] |= bit;
        }
        let slice = self.region.as_volatile_slice();
        slice.write_obj(value, page * PAGE_SIZE).unwrap();
    }

    fn read(&self, page: usize) -> u64 {
        let slice = self.region.as_volatile_slice();
        slice.read_obj(page * PAGE_SIZE).unwrap()
    }
}

impl DirtyLog for Log {
    fn start(&self) -> Result<(), LogError> {
        let mut log = self.0.lock().unwrap();
        log.dirty.fill(u64::MAX);
        log.armed.fill(0);
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, _: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        let log = self.0.lock().unwrap();
        into.iter_mut()
            .zip(&log.dirty)
            .for_each(|(to, from)| *to |= from);
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        true
    }

    fn arm(&self, _: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError> {
        let mut log = self.0.lock().unwrap();
        for (word, bits) in (range.start.0 / 64..).zip(pages) {
            log.dirty[word] &= !bits;
            log.armed[word] |= bits;
        }
        Ok(())
    }
}

impl FreePageHinting for Balloon {
    fn start(&self, hints: FreePageHints) {
        self.questions.fetch_add(1, Ordering::Relaxed);
        *self.question.lock().unwrap() = Some(hints);
    }

    fn stop(&self) {
        *self.question.lock().unwrap() = None;
    }

    fn done(&self) {
        self.stop();
        assert!(
            !self.done.swap(true, Ordering::Relaxed),
            "done is said once"
        );
    }
}

impl Spender {
    fn new() -> Arc<Self> {
        let (memory, block) = Memory::new();
        Arc::new(Spender {
            ram: vec![block],
            memory,
            balloon: Balloon::default(),
            running: Mutex::new(Activity::Paused),
        })
    }

    fn activity(&self) -> MutexGuard<'_, Activity> {
        self.running.lock().unwrap()
    }

    /// The guest's life until `over`: frees pages, tells of them when asked, and uses some of them again, be it before it
    /// was heard or just after. Some answers it gives too late.
    fn live(&self, mut random: Random, over: &AtomicBool) {
        let mut late = Vec::new();
        for value in 1.. {
            if over.load(Ordering::Relaxed) {
                return;
            }
            if value % 64 == 0 {
                // Whoever wants to pause it gets a chance to.
                std::thread::sleep(Duration::from_micros(200));
            }
            let activity = self.activity();
            if *activity == Activity::Paused {
                drop(activity);
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let start = random.below(PAGES as u64) as usize;
            let range = PageRange::new(start, (start + 1 + random.below(64) as usize).min(PAGES));
            let question = self.balloon.question.lock().unwrap().clone();
            match question {
                Some(hints) if random.below(8) == 0 => late.push((hints, range)),
                Some(hints) => {
                    let mut pages = self.memory.pages.lock().unwrap();
                    range.indices().for_each(|page| pages[page] = Page::Free);
                    drop(pages);
                    let again = |when| {
                        let pages = range.indices().filter(move |page| page % 4 == when);
                        pages.for_each(|page| self.memory.write(page, value));
                    };
                    again(0);
                    hints.free(BLOCK, range);
                    again(2);
                }
                None => {
                    for (hints, range) in late.drain(..) {
                        // The guest knows that the question is withdrawn, and uses these pages.
                        range
                            .indices()
                            .for_each(|page| self.memory.write(page, value));
                        assert_eq!(hints.free(BLOCK, range), 0, "a late hint counts");
                    }
                    self.memory.write(start, value);
                }
            }
        }
    }
}

impl Guest for Spender {
    fn ram(&self) -> &[RamBlock] {
        &self.ram
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.memory.log
    }

    fn free_page_hinting(&self) -> Option<&dyn FreePageHinting> {
        Some(&self.balloon)
    }

    fn describe(&self) -> Result<DeviceState, GuestError> {
        Ok(DeviceState {
            idstr: "vmferry/spender".to_owned(),
            instance_id: 0,
            version_id: 1,
            data: Vec::new(),
        })
    }

    fn check_description(&self, _: &DeviceState) -> Result<(), GuestError> {
        Ok(())
    }

    fn pause(&self, _limit: Duration) -> Result<Activity, PauseError> {
        Ok(std::mem::replace(&mut *self.activity(), Activity::Paused))
    }

    fn resume(&self, was: Activity) -> Result<(), GuestError> {
        *self.activity() = was;
        Ok(())
    }

    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError> {
        Ok(Vec::new())
    }

    fn load_devices(&self, _: &[DeviceState]) -> Result<(), GuestError> {
        Ok(())
    }

    /// It arrives, and is looked at: it does not go on.
    fn start(&self, _: Activity, _: Duration) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Does something when dropped.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

/// Migrates a guest that runs; gives back its pages that were not sent, and how often it was asked.
fn migrate(parameters: Parameters, random: Random) -> (u64, u64) {
    let (here, there) = (Spender::new(), Spender::new());
    let over = AtomicBool::new(false);
    (0..PAGES).for_each(|page| here.memory.write(page, u64::MAX));
    here.resume(Activity::Running).unwrap();
    let spared = std::thread::scope(|scope| {
        let life = scope.spawn(|| here.live(random, &over));
        // If what follows panics, too.
        let end = OnDrop(|| over.store(true, Ordering::Relaxed));
        let incoming = Destination::start(there.clone(), &any_port(), Box::new(Quiet)).unwrap();
        let uri = incoming.uri().clone();
        // The guest writes faster than it is sent: that ends when it is allowed to stand still for long.
        let endless = Parameters {
            downtime_limit: Duration::from_nanos(1),
            ..parameters
        };
        let outgoing = Source::start(here.clone(), uri, endless, Box::new(Quiet)).unwrap();
        wait_until("there are some passes", || {
            let info = outgoing.info();
            info.ram.dirty_sync_count >= 4 || info.status.is_final()
        });
        outgoing.set_parameters(parameters);
        wait_until("the migration ends", || outgoing.info().status.is_final());
        let spared = outgoing.info().ram.hinted;
        outgoing.wait().unwrap();
        incoming.wait().unwrap();
        drop(end);
        life.join().unwrap();
        spared
    });
    let asked = here.balloon.questions.load(Ordering::Relaxed);
    assert_eq!(here.balloon.done.load(Ordering::Relaxed), asked > 0);
    for (page, content) in here.memory.pages.lock().unwrap().iter().enumerate() {
        if let Page::Used(value) = content {
            assert_eq!(there.memory.read(page), *value, "page {page} is lost");
        }
    }
    (spared, asked)
}

#[test]
fn what_is_in_use_arrives_and_what_is_free_is_spared() {
    let mut seeds = Random::new("hints");
    for discipline in Discipline::ALL {
        let mut spared = 0;
        for _ in 0..5 {
            let parameters = Parameters {
                // Several slices a pass: under slice-lock, a hint comes in between two of them.
                max_bandwidth: Some(100 << 20),
                downtime_limit: Duration::from_secs(10),
                // Many chunks to arm, so that hints come into some that are not armed yet.
                arming_chunk: ArmingChunk::from_bytes(256 << 10),
                ..with_discipline(discipline)
            };
            spared += migrate(parameters, seeds.split()).0;
        }
        assert!(spared > 0, "{discipline}: no hint spared anything");
    }
}

#[test]
fn nobody_asks_if_the_user_does_not_want_it() {
    let parameters = Parameters {
        downtime_limit: Duration::from_secs(10),
        free_page_hints: false,
        ..with_discipline(Discipline::LockFree)
    };
    assert_eq!(migrate(parameters, Random::new("no hints")), (0, 0));
}
