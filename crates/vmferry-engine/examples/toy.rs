//! The smallest virtual machine that migrates: its "vCPU" is a thread that writes to a memory region, its
//! "hypervisor's dirty log" is a bitmap that the writes themselves mark.
//!
//! Step `n` of the guest writes `n` to page `n % PAGES`, so from the number of the next step alone follows
//! what every page must hold: that is how the guest is checked after it has moved.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{Bytes, VolatileMemory};
use vmferry_dirty::log::{VmmWriteLog, VmmWrites};
use vmferry_dirty::{BlockIndex, DirtyLog, LogError, PAGE_SIZE, PageRange};
use vmferry_engine::seam::{Activity, DeviceState, Guest, GuestError, PauseError};
use vmferry_engine::{Destination, Info, Observer, Parameters, RamBlock, Source, Status, Uri};

/// The guest's memory.
pub const PAGES: usize = 2048;

/// The guest takes a rest after so many steps.
const BURST: usize = 64;

/// A guest of 8 MiB.
pub struct Toy {
    ram: Vec<RamBlock>,
    log: ToyLog,
    cpu: Arc<Cpu>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The state of the one vCPU, shared with its thread.
struct Cpu {
    region: Arc<MmapRegion<VmmWrites>>,
    next_step: Mutex<u64>,
    running: Mutex<bool>,
    changed: Condvar,
    quit: AtomicBool,
}

impl Cpu {
    fn run(&self) {
        while !self.quit.load(Ordering::Relaxed) {
            let running = self.running.lock().unwrap();
            if !*running {
                let _woken = self
                    .changed
                    .wait_timeout(running, Duration::from_millis(10));
                continue;
            }
            // `running` is held while steps are taken, so that a pause falls between two of them.
            for _ in 0..BURST {
                self.step();
            }
            drop(running);
            // Time for some pages to be sent before they are written again.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn step(&self) {
        let mut step = self.next_step.lock().unwrap();
        let page = (*step as usize % PAGES) * PAGE_SIZE;
        // Writing through vm_memory marks the page in the VmmWriteLog.
        self.region
            .as_volatile_slice()
            .write_obj(*step, page)
            .unwrap();
        *step += 1;
    }

    fn set_running(&self, activity: Activity) -> Activity {
        let mut running = self.running.lock().unwrap();
        let was = std::mem::replace(&mut *running, activity == Activity::Running);
        self.changed.notify_all();
        if was {
            Activity::Running
        } else {
            Activity::Paused
        }
    }
}

impl Toy {
    /// A guest that has not run yet.
    pub fn new() -> Arc<Self> {
        let writes = Arc::new(VmmWriteLog::new(PAGES));
        let bitmap = VmmWrites::new(writes.clone(), 0);
        let region = MmapRegionBuilder::new_with_bitmap(PAGES * PAGE_SIZE, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .expect("8 MiB of memory");
        let region = Arc::new(region);
        // SAFETY: the region is mapped as long as the Arc lives, and only reached through vm_memory's
        // volatile accesses.
        let block = unsafe {
            RamBlock::new(
                "toy.ram",
                region.as_ptr(),
                PAGES * PAGE_SIZE,
                region.clone(),
            )
        };
        let cpu = Arc::new(Cpu {
            region,
            next_step: Mutex::new(0),
            running: Mutex::new(false),
            changed: Condvar::new(),
            quit: AtomicBool::new(false),
        });
        let thread = std::thread::spawn({
            let cpu = cpu.clone();
            move || cpu.run()
        });
        Arc::new(Toy {
            ram: vec![block.expect("aligned and named")],
            log: ToyLog(writes),
            cpu,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// How many steps it has taken.
    pub fn steps(&self) -> u64 {
        *self.cpu.next_step.lock().unwrap()
    }

    /// Whether its vCPU executes.
    pub fn is_running(&self) -> bool {
        *self.cpu.running.lock().unwrap()
    }

    /// Compares all memory with what the steps so far must have left there. The guest must be paused.
    pub fn verify(&self) -> u64 {
        let next = self.steps();
        let memory = self.cpu.region.as_volatile_slice();
        for page in 0..PAGES as u64 {
            let found: u64 = memory.read_obj(page as usize * PAGE_SIZE).unwrap();
            let rounds = (next.saturating_sub(page)).div_ceil(PAGES as u64);
            let expected = if rounds == 0 {
                0
            } else {
                page + (rounds - 1) * PAGES as u64
            };
            assert_eq!(found, expected, "page {page} is corrupt");
        }
        next
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.cpu.quit.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.lock().unwrap().take() {
            thread.join().unwrap();
        }
    }
}

/// The dirty log. It takes the bits when it is fetched, so there is nothing to arm.
struct ToyLog(Arc<VmmWriteLog>);

impl DirtyLog for ToyLog {
    fn start(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, _: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        self.0.drain_into(into);
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        false
    }

    fn arm(&self, _: BlockIndex, _: PageRange, _: &[u64]) -> Result<(), LogError> {
        Ok(())
    }
}

fn section(idstr: &str, data: Vec<u8>) -> DeviceState {
    DeviceState {
        idstr: idstr.to_owned(),
        instance_id: 0,
        version_id: 1,
        data,
    }
}

impl Guest for Toy {
    fn ram(&self) -> &[RamBlock] {
        &self.ram
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.log
    }

    fn describe(&self) -> Result<DeviceState, GuestError> {
        Ok(section("vmferry/toy", Vec::new()))
    }

    fn check_description(&self, source: &DeviceState) -> Result<(), GuestError> {
        match source.idstr.as_str() {
            "vmferry/toy" => Ok(()),
            other => Err(GuestError(format!(
                "the source is a {other}, this is a toy"
            ))),
        }
    }

    fn pause(&self, _limit: Duration) -> Result<Activity, PauseError> {
        Ok(self.cpu.set_running(Activity::Paused))
    }

    fn resume(&self, was: Activity) -> Result<(), GuestError> {
        self.cpu.set_running(was);
        Ok(())
    }

    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError> {
        // Saving may write to guest memory, as KVM's does: here it takes a step.
        self.cpu.step();
        let step = self.steps().to_be_bytes().to_vec();
        Ok(vec![section("vmferry/toy-cpu", step)])
    }

    fn load_devices(&self, states: &[DeviceState]) -> Result<(), GuestError> {
        let [state] = states else {
            return Err(GuestError(format!(
                "{} sections instead of one",
                states.len()
            )));
        };
        let step = state.data.as_slice().try_into().map_err(|_| {
            GuestError(format!(
                "{} holds {} bytes, not 8",
                state.idstr,
                state.data.len()
            ))
        })?;
        *self.cpu.next_step.lock().unwrap() = u64::from_be_bytes(step);
        Ok(())
    }

    fn start(&self, activity: Activity, _paused_for: Duration) -> Result<(), GuestError> {
        self.cpu.set_running(activity);
        Ok(())
    }
}

/// Watches nothing.
pub struct Quiet;

impl Observer for Quiet {
    fn status(&self, _: Status) {}
    fn pass(&self, _: u64) {}
}

fn main() {
    let (here, there) = (Toy::new(), Toy::new());
    here.start(Activity::Running, Duration::ZERO).unwrap();
    while here.steps() < 2 * PAGES as u64 {
        std::thread::yield_now();
    }

    let any_port: Uri = "tcp:127.0.0.1:0".parse().unwrap();
    let incoming = Destination::start(there.clone(), &any_port, Box::new(Quiet)).unwrap();
    let uri = incoming.uri().clone();
    let outgoing =
        Source::start(here.clone(), uri, Parameters::default(), Box::new(Quiet)).unwrap();
    while !outgoing.info().status.is_final() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let info: Info = outgoing.info();
    outgoing.wait().expect("the guest has left");
    incoming.wait().expect("the guest has arrived");

    // It runs there, and only there.
    let arrived = there.steps();
    while there.steps() < arrived + 1000 {
        std::thread::yield_now();
    }
    let left = here.verify();
    there.pause(Duration::ZERO).unwrap();
    let steps = there.verify();
    assert!(left < steps);
    println!(
        "moved at step {left}, {steps} steps now; {} pages sent, {} of them zero, downtime {:?}",
        info.ram.normal + info.ram.duplicate,
        info.ram.duplicate,
        info.downtime.unwrap()
    );
}
