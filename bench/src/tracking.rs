//! What it costs to track a guest's writes, for who tracks them and for the guest.
//!
//! The machine runs in this process, so that each step can be timed. Its dirty log is driven as by a migration that
//! goes on and on: sync, take all dirty pages, read them, sync again 100 ms after the last. Nothing is sent.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use vmferry_dirty::{ArmingChunk, Batch, Cursor, DirtyTracker, Discipline, PAGE_SIZE, PageIndex};
use vmferry_engine::seam::{Guest, GuestLog};
use vmferry_vmm::{
    Backing, DirtyLogChoice, KernelSource, Machine, MachineConfig, OnReset, SerialConfig,
};

use crate::interrupt::Interrupt;
use crate::median::Median;
use crate::serial::{Beat, Serial};

/// From one sync to the next, at least. Longer if it takes longer to read what is dirty.
const PASS: Duration = Duration::from_millis(100);

/// How long the guest may take to be ready, or for anything else.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest to track, and how.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The dirty log.
    pub dirty_log: DirtyLogChoice,
    /// How much of it is armed at a time.
    pub chunk: ArmingChunk,
    /// RAM in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// The guest's working set in MiB, and how many pages of it the guest is to rewrite a second; 0 is as many as
    /// it can.
    pub working_set: u64,
    /// See `working_set`.
    pub rate: u64,
    /// How long to watch the guest, before and during the tracking each.
    pub time: Duration,
}

/// What was measured. Times are in milliseconds.
#[derive(Clone, Debug)]
pub struct Cost {
    /// To switch the log on, the first sync included.
    pub start: f64,
    /// To arm all of the guest's memory in the first pass, without reading it.
    pub first_arming: f64,
    /// A sync.
    pub sync: Median,
    /// Arming in a pass, all of it together.
    pub arming: Median,
    /// Both together.
    pub both: Median,
    /// Pages found dirty by a sync.
    pub pages: Median,
    /// Pages a second that the guest rewrote before.
    pub rate_before: f64,
    /// The same while it was tracked.
    pub rate: f64,
    /// The longest time between two turns of the guest's main loop while it was tracked.
    pub gap: f64,
}

/// Measures one cell.
///
/// # Errors
/// There can be no such machine, its guest does not come up, or a signal came.
pub fn measure(cell: &Cell, interrupt: &Interrupt) -> anyhow::Result<Cost> {
    let dir = tempfile::tempdir().context("cannot create a directory for a socket")?;
    let socket = dir.path().join("serial");
    let machine = start(cell, &socket)?;
    let serial = UnixStream::connect(&socket).context("cannot connect to the serial port")?;
    let serial = Serial::read(serial)?;
    machine.resume()?;
    let ready = || Ok(serial.contains("ready filled_pages=").then_some(()));
    let ready = interrupt.wait(PATIENCE, ready)?;
    ready.with_context(|| {
        format!(
            "the guest did not come up; it said: {}",
            serial.last_words()
        )
    })?;

    let before = Instant::now();
    interrupt.wait::<()>(cell.time, || Ok(None))?;
    let rate_before = Window::new(&serial, before)?.rate;

    let log = Arc::new(GuestLog::new(machine.clone()));
    let sizes = [machine.ram()[0].pages()];
    let begin = Instant::now();
    let tracker = DirtyTracker::start(log, &sizes, Discipline::default(), cell.chunk)?;
    let start = millis(begin.elapsed());
    let first_arming = millis(take_all(&tracker, |_| {})?);

    let during = Instant::now();
    let (mut syncs, mut armings, mut both, mut pages) = (vec![], vec![], vec![], vec![]);
    let mut content = [0; PAGE_SIZE];
    let ram = &machine.ram()[0];
    while during.elapsed() < cell.time {
        let begin = Instant::now();
        tracker.sync()?;
        let sync = begin.elapsed();
        pages.push(tracker.set().dirty_pages() as f64);
        let arming = take_all(&tracker, |page| ram.read_page(page, &mut content))?;
        syncs.push(millis(sync));
        armings.push(millis(arming));
        both.push(millis(sync + arming));
        thread::sleep(PASS.saturating_sub(begin.elapsed()));
    }
    let window = Window::new(&serial, during)?;
    drop(tracker);
    let median = |all: Vec<f64>| Median::of(all.into_iter()).context("there was no pass");
    Ok(Cost {
        start,
        first_arming,
        sync: median(syncs)?,
        arming: median(armings)?,
        both: median(both)?,
        pages: median(pages)?,
        rate_before,
        rate: window.rate,
        gap: window.gap,
    })
}

fn start(cell: &Cell, socket: &Path) -> anyhow::Result<Arc<Machine>> {
    let elf = vmferry_guests::find("dirtier").context("there is no guest 'dirtier'")?;
    let (ws, rate, cpus) = (cell.working_set, cell.rate, cell.cpus);
    let config = MachineConfig {
        name: "tracked".to_owned(),
        cpus,
        memory: cell.memory,
        backing: Backing::Private,
        dirty_log: cell.dirty_log,
        kernel: Some(KernelSource::Bytes(elf.into())),
        initrd: None,
        // Little but writing: no sweeps, and content that is quickly made.
        cmdline: format!(
            "vcpus={cpus} ws={ws}M rate={rate} pattern=random fill=zero cold=0 sweep=0"
        ),
        serial: SerialConfig::Unix(socket.to_owned()),
        disks: Vec::new(),
        nets: Vec::new(),
        console: None,
        rng: false,
        balloon: None,
        on_reset: OnReset::Shutdown,
        incoming: false,
    };
    Ok(Machine::new(config, Box::new(|_| {}))?)
}

/// Takes every dirty page and shows it to `read`. Returns how long arming took.
fn take_all(tracker: &DirtyTracker, mut read: impl FnMut(PageIndex)) -> anyhow::Result<Duration> {
    let (mut cursor, mut batch) = (Cursor::default(), Batch::new());
    let mut slice = tracker.slice(&mut cursor);
    while slice.next_batch(&mut batch, usize::MAX)? {
        let pages = batch.runs().iter().flat_map(|run| run.indices());
        pages.for_each(|page| read(PageIndex(page)));
    }
    Ok(slice.arming_time())
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What the guest said of itself since a moment.
struct Window {
    rate: f64,
    gap: f64,
}

impl Window {
    fn new(serial: &Serial, since: Instant) -> anyhow::Result<Self> {
        let beats: Vec<Beat> = serial.beats();
        let mut rate = 0.0;
        let mut gap = 0;
        let vcpus = beats.iter().map(|beat| beat.heartbeat.vcpu + 1).max();
        for vcpu in 0..vcpus.unwrap_or(0) {
            // What the first one tells of is in part from before.
            let mut of_vcpu = beats
                .iter()
                .filter(|beat| beat.heartbeat.vcpu == vcpu && beat.at > since)
                .map(|beat| beat.heartbeat);
            let (first, rest) = (of_vcpu.next(), of_vcpu.collect::<Vec<_>>());
            let (first, last) = first
                .zip(rest.last())
                .with_context(|| format!("too few heartbeats of vCPU {vcpu}"))?;
            rate += (last.written - first.written) as f64 / (last.t - first.t) as f64;
            gap = rest
                .iter()
                .map(|beat| beat.gap_us)
                .max()
                .unwrap_or(0)
                .max(gap);
            ensure!(last.corrupt == 0, "vCPU {vcpu} finds its memory corrupt");
        }
        Ok(Window {
            rate,
            gap: gap as f64 / 1e3,
        })
    }
}
