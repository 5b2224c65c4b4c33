//! `UffdLog` on memory of the test's own process: what is written is reported, what is not is not.

use std::collections::BTreeSet;
use std::ffi::c_void;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vmferry_dirty::log::{LogError, UffdLog, UffdRegion};
use vmferry_dirty::{
    ArmingChunk, BlockIndex, Cursor, DirtyLog, DirtyTracker, Discipline, PAGE_SIZE,
};

const HUGE_PAGE: usize = 2 << 20;
const PAGES_IN_HUGE: usize = HUGE_PAGE / PAGE_SIZE;
const BLOCK: BlockIndex = BlockIndex(0);

/// What the memory under test consists of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    SmallPages,
    /// Transparent huge pages are advised, and what is populated at once gets them.
    HugePages,
    Memfd,
}

const KINDS: [Kind; 3] = [Kind::SmallPages, Kind::HugePages, Kind::Memfd];

/// A mapping, aligned to a huge page; written and read as one word a page.
struct Memory {
    mapped: *mut c_void,
    start: *mut u8,
    pages: usize,
}

// SAFETY: the mapping belongs to this value alone and is only accessed as atomics.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(kind: Kind, pages: usize) -> Memory {
        let file = (kind == Kind::Memfd).then_some(MemfdFlags::CLOEXEC);
        let memory = Memory::map(file, pages).unwrap();
        match kind {
            Kind::SmallPages => memory.advise(0..pages, Advice::LinuxNoHugepage),
            Kind::HugePages => memory.advise(0..pages, Advice::LinuxHugepage),
            Kind::Memfd => {}
        }
        memory
    }

    /// Maps a new memfd, or anonymous memory.
    fn map(memfd: Option<MemfdFlags>, pages: usize) -> std::io::Result<Memory> {
        let length = pages * PAGE_SIZE + HUGE_PAGE;
        let rw = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, wherever the kernel has room for it.
        let mapped = unsafe {
            match memfd {
                None => rustix::mm::mmap_anonymous(ptr::null_mut(), length, rw, MapFlags::PRIVATE),
                Some(flags) => {
                    let file = rustix::fs::memfd_create("uffd-test", flags)?;
                    rustix::fs::ftruncate(&file, length as u64)?;
                    rustix::mm::mmap(ptr::null_mut(), length, rw, MapFlags::SHARED, file, 0)
                }
            }
        }?;
        let gap = mapped.align_offset(HUGE_PAGE);
        Ok(Memory {
            mapped,
            start: mapped.cast::<u8>().wrapping_add(gap),
            pages,
        })
    }

    fn populated(kind: Kind, pages: usize) -> Memory {
        let memory = Memory::new(kind, pages);
        memory.write_all(0..pages, 1);
        memory
    }

    fn word(&self, page: usize) -> &AtomicU64 {
        assert!(page < self.pages);
        // SAFETY: inside the mapping, aligned, and never accessed otherwise.
        unsafe { &*self.start.add(page * PAGE_SIZE).cast() }
    }

    fn write(&self, page: usize, value: u64) {
        self.word(page).store(value, Ordering::Relaxed);
    }

    fn write_all(&self, pages: impl IntoIterator<Item = usize>, value: u64) {
        pages.into_iter().for_each(|page| self.write(page, value));
    }

    fn read(&self, page: usize) -> u64 {
        self.word(page).load(Ordering::Relaxed)
    }

    fn advise(&self, pages: Range<usize>, advice: Advice) {
        assert!(pages.end <= self.pages);
        // SAFETY: inside the mapping, which nobody else refers to; its pages are all of atomics.
        unsafe {
            rustix::mm::madvise(
                self.start.add(pages.start * PAGE_SIZE).cast(),
                pages.len() * PAGE_SIZE,
                advice,
            )
        }
        .unwrap();
    }

    fn discard(&self, pages: Range<usize>) {
        self.advise(pages, Advice::LinuxDontNeed);
    }

    fn region(&self) -> UffdRegion {
        UffdRegion {
            block: BLOCK,
            first_page: 0,
            host_addr: self.start.addr() as u64,
            pages: self.pages,
        }
    }

    fn log(&self) -> UffdLog {
        UffdLog::new(vec![self.region()])
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and not used any more.
        unsafe { rustix::mm::munmap(self.mapped, self.pages * PAGE_SIZE + HUGE_PAGE) }.unwrap();
    }
}

/// Starts the log, or says why the test is skipped.
fn started(log: &UffdLog) -> bool {
    match log.start() {
        Ok(()) => true,
        Err(e @ LogError::Unsupported { .. }) => {
            eprintln!("SKIPPED: {e}");
            false
        }
        Err(e) => panic!("{e}"),
    }
}

fn fetch_block(log: &UffdLog, block: BlockIndex, pages: usize) -> BTreeSet<usize> {
    let mut words = vec![0; pages.div_ceil(64)];
    log.fetch(block, &mut words).unwrap();
    (0..words.len() * 64)
        .filter(|page| words[page / 64] >> (page % 64) & 1 == 1)
        .collect()
}

fn fetch(log: &UffdLog, memory: &Memory) -> BTreeSet<usize> {
    fetch_block(log, BLOCK, memory.pages)
}

fn set(pages: impl IntoIterator<Item = usize>) -> BTreeSet<usize> {
    pages.into_iter().collect()
}

#[test]
fn what_is_written_is_reported_and_nothing_else() {
    for kind in KINDS {
        for populated in [true, false] {
            let pages = 3 * PAGES_IN_HUGE + 77;
            let memory = match populated {
                true => Memory::populated(kind, pages),
                false => Memory::new(kind, pages),
            };
            let log = memory.log();
            if !started(&log) {
                return;
            }
            assert_eq!(fetch(&log, &memory), set([]), "{kind:?} {populated}");
            std::thread::scope(|s| {
                s.spawn(|| memory.write_all((5..pages).step_by(70), 2));
                s.spawn(|| memory.write_all((6..pages).step_by(90), 3));
            });
            let written = set((5..pages).step_by(70).chain((6..pages).step_by(90)));
            assert_eq!(fetch(&log, &memory), written, "{kind:?} {populated}");
            // Reading is not writing, and what was reported is armed.
            let sum: u64 = (0..pages).map(|page| memory.read(page)).sum();
            assert!(sum > 0);
            assert_eq!(fetch(&log, &memory), set([]), "{kind:?} {populated}");
            memory.write(5, 4);
            assert_eq!(fetch(&log, &memory), set([5]), "{kind:?} {populated}");
        }
    }
}

#[test]
fn regions_of_several_blocks_are_kept_apart() {
    let memories: Vec<Memory> = KINDS.map(|kind| Memory::populated(kind, 100)).into();
    // Block 0 is two mappings and begins in the middle of a word, block 1 is one.
    let at = |memory: usize, block, first_page| UffdRegion {
        block: BlockIndex(block),
        first_page,
        ..memories[memory].region()
    };
    let log = UffdLog::new(vec![at(0, 0, 10), at(1, 1, 0), at(2, 0, 130)]);
    if !started(&log) {
        return;
    }
    memories[0].write_all([0, 99], 2);
    memories[1].write_all(40..60, 2);
    memories[2].write_all([0, 50], 2);
    assert_eq!(
        fetch_block(&log, BlockIndex(0), 230),
        set([10, 109, 130, 180])
    );
    assert_eq!(fetch_block(&log, BlockIndex(1), 100), set(40..60));
    assert_eq!(fetch_block(&log, BlockIndex(0), 230), set([]));
}

#[test]
fn more_ranges_than_one_call_reports() {
    for kind in KINDS {
        let memory = Memory::populated(kind, 32 * PAGES_IN_HUGE);
        let log = memory.log();
        if !started(&log) {
            return;
        }
        let alternate = set((1..memory.pages).step_by(2));
        memory.write_all(alternate.clone(), 2);
        assert_eq!(fetch(&log, &memory), alternate, "{kind:?}");
        assert_eq!(fetch(&log, &memory), set([]), "{kind:?}");
    }
}

#[test]
fn what_the_kernel_writes_is_reported() {
    for kind in KINDS {
        let memory = Memory::populated(kind, 64);
        let log = memory.log();
        if !started(&log) {
            return;
        }
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&[7; 8]).unwrap();
        // SAFETY: 8 bytes inside the mapping; see `word`.
        let buffer = unsafe {
            std::slice::from_raw_parts_mut(memory.start.add(9 * PAGE_SIZE).cast::<u8>(), 8)
        };
        assert_eq!(rustix::io::read(reader.as_fd(), buffer).unwrap(), 8);
        assert_eq!(memory.read(9), 0x0707_0707_0707_0707);
        assert_eq!(fetch(&log, &memory), set([9]), "{kind:?}");
    }
}

#[test]
fn discarded_pages_are_reported() {
    for kind in [Kind::SmallPages, Kind::HugePages] {
        let memory = Memory::populated(kind, 4 * PAGES_IN_HUGE);
        let log = memory.log();
        if !started(&log) {
            return;
        }
        // A few pages; a huge page that goes together with its page table; and one that comes back.
        let discarded = [3..7, PAGES_IN_HUGE..3 * PAGES_IN_HUGE];
        for range in discarded.clone() {
            memory.discard(range);
        }
        assert_eq!(memory.read(2 * PAGES_IN_HUGE), 0);
        let expected = set(discarded.into_iter().flatten());
        assert_eq!(fetch(&log, &memory), expected, "{kind:?}");
        assert_eq!(fetch(&log, &memory), set([]), "{kind:?}");
        // They are armed like all others.
        memory.write_all([5, PAGES_IN_HUGE + 5], 2);
        assert_eq!(
            fetch(&log, &memory),
            set([5, PAGES_IN_HUGE + 5]),
            "{kind:?}"
        );
    }
}

#[test]
fn discarding_a_memfds_pages_changes_nothing() {
    let memory = Memory::populated(Kind::Memfd, 2 * PAGES_IN_HUGE);
    let log = memory.log();
    if !started(&log) {
        return;
    }
    memory.write(5, 2);
    memory.discard(0..PAGES_IN_HUGE);
    assert_eq!((memory.read(4), memory.read(5)), (1, 2));
    assert_eq!(fetch(&log, &memory), set([5]));
    memory.write(6, 2);
    assert_eq!(fetch(&log, &memory), set([6]));
}

#[test]
fn only_writes_while_it_is_on_are_reported() {
    for kind in KINDS {
        let memory = Memory::populated(kind, PAGES_IN_HUGE);
        let log = memory.log();
        log.stop().unwrap();
        memory.write(1, 2);
        assert_eq!(fetch(&log, &memory), set([]));
        if !started(&log) {
            return;
        }
        memory.write(2, 2);
        log.start().unwrap(); // is on already, and loses nothing
        assert_eq!(fetch(&log, &memory), set([2]), "{kind:?}");
        memory.write(3, 2);
        log.stop().unwrap();
        log.stop().unwrap();
        memory.write(4, 2);
        assert_eq!(fetch(&log, &memory), set([]), "{kind:?}");
        log.start().unwrap();
        assert_eq!(fetch(&log, &memory), set([]), "{kind:?}");
        memory.write(5, 2);
        assert_eq!(fetch(&log, &memory), set([5]), "{kind:?}");
    }
}

#[test]
fn a_forked_child_is_not_tracked() {
    for kind in KINDS {
        let memory = Memory::populated(kind, 64);
        let log = memory.log();
        if !started(&log) {
            return;
        }
        let address = memory.start.expose_provenance() + 3 * PAGE_SIZE;
        let mut command = Command::new("true");
        // SAFETY: the child only stores a word to its copy of the mapping, or to the shared file.
        unsafe {
            command.pre_exec(move || {
                (*ptr::with_exposed_provenance::<AtomicU64>(address)).store(9, Ordering::Relaxed);
                Ok(())
            })
        };
        assert!(command.status().unwrap().success());
        assert_eq!(memory.read(3), if kind == Kind::Memfd { 9 } else { 1 });
        assert_eq!(fetch(&log, &memory), set([]), "{kind:?}");
        memory.write_all([3, 4], 2);
        assert_eq!(fetch(&log, &memory), set([3, 4]), "{kind:?}");
    }
}

#[test]
fn memory_that_cannot_be_tracked_is_named() {
    let memory = Memory::new(Kind::SmallPages, 64);
    let log = memory.log();
    if !started(&log) {
        return;
    }
    let twice = memory.log().start().unwrap_err();
    assert!(matches!(twice, LogError::Region { .. }), "{twice}");
    log.stop().unwrap();
    let beyond = UffdLog::new(vec![UffdRegion {
        block: BlockIndex(7),
        host_addr: 1 << 46,
        ..memory.region()
    }]);
    let unmapped = beyond.start().unwrap_err().to_string();
    assert!(
        unmapped.contains("0x400000000000..0x400000040000 of RAM block 7"),
        "{unmapped}"
    );
    // A log that could not be started leaves nothing behind.
    log.start().unwrap();
}

#[test]
fn a_fetch_that_fails_reports_too_much_rather_than_too_little() {
    let memory = Memory::populated(Kind::SmallPages, 128);
    let log = memory.log();
    if !started(&log) {
        return;
    }
    memory.write(3, 2);
    // SAFETY: over a part of the test's own mapping, whose content may be anything.
    unsafe {
        rustix::mm::mmap_anonymous(
            memory.start.add(64 * PAGE_SIZE).cast(),
            PAGE_SIZE,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED,
        )
    }
    .unwrap();
    let mut words = [0; 2];
    log.fetch(BLOCK, &mut words).unwrap_err();
    assert_eq!(words, [!0; 2]);
    log.stop().unwrap();
}

#[test]
fn hugetlb_pages_are_reported_whole() {
    let memory = match Memory::map(Some(MemfdFlags::HUGETLB), 3 * PAGES_IN_HUGE) {
        Ok(memory) => memory,
        Err(e) => return eprintln!("SKIPPED: no hugetlb pages ({e}); vm.nr_hugepages makes some"),
    };
    memory.write_all([0, PAGES_IN_HUGE], 1);
    let log = memory.log();
    if !started(&log) {
        return;
    }
    assert_eq!(fetch(&log, &memory), set([]));
    memory.write(7, 2);
    assert_eq!(fetch(&log, &memory), set(0..PAGES_IN_HUGE));
    memory.write(2 * PAGES_IN_HUGE, 2); // unpopulated before
    assert_eq!(
        fetch(&log, &memory),
        set(2 * PAGES_IN_HUGE..3 * PAGES_IN_HUGE)
    );
    assert_eq!(fetch(&log, &memory), set([]));
}

/// Runs a test of this file again, in a process that may do nothing special.
#[test]
fn no_privilege_is_needed() {
    let output = Command::new("setpriv")
        .args(["--bounding-set=-all", "--inh-caps=-all"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .args(["what_is_written_is_reported_and_nothing_else"])
        .args(["what_the_kernel_writes_is_reported"])
        .output();
    let Ok(output) = output else {
        return eprintln!("SKIPPED: setpriv is not installed");
    };
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("setpriv: ") {
        return eprintln!("SKIPPED: {said}");
    }
    assert!(output.status.success(), "{said}");
    let privileged = Memory::new(Kind::SmallPages, 1);
    assert_eq!(
        said.contains("SKIPPED"),
        !started(&privileged.log()),
        "{said}"
    );
}

/// Law 1, end to end: whatever a copier misses of a running writer is in the tracker.
#[test]
fn a_copy_catches_up_with_a_writer() {
    for (kind, discipline) in KINDS.into_iter().zip(Discipline::ALL.into_iter().cycle()) {
        let memory = Memory::populated(kind, 4 * PAGES_IN_HUGE + 33);
        let log = memory.log();
        if !started(&log) {
            return;
        }
        let tracker = DirtyTracker::start(
            Arc::new(log),
            &[memory.pages],
            discipline,
            ArmingChunk::default(),
        )
        .unwrap();
        let mut copy = vec![0; memory.pages];
        let mut copied = 0;
        let mut pass = || {
            let mut cursor = Cursor::default();
            let mut slice = tracker.slice(&mut cursor);
            while let Some(run) = slice.next_run(64).unwrap() {
                for page in run.pages.indices() {
                    copy[page] = memory.read(page);
                    copied += 1;
                }
            }
        };
        let (running, written) = (AtomicBool::new(true), AtomicU64::new(0));
        std::thread::scope(|s| {
            s.spawn(|| {
                let mut page = 0;
                for value in 2.. {
                    page = (page + 7919) % memory.pages;
                    memory.write(page, value);
                    if value % 5000 == 0 {
                        let huge = page / PAGES_IN_HUGE % 4 * PAGES_IN_HUGE;
                        memory.discard(huge..huge + PAGES_IN_HUGE);
                    }
                    written.store(value, Ordering::Relaxed);
                    if !running.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let end = Instant::now() + Duration::from_millis(300);
            while Instant::now() < end {
                pass();
                tracker.sync().unwrap();
            }
            running.store(false, Ordering::Relaxed);
        });
        tracker.sync().unwrap();
        pass();
        let differing = (0..memory.pages).filter(|&page| copy[page] != memory.read(page));
        assert_eq!(set(differing), set([]), "{kind:?} {discipline}");
        println!(
            "{kind:?}: {} writes, {copied} pages copied",
            written.into_inner()
        );
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(Range<usize>),
    Read(Range<usize>),
    Discard(Range<usize>),
    Fetch,
    Restart,
}

const HISTORY_PAGES: usize = 2 * PAGES_IN_HUGE + 100;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Few pages, many, or whole huge pages.
    let range = prop_oneof![
        (0..HISTORY_PAGES, 1..9usize),
        (0..HISTORY_PAGES, 1..HISTORY_PAGES),
        (0..2usize, 1..3usize).prop_map(|(at, n)| (at * PAGES_IN_HUGE, n * PAGES_IN_HUGE)),
    ]
    .prop_map(|(start, length)| start..(start + length).min(HISTORY_PAGES));
    let step = prop_oneof![
        6 => range.clone().prop_map(Step::Write),
        2 => range.clone().prop_map(Step::Read),
        2 => range.prop_map(Step::Discard),
        4 => Just(Step::Fetch),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_is_reported(
        kind in prop::sample::select(KINDS.to_vec()),
        populate in any::<bool>(),
        steps in steps(),
    ) {
        let memory = Memory::new(kind, HISTORY_PAGES);
        if populate {
            memory.write_all(0..HISTORY_PAGES, 1);
        }
        let log = memory.log();
        if !started(&log) {
            return Ok(());
        }
        let mut changed = set([]);
        // Memory that was discarded may come back as a huge page, and is then reported whole.
        let mut perhaps_huge = set([]);
        for step in steps {
            match step {
                Step::Write(pages) => {
                    memory.write_all(pages.clone(), 2);
                    changed.extend(pages);
                }
                Step::Read(pages) => {
                    pages.for_each(|page| _ = memory.read(page));
                }
                Step::Discard(pages) => {
                    memory.discard(pages.clone());
                    if kind != Kind::Memfd {
                        changed.extend(pages.clone());
                    }
                    if kind == Kind::HugePages {
                        perhaps_huge.extend(pages.map(|page| page / PAGES_IN_HUGE));
                    }
                }
                Step::Fetch => {
                    let reported = fetch(&log, &memory);
                    prop_assert!(reported.is_superset(&changed), "lost");
                    let extra = reported
                        .difference(&changed)
                        .find(|&page| !perhaps_huge.contains(&(page / PAGES_IN_HUGE)));
                    prop_assert_eq!(extra, None);
                    changed.clear();
                }
                Step::Restart => {
                    log.stop().unwrap();
                    log.start().unwrap();
                    changed.clear();
                }
            }
        }
    }
}
