//! virtio-balloon.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};

use vmferry_dirty::PageRange;
use vmferry_engine::seam::FreePageHinting;

use super::*;
use crate::config::BalloonConfig;
use crate::virtio::{Balloon, BalloonPort};

const STATS_VQ: u64 = 1 << 1;
const FREE_PAGE_HINT: u64 = 1 << 3;
const REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const FREE_PAGES: usize = 3;

const PAGE: u64 = PAGE_SIZE as u64;
const STOP: u32 = 0;
const DONE: u32 = 1;

/// A balloon with its machine's end.
struct Rig {
    bench: Bench,
    port: BalloonPort,
    /// What the machine is told of changes.
    changes: Receiver<u64>,
    queues: usize,
}

impl Rig {
    fn new(ram: &GuestRam, config: BalloonConfig) -> Self {
        let (sender, changes) = mpsc::channel();
        let on_change = Box::new(move |bytes| sender.send(bytes).unwrap());
        let balloon = Balloon::new(config, RAM, on_change);
        let port = balloon.port();
        let queues = Balloon::queues(config);
        let bench = Bench::new(ram, Box::new(balloon), Kicks::new(queues).unwrap());
        Rig {
            port: port(bench.slot.clone()),
            bench,
            changes,
            queues,
        }
    }

    /// With a driver that takes what it can get.
    fn started(ram: &GuestRam, config: BalloonConfig) -> Self {
        let rig = Rig::new(ram, config);
        let features = rig.bench.offered() & (STATS_VQ | FREE_PAGE_HINT | REPORTING);
        rig.bench.start(features, rig.queues);
        rig
    }

    /// A field of the configuration.
    fn field(&self, index: u64) -> u32 {
        let mut field = [0; 4];
        self.bench.slot.read(0x100 + 4 * index, &mut field);
        u32::from_le_bytes(field)
    }

    fn command(&self) -> u32 {
        self.field(2)
    }

    fn set_actual(&self, pages: u32) {
        self.bench.slot.write(0x104, &pages.to_le_bytes());
    }

    /// Has the device serve a request of these buffers, which must not break it.
    #[track_caller]
    fn request(&self, queue: usize, buffers: &[(u64, u32, u16)]) {
        let before = self.bench.used(queue).0;
        self.bench.offer(queue, buffers);
        self.bench.serve(queue);
        assert_eq!(self.bench.used(queue), (before.wrapping_add(1), 0));
        assert_eq!(self.bench.status(), RUNNING);
    }

    /// Puts these pages into the balloon.
    #[track_caller]
    fn inflate(&self, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.bench.put(BUFFERS, &bytes);
        self.request(INFLATE, &[(BUFFERS, bytes.len() as u32, 0)]);
    }

    /// Says which question is answered.
    fn say(&self, id: u32) {
        self.bench.put(BUFFERS, &id.to_le_bytes());
        self.request(FREE_PAGES, &[(BUFFERS, 4, 0)]);
    }

    /// Gives a buffer with statistics, which the device keeps.
    fn tell(&self, tag: u16, value: u64) {
        self.bench.put(BUFFERS, &tag.to_le_bytes());
        self.bench.put(BUFFERS + 2, &value.to_le_bytes());
        self.bench.offer(STATISTICS, &[(BUFFERS, 10, 0)]);
        self.bench.serve(STATISTICS);
    }
}

/// The pages that were hinted.
type Heard = Arc<Mutex<Vec<PageRange>>>;

/// A list of hints, and what adds to it.
fn listener() -> (Heard, Arc<impl Fn(PageRange)>) {
    let heard = Heard::default();
    let list = heard.clone();
    (
        heard,
        Arc::new(move |pages| list.lock().unwrap().push(pages)),
    )
}

fn reporting() -> BalloonConfig {
    BalloonConfig {
        free_page_reporting: true,
        ..BalloonConfig::default()
    }
}

#[test]
fn what_is_put_into_the_balloon_is_given_back() {
    let ram = ram();
    let rig = Rig::started(&ram, BalloonConfig::default());
    assert_eq!(rig.field(0), 0);
    rig.port.set_target(RAM - 8 * PAGE);
    assert_eq!(rig.bench.interrupt_status() & 2, 2, "the driver is told");
    assert_eq!(rig.field(0), 8);

    let first = 0x400;
    rig.bench.put(first * PAGE, &vec![7; 16 * PAGE_SIZE]);
    written(&ram);
    // In no order, one of them twice.
    let pages = [7, 2, 3, 9, 8, 3].map(|page| first as u32 + page);
    rig.inflate(&pages);
    let log = written(&ram);
    for page in first..first + 16 {
        let given = pages.contains(&(page as u32));
        let content = if given { 0 } else { 7 };
        let bytes = rig.bench.bytes(page * PAGE, PAGE_SIZE);
        assert!(bytes.iter().all(|byte| *byte == content), "page {page:#x}");
        assert_eq!(log.contains(&page), given, "page {page:#x}");
    }
    rig.set_actual(8);
    assert_eq!(rig.changes.try_recv(), Ok(RAM - 8 * PAGE));
    assert_eq!(rig.port.info().actual, RAM - 8 * PAGE);
    rig.set_actual(8);
    assert!(rig.changes.try_recv().is_err(), "nothing has changed");
    rig.request(DEFLATE, &[(BUFFERS, 20, 0)]);
    rig.set_actual(0);
    assert_eq!(rig.changes.try_recv(), Ok(RAM));
}

#[test]
fn hostile_numbers_and_lengths_harm_nobody() {
    let ram = ram();
    let rig = Rig::started(&ram, reporting());
    let last = (RAM / PAGE) as u32 - 1;
    rig.bench.put(u64::from(last) * PAGE, &[7; PAGE_SIZE]);
    written(&ram);
    rig.inflate(&[u32::MAX, last + 1, u32::MAX - 1, last, 0xf_ffff, 0x10_0000]);
    let gone = rig.bench.bytes(u64::from(last) * PAGE, PAGE_SIZE);
    assert_eq!(gone, [0; PAGE_SIZE]);
    // Three bytes are no number, and a buffer to write has none.
    written(&ram);
    rig.request(INFLATE, &[(BUFFERS, 3, 0)]);
    rig.request(INFLATE, &[(BUFFERS, 4096, WRITE)]);
    assert!(!has(&written(&ram), BUFFERS));
    // Far more numbers than a request may have. The guest has put zeros there.
    rig.request(INFLATE, &[(BUFFERS, 8 << 20, 0)]);
    assert!(has(&written(&ram), 0));
    // As much as the guest says that it has given up.
    rig.set_actual(u32::MAX);
    assert_eq!(rig.port.info().actual, 0);
    // What is no command is none, and pages that nobody asked for are not counted.
    rig.request(FREE_PAGES, &[(BUFFERS, 3, 0)]);
    rig.request(FREE_PAGES, &[(BUFFERS, 4096, WRITE)]);
    for (offset, data) in [
        (0, &[1; 4][..]),
        (4, &[1; 2]),
        (8, &[1; 4]),
        (0xff0, &[1; 8]),
    ] {
        rig.bench.slot.write(0x100 + offset, data);
    }
    assert_eq!(
        [0, 1, 2, 3].map(|field| rig.field(field)),
        [0, u32::MAX, DONE, 0]
    );
    // A second buffer for statistics pushes the first one out.
    rig.tell(4, 1);
    rig.tell(4, 2);
    assert_eq!(rig.bench.used(STATISTICS).0, 1);
    assert_eq!(rig.bench.status(), RUNNING);
}

#[test]
fn statistics_are_asked_for_by_giving_the_buffer_back() {
    let ram = ram();
    let rig = Rig::started(&ram, BalloonConfig::default());
    assert!(rig.port.info().statistics.is_empty());
    let kick = rig.bench.slot.kicks().of(STATISTICS);
    kick.read().unwrap();
    // Asked already, the device gives the first buffer back at once.
    rig.tell(4, 5 << 20);
    assert_eq!(rig.bench.used(STATISTICS).0, 1);
    rig.tell(4, 6 << 20);
    assert_eq!(rig.bench.used(STATISTICS).0, 1, "it keeps the buffer");
    let told = BTreeMap::from([("free-memory", 6 << 20)]);

    // The buffer that is kept moves with the guest.
    let there = Rig::new(&ram, BalloonConfig::default());
    there.bench.slot.load(&rig.bench.slot.save()).unwrap();
    assert_eq!(rig.port.info().statistics, told);
    assert!(there.port.info().statistics.is_empty());
    there.bench.slot.kicks().of(STATISTICS).read().unwrap();
    there.bench.serve(STATISTICS);
    assert_eq!(there.bench.used(STATISTICS).0, 2);
    there.tell(5, RAM);
    let told = BTreeMap::from([("total-memory", RAM)]);
    assert_eq!(there.port.info().statistics, told);
}

#[test]
fn free_pages_count_in_answer_to_the_question_in_force() {
    let ram = ram();
    let rig = Rig::started(&ram, BalloonConfig::default());
    assert_eq!(rig.command(), DONE);
    let (heard, hints) = listener();
    rig.port.ask(hints.clone());
    assert_eq!(rig.bench.interrupt_status() & 2, 2, "the driver is told");
    let question = rig.command();
    assert!(question > DONE);
    let pages = [(0x40_0000, 0x4000, WRITE)];

    rig.request(FREE_PAGES, &pages);
    rig.say(question + 1);
    rig.request(FREE_PAGES, &pages);
    assert_eq!(*heard.lock().unwrap(), [], "it has not begun to answer");

    rig.say(question);
    rig.request(FREE_PAGES, &pages);
    // Pages that are not whole do not count.
    let two = [(0x50_0001, 0x2000, WRITE), (0x60_0000, 0x1fff, WRITE)];
    rig.request(FREE_PAGES, &two);
    let answer = [(0x400, 0x404), (0x501, 0x502), (0x600, 0x601)];
    let answer = answer.map(|(start, end)| PageRange::new(start, end));
    assert_eq!(*heard.lock().unwrap(), answer);

    rig.say(STOP);
    rig.request(FREE_PAGES, &pages);
    rig.say(question);
    rig.port.stop();
    assert_eq!(rig.command(), STOP);
    rig.request(FREE_PAGES, &pages);
    rig.port.ask(hints.clone());
    assert_eq!(rig.command(), question + 1);
    // This answer is late: pages of it may be in use since.
    rig.request(FREE_PAGES, &pages);
    rig.say(question);
    rig.request(FREE_PAGES, &pages);
    assert_eq!(*heard.lock().unwrap(), answer);

    // One chain may say all at once. A driver that begins anew has not said anything.
    rig.bench.put(BUFFERS, &(question + 1).to_le_bytes());
    rig.request(FREE_PAGES, &[(BUFFERS, 4, 0), pages[0]]);
    assert_eq!(heard.lock().unwrap().len(), 4);
    (0..rig.queues).for_each(|queue| rig.bench.put(RINGS * (queue as u64 + 1), &[0; 0x3000]));
    rig.bench.start(FREE_PAGE_HINT, 3);
    assert_eq!(rig.command(), question + 1);
    // It has chosen no statistics: the queue of free pages comes in their place.
    rig.request(STATISTICS, &pages);
    assert_eq!(heard.lock().unwrap().len(), 4);

    rig.port.done();
    assert_eq!(rig.command(), DONE);
}

#[test]
fn a_hint_is_carried_out_before_the_guest_hears_of_it() {
    let ram = ram();
    let rig = Rig::started(&ram, BalloonConfig::default());
    let memory = ram.memory.clone();
    let used_at_hint = Arc::new(Mutex::new(None));
    let seen = used_at_hint.clone();
    rig.port.ask(Arc::new(move |_| {
        let used: u16 = memory
            .read_obj(rings(FREE_PAGES).used.unchecked_add(2))
            .unwrap();
        *seen.lock().unwrap() = Some(used);
    }));
    rig.say(rig.command());
    rig.request(FREE_PAGES, &[(0x40_0000, 0x1000, WRITE)]);
    assert_eq!(*used_at_hint.lock().unwrap(), Some(1));
}

/// Hints may wait for the migration's thread, which must be able to go on.
#[test]
fn a_hint_that_waits_holds_nobody_up() {
    let ram = ram();
    let rig = Rig::started(&ram, BalloonConfig::default());
    let (at_it, is_at_it) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let may_go_on = Mutex::new(may_go_on);
    rig.port.ask(Arc::new(move |_| {
        at_it.send(()).unwrap();
        may_go_on.lock().unwrap().recv().unwrap();
    }));
    rig.say(rig.command());
    std::thread::scope(|scope| {
        let bench = &rig.bench;
        bench.offer(FREE_PAGES, &[(0x40_0000, 0x1000, WRITE)]);
        scope.spawn(|| bench.serve(FREE_PAGES));
        is_at_it.recv().unwrap();
        rig.port.stop();
        rig.port.ask(listener().1);
        rig.port.done();
        rig.port.info();
        go_on.send(()).unwrap();
    });
    assert_eq!(rig.command(), DONE);
    assert_eq!(rig.bench.used(FREE_PAGES), (2, 0));
}

#[test]
fn reported_pages_are_given_back_and_logged() {
    let ram = ram();
    let config = BalloonConfig {
        free_page_hint: false,
        ..reporting()
    };
    let rig = Rig::started(&ram, config);
    let reports = rig.queues - 1;
    assert_eq!(reports, 3, "there is no queue of free pages");
    rig.bench.put(0x40_0000, &[7; 4 * PAGE_SIZE]);
    written(&ram);
    let pieces = [(0x40_0000, 0x2000, WRITE), (0x40_3000, 0x1000, WRITE)];
    rig.request(reports, &pieces);
    let log = written(&ram);
    for (at, content) in [
        (0x40_0000, 0),
        (0x40_1000, 0),
        (0x40_2000, 7),
        (0x40_3000, 0),
    ] {
        assert_eq!(rig.bench.bytes(at, PAGE_SIZE), [content; PAGE_SIZE]);
        assert_eq!(has(&log, at), content == 0);
    }
}

#[test]
fn it_moves_with_the_guest() {
    let ram = ram();
    let rig = Rig::started(&ram, BalloonConfig::default());
    rig.port.set_target(RAM / 2);
    rig.set_actual(100);
    let (heard, hints) = listener();
    rig.port.ask(hints.clone());
    let question = rig.command();
    rig.say(question);
    let saved = rig.bench.slot.save();

    let there = Rig::new(&ram, BalloonConfig::default());
    assert!(there.port.hinting().is_none(), "there is no driver");
    there.bench.slot.load(&saved).unwrap();
    assert!(there.port.hinting().is_some());
    let pages = (RAM / 2 / PAGE) as u32;
    assert_eq!(
        [0, 1, 2].map(|field| there.field(field)),
        [pages, 100, DONE]
    );
    assert!(there.changes.try_recv().is_err(), "nothing has changed");
    // The old question is over, and no new one has its id.
    there.bench.offer(FREE_PAGES, &[(0x40_0000, 0x1000, WRITE)]);
    there.bench.serve(FREE_PAGES);
    assert_eq!(*heard.lock().unwrap(), []);
    there.port.ask(hints);
    assert!(there.command() > question);
    assert_eq!(there.bench.status(), RUNNING);

    // Without a driver, all memory is the guest's.
    there.bench.slot.reset();
    assert_eq!([0, 1].map(|field| there.field(field)), [pages, 0]);
    assert!(there.port.hinting().is_none());
    let other = Rig::new(&ram, reporting());
    assert!(other.bench.slot.load(&saved).is_err(), "it has more queues");
}
