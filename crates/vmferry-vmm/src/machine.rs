//! A virtual machine as its user sees it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vm_superio::SerialState;
use vmferry_dirty::DirtyLog;

use crate::acpi::{self, Platform};
use crate::boot::{Images, Occasion};
use crate::config::{Access, Caching, MachineConfig, OnReset};
use crate::cpuid;
use crate::devices::{Bus, EventDevice, MmioRange, SerialPort, events};
use crate::dirty_log::{Chosen, DirtyLogKind};
use crate::error::{Attempt, MachineError};
use crate::hypervisor::Hypervisor;
use crate::layout::{EVENT_DEVICE, EVENT_DEVICE_IRQ, SERIAL_IRQ};
use crate::memory::GuestRam;
use crate::run_state::RunState;
use crate::state::clock::ClockState;
use crate::state::cpu::{self, CpuState};
use crate::state::irqchip::{IrqchipState, PitState};
use crate::state::machine::Description;
use crate::state::msrs;
use crate::supervisor;
use crate::vcpu::{Gate, GuestRequest, Vcpu, VcpuThread, Wanted};
use crate::virtio::{Announcement, BalloonPort, Devices, Disk, DiskIo};

/// How long a guest that is to stop, for its user or for a migration, may wait for its disks: requests that the host has
/// begun have to be complete. What takes longer is no delay but a failure, and a migration's guest is better off where it
/// was.
const STANDSTILL_LIMIT: Duration = Duration::from_secs(5);

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The vCPUs have stopped, for the user or for a migration.
    Stop,
    /// The vCPUs run.
    Resume,
    /// The guest has started again.
    Reset {
        /// Whether it asked for that itself.
        guest: bool,
    },
    /// The power button was pressed.
    PowerButton,
    /// The guest has stopped for good.
    Shutdown {
        /// Why.
        cause: ShutdownCause,
    },
    /// A vCPU cannot go on.
    InternalError {
        /// Which vCPU.
        vcpu: u32,
        /// Why, with the registers that tell where.
        reason: String,
    },
    /// The guest has taken memory from its balloon, or given some to it.
    BalloonChange {
        /// Bytes of RAM that it has left.
        actual: u64,
    },
    /// The user of the console has pressed the keys that mean "quit".
    QuitKey,
}

/// A disk, for its user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Its name.
    pub id: String,
    /// The image or block device behind it.
    pub path: PathBuf,
    /// What the guest may do with it.
    pub access: Access,
    /// Whether the host caches it.
    pub caching: Caching,
    /// How its guest's requests reach the host.
    pub io: DiskIo,
    /// Its size.
    pub bytes: u64,
}

/// A balloon, for its user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonInfo {
    /// Bytes of RAM that the guest has left.
    pub actual: u64,
    /// What the guest last told of its memory, by QEMU's names.
    pub statistics: BTreeMap<&'static str, u64>,
}

/// Why a guest has stopped for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownCause {
    /// It has powered its machine off.
    GuestShutdown,
    /// It has reset itself, and that was to be its end.
    GuestReset,
    /// Its user wants it.
    User,
}

/// Is told what happens to a machine, in the order in which it does, from whichever thread it happens on, which
/// may hold the machine's run state: it must be quick, and leave the machine alone.
pub type OnEvent = Box<dyn Fn(MachineEvent) + Send + Sync>;

/// A vCPU, for its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuInfo {
    /// Its number.
    pub index: u32,
    /// The kernel's number of its thread.
    pub thread_id: i32,
}

/// Who decides about the guest's next start, beside the user.
pub(crate) enum Handover {
    /// Nobody.
    None,
    /// A migration has stopped the guest here.
    Leaving {
        /// What the machine was doing before.
        before: RunState,
        /// The clocks when the guest stopped.
        clocks: ClockState,
    },
    /// A guest's state is in place and its clocks wait to be set.
    Arrived {
        clocks: ClockState,
        tsc_deadlines: Vec<u64>,
    },
}

/// What the machine is doing. Whoever holds the mutex around it is the only one to start or stop the guest.
pub(crate) struct Lifecycle {
    pub state: RunState,
    pub handover: Handover,
    /// The machine as its guest knows it; a guest that arrived knows its source's CPU.
    pub description: Description,
}

/// How everything is when the machine is switched on, to go back to at a reset.
struct PowerOn {
    cpus: Vec<CpuState>,
    irqchip: IrqchipState,
    pit: PitState,
}

/// A virtual machine.
///
/// Dropping it stops the guest and ends all its threads.
pub struct Machine {
    pub(crate) config: MachineConfig,
    /// Dropped before the RAM, which the host may write to while a device has requests in flight.
    pub(crate) devices: Devices,
    pub(crate) hypervisor: Hypervisor,
    pub(crate) ram: GuestRam,
    pub(crate) log: Box<dyn DirtyLog>,
    log_kind: DirtyLogKind,
    /// MSRs that make up a vCPU's state.
    pub(crate) msrs: Vec<u32>,
    pub(crate) vcpus: Vec<Arc<Vcpu>>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) events: Arc<EventDevice>,
    /// What this machine can be for a guest.
    pub(crate) offers: Description,
    images: Option<Images>,
    power_on: PowerOn,
    threads: Vec<VcpuThread>,
    lifecycle: Mutex<Lifecycle>,
    /// How the guest is announced when it arrives here.
    announcement: Mutex<Announcement>,
    on_event: Arc<OnEvent>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

impl Machine {
    /// Builds a machine. It does not run yet: its state is [`RunState::Prelaunch`], or [`RunState::InMigrate`]
    /// with `config.incoming`. What happens to it is told to `on_event`.
    pub fn new(config: MachineConfig, on_event: OnEvent) -> Result<Arc<Self>, MachineError> {
        let hypervisor = Hypervisor::new(|kvm: &Kvm| config.validate(kvm.get_max_vcpus()))?;
        let on_event = Arc::new(on_event);
        let quit_key = || {
            let keys = on_event.clone();
            Box::new(move || keys(MachineEvent::QuitKey))
        };
        let ram = GuestRam::new(config.memory, config.backing)?;
        let on_balloon = {
            let on_event = on_event.clone();
            Box::new(move |actual| on_event(MachineEvent::BalloonChange { actual }))
        };
        let devices = Devices::new(&config, &ram.memory, quit_key(), on_balloon)?;
        let platform = Platform {
            cpus: config.cpus,
            virtio_slots: (0..).take(devices.slots().len()).collect(),
        };
        let images = Images::read(&config, acpi::tables(&platform))?;
        devices.connect(&hypervisor.vm)?;
        ram.attach(&hypervisor.vm)?;
        let log = Chosen::new(config.dirty_log, &hypervisor.vm)?;

        let vcpus = (0..config.cpus)
            .map(|index| {
                let cpuid = cpuid::for_vcpu(&hypervisor.cpuid, index, config.cpus);
                Vcpu::new(&hypervisor.vm, index, cpuid).map(Arc::new)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let log = ram.log(log, &vcpus)?;
        let (log_kind, ring) = (log.kind(), log.ring());
        tracing::info!("dirty log in use: {log_kind}");
        let first = vcpus[0].lock();
        let msrs = msrs::to_save(&first.fd, &hypervisor.msrs)?;
        let offers = Description {
            vcpus: config.cpus,
            memory: config.memory,
            tsc_khz: first
                .fd
                .get_tsc_khz()
                .attempt("read a vCPU's TSC frequency")?,
            cpuid: first.cpuid().to_vec(),
            devices: devices.describe(&config),
        };
        drop(first);
        let power_on = PowerOn {
            cpus: vcpus
                .iter()
                .map(|vcpu| CpuState::save(&vcpu.lock(), hypervisor.features, &msrs))
                .collect::<Result<_, _>>()?,
            irqchip: IrqchipState::save(&hypervisor.vm)?,
            pit: PitState::save(&hypervisor.vm)?,
        };

        let serial = Arc::new(SerialPort::new(&config.serial, quit_key())?);
        hypervisor
            .vm
            .register_irqfd(serial.interrupt(), SERIAL_IRQ)
            .attempt("connect the serial port's interrupt")?;
        let events = Arc::new(EventDevice::new()?);
        hypervisor
            .vm
            .register_irqfd(events.interrupt(), EVENT_DEVICE_IRQ)
            .attempt("connect the power button's interrupt")?;
        let mut mmio = vec![MmioRange {
            start: EVENT_DEVICE,
            len: events::LEN,
            device: events.clone(),
        }];
        mmio.extend(devices.ranges());
        let bus = Arc::new(Bus::new(serial, mmio));

        let gate = Arc::new(Gate::new(vcpus.len()));
        let state = if config.incoming {
            RunState::InMigrate
        } else {
            RunState::Prelaunch
        };
        let mut machine = Machine {
            lifecycle: Mutex::new(Lifecycle {
                state,
                handover: Handover::None,
                description: offers.clone(),
            }),
            config,
            hypervisor,
            log: log.with(ram.writes()),
            log_kind,
            ram,
            msrs,
            vcpus,
            gate,
            bus,
            events,
            devices,
            offers,
            images,
            power_on,
            threads: Vec::new(),
            announcement: Mutex::new(Announcement::default()),
            on_event,
            supervisor: Mutex::new(None),
        };
        if !machine.config.incoming {
            machine.lock_disks()?;
            machine.switch_on(Occasion::PowerOn)?;
        }
        for vcpu in &machine.vcpus {
            let thread = VcpuThread::spawn(
                &machine.config.name,
                vcpu.clone(),
                machine.gate.clone(),
                machine.bus.clone(),
                ring.clone(),
            )?;
            machine.threads.push(thread);
        }
        machine.gate.wait_until_held();

        let machine = Arc::new(machine);
        let supervisor = supervisor::start(&machine)?;
        *machine.supervisor.lock().expect("nobody else has it yet") = Some(supervisor);
        Ok(machine)
    }

    /// What the machine was built from.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The dirty log that was chosen for it.
    pub fn dirty_log_kind(&self) -> DirtyLogKind {
        self.log_kind
    }

    /// What the machine is doing.
    pub fn run_state(&self) -> RunState {
        self.lifecycle().state
    }

    /// The vCPUs and their threads.
    pub fn vcpus(&self) -> Vec<VcpuInfo> {
        self.vcpus
            .iter()
            .map(|vcpu| VcpuInfo {
                index: vcpu.index,
                thread_id: vcpu.thread_id(),
            })
            .collect()
    }

    /// The disks.
    pub fn disks(&self) -> Vec<DiskInfo> {
        let info = |(disk, io): (&Disk, DiskIo)| DiskInfo {
            id: disk.id().to_owned(),
            path: disk.path().to_owned(),
            access: disk.access(),
            caching: disk.caching(),
            io,
            bytes: disk.bytes(),
        };
        self.devices.disks_and_io().map(info).collect()
    }

    /// The balloon, if there is one. Its statistics are those that the guest told after the last look.
    pub fn balloon(&self) -> Option<BalloonInfo> {
        self.devices.balloon().map(BalloonPort::info)
    }

    /// Asks the guest to make do with so many bytes of RAM, by its balloon.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), MachineError> {
        let Some(balloon) = self.devices.balloon() else {
            let why = "the machine has no balloon: start it with --balloon";
            return Err(MachineError::Config(why.into()));
        };
        let lifecycle = self.lifecycle();
        let hint = match lifecycle.state {
            RunState::Running | RunState::Prelaunch | RunState::Paused => {
                balloon.set_target(bytes);
                return Ok(());
            }
            RunState::FinishMigrate => "wait for the end of the migration, or cancel it",
            RunState::InMigrate => "it has not arrived yet; wait for the incoming migration",
            RunState::PostMigrate => "it has left; ask it where it is",
            RunState::Shutdown | RunState::InternalError => "it has stopped for good",
        };
        let attempted = "ask the guest for memory";
        Err(wrong_state(attempted, lifecycle.state, hint))
    }

    /// Starts the guest, or lets it go on. Does nothing if it runs.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut lifecycle = self.lifecycle();
        let hint = match lifecycle.state {
            RunState::Running => return Ok(()),
            RunState::Prelaunch | RunState::Paused | RunState::PostMigrate => {
                return self.run(&mut lifecycle);
            }
            RunState::FinishMigrate => {
                "a migration decides on which host it goes on; wait for its end, or cancel it"
            }
            RunState::InMigrate => "it has not arrived yet; wait for the incoming migration",
            RunState::Shutdown | RunState::InternalError => "reset it first",
        };
        Err(wrong_state("resume the guest", lifecycle.state, hint))
    }

    /// Stops the guest until [`resume`](Self::resume). Does nothing if it does not run.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut lifecycle = self.lifecycle();
        let hint = match lifecycle.state {
            RunState::Running => return self.stop(&mut lifecycle, RunState::Paused),
            RunState::FinishMigrate => {
                "a migration has stopped it already; wait for its end, or cancel it"
            }
            RunState::InMigrate => "it has not arrived yet; wait for the incoming migration",
            _ => return Ok(()),
        };
        Err(wrong_state("pause the guest", lifecycle.state, hint))
    }

    /// Starts the guest anew from its kernel image, as the reset button does. A guest that did not run waits
    /// in [`RunState::Prelaunch`] then.
    pub fn reset(&self) -> Result<(), MachineError> {
        let mut lifecycle = self.lifecycle();
        match lifecycle.state {
            RunState::FinishMigrate => {
                let hint = "wait for the end of the migration, or cancel it";
                return Err(wrong_state("reset the guest", lifecycle.state, hint));
            }
            RunState::InMigrate => {
                let hint = "it has not arrived yet; wait for the incoming migration";
                return Err(wrong_state("reset the guest", lifecycle.state, hint));
            }
            RunState::Running => {
                self.try_to_hold()?;
                let done = self.switch_on(Occasion::Reset);
                self.go();
                done?;
            }
            _ => {
                self.switch_on(Occasion::Reset)?;
                lifecycle.state = RunState::Prelaunch;
            }
        }
        self.emit(MachineEvent::Reset { guest: false });
        Ok(())
    }

    /// Stops the guest for good.
    pub fn quit(&self) {
        let mut lifecycle = self.lifecycle();
        if lifecycle.state == RunState::Running {
            self.hold();
        }
        lifecycle.state = RunState::Shutdown;
        lifecycle.handover = Handover::None;
        self.emit(MachineEvent::Shutdown {
            cause: ShutdownCause::User,
        });
    }

    /// Presses the power button. What follows is up to the guest: an operating system shuts down.
    pub fn power_button(&self) -> Result<(), MachineError> {
        let lifecycle = self.lifecycle();
        let hint = match lifecycle.state {
            RunState::Running | RunState::Prelaunch | RunState::Paused => {
                self.events.press_power_button();
                self.emit(MachineEvent::PowerButton);
                return Ok(());
            }
            RunState::FinishMigrate => "wait for the end of the migration, or cancel it",
            RunState::InMigrate => "it has not arrived yet; wait for the incoming migration",
            RunState::PostMigrate => "it has left; press the button where it is",
            RunState::Shutdown | RunState::InternalError => "it has stopped for good",
        };
        let attempted = "press the guest's power button";
        Err(wrong_state(attempted, lifecycle.state, hint))
    }

    /// Says that the guest has left and runs elsewhere.
    pub fn set_post_migrate(&self) -> Result<(), MachineError> {
        let mut lifecycle = self.lifecycle();
        if lifecycle.state != RunState::FinishMigrate {
            let hint = "no migration has stopped it";
            return Err(wrong_state("complete a migration", lifecycle.state, hint));
        }
        lifecycle.state = RunState::PostMigrate;
        lifecycle.handover = Handover::None;
        Ok(())
    }

    pub(crate) fn lifecycle(&self) -> MutexGuard<'_, Lifecycle> {
        self.lifecycle
            .lock()
            .expect("no holder of the run state panics")
    }

    pub(crate) fn announcement(&self) -> MutexGuard<'_, Announcement> {
        self.announcement
            .lock()
            .expect("no holder of the announcement panics")
    }

    pub(crate) fn emit(&self, event: MachineEvent) {
        (self.on_event)(event);
    }

    /// Lets the vCPUs run, if the machine has its disks to itself; else everything stays as it is.
    pub(crate) fn run(&self, lifecycle: &mut Lifecycle) -> Result<(), MachineError> {
        self.lock_disks()?;
        lifecycle.state = RunState::Running;
        lifecycle.handover = Handover::None;
        self.go();
        self.emit(MachineEvent::Resume);
        Ok(())
    }

    /// Takes the locks of all disks, or of none. A machine keeps them until it gives its guest away.
    pub(crate) fn lock_disks(&self) -> Result<(), MachineError> {
        let mut taken = Vec::new();
        for disk in self.devices.disks() {
            match disk.lock() {
                Ok(true) => taken.push(disk),
                Ok(false) => {}
                Err(error) => {
                    // Else neither this machine nor the one that has the other disks could run.
                    for disk in taken {
                        disk.unlock()?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Stops running vCPUs and devices. Instructions and requests are complete then, and nothing writes to guest memory.
    /// If that takes longer than [`STANDSTILL_LIMIT`], everything goes on instead.
    pub(crate) fn stop(
        &self,
        lifecycle: &mut Lifecycle,
        state: RunState,
    ) -> Result<(), MachineError> {
        self.try_to_hold()?;
        for vcpu in &self.vcpus {
            // Lets the guest's watchdogs know that time went by. It fails if the guest has no kvmclock.
            let _ = vcpu.lock().fd.kvmclock_ctrl();
        }
        lifecycle.state = state;
        self.emit(MachineEvent::Stop);
        Ok(())
    }

    fn go(&self) {
        self.devices.go();
        self.gate.set(Wanted::Run);
        self.bus.serial.accept_input(true);
    }

    /// Brings everything to a stand, however long the host takes for the requests that it has.
    fn hold(&self) {
        self.ask_to_hold();
        self.gate.wait_until_held();
        self.devices.wait_until_held();
    }

    /// Brings everything to a stand within [`STANDSTILL_LIMIT`], or lets it go on.
    fn try_to_hold(&self) -> Result<(), MachineError> {
        self.ask_to_hold();
        let end = Instant::now() + STANDSTILL_LIMIT;
        // A vCPU may wait for a device.
        if self.gate.held_by(end) && self.devices.held_by(end) {
            return Ok(());
        }
        let busy = self.devices.busy();
        self.go();
        Err(MachineError::Busy(format!(
            "cannot stop the guest: it does not come to a stand within {STANDSTILL_LIMIT:?}; requests in flight: {}. \
             It goes on. Look at the host's storage",
            if busy.is_empty() { "none" } else { &busy }
        )))
    }

    fn ask_to_hold(&self) {
        self.bus.serial.accept_input(false);
        // Devices are asked first: a vCPU may wait for one that a busy guest keeps at work.
        self.devices.ask_to_hold();
        self.gate.set(Wanted::Hold);
        for thread in &self.threads {
            thread.kick();
        }
    }

    /// Puts the machine into the state in which its kernel starts.
    fn switch_on(&self, occasion: Occasion) -> Result<(), MachineError> {
        let Some(images) = &self.images else {
            return Err(MachineError::Config(
                "cannot reset the guest: it arrived here without its kernel image; start the destination with the \
                 source's --kernel"
                    .into(),
            ));
        };
        let entry = images.load(&self.ram.memory, self.config.memory, occasion)?;
        let features = self.hypervisor.features;
        for (vcpu, power_on) in self.vcpus.iter().zip(&self.power_on.cpus) {
            let inner = vcpu.lock();
            power_on.load_registers(&inner.fd, features)?;
            cpu::set_tsc_deadline(&inner.fd, 0)?;
        }
        entry.apply(&self.vcpus[0].lock().fd)?;
        self.power_on.irqchip.load(&self.hypervisor.vm)?;
        self.power_on.pit.load(&self.hypervisor.vm)?;
        self.bus.serial.set_state(&SerialState::default())?;
        self.events.set_selector(0);
        for slot in self.devices.slots() {
            slot.reset();
        }
        self.gate.set_pending(None);
        Ok(())
    }

    /// Does what a vCPU of the running guest waits for.
    pub(crate) fn answer(&self) {
        let mut lifecycle = self.lifecycle();
        if lifecycle.state != RunState::Running {
            // Stopped meanwhile; the request stands until the guest goes on.
            return;
        }
        self.hold();
        match self.gate.pending() {
            None => self.go(),
            Some(GuestRequest::PowerOff) => {
                self.shut_down(&mut lifecycle, ShutdownCause::GuestShutdown);
            }
            Some(GuestRequest::Reset) if self.config.on_reset == OnReset::Shutdown => {
                self.shut_down(&mut lifecycle, ShutdownCause::GuestReset);
            }
            Some(GuestRequest::Reset) => match self.switch_on(Occasion::Reset) {
                Ok(()) => {
                    self.emit(MachineEvent::Reset { guest: true });
                    self.go();
                }
                Err(error) => {
                    let reason = format!("the guest cannot be reset: {error}");
                    self.fail(&mut lifecycle, 0, reason);
                }
            },
            Some(GuestRequest::InternalError { vcpu, reason }) => {
                self.fail(&mut lifecycle, vcpu, reason);
            }
        }
    }

    fn shut_down(&self, lifecycle: &mut Lifecycle, cause: ShutdownCause) {
        lifecycle.state = RunState::Shutdown;
        self.emit(MachineEvent::Shutdown { cause });
    }

    /// Gives up a guest that cannot go on.
    pub(crate) fn fail(&self, lifecycle: &mut Lifecycle, vcpu: u32, reason: String) {
        lifecycle.state = RunState::InternalError;
        tracing::error!(vcpu, reason, "the guest cannot go on");
        self.emit(MachineEvent::InternalError { vcpu, reason });
    }
}

pub(crate) fn wrong_state(
    attempted: &'static str,
    state: RunState,
    hint: &'static str,
) -> MachineError {
    MachineError::State {
        attempted,
        state,
        hint,
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gate.set(Wanted::Quit);
        for thread in &self.threads {
            thread.kick();
        }
        for thread in self.threads.drain(..) {
            thread.join();
        }
        let supervisor = self.supervisor.get_mut().map(Option::take);
        if let Ok(Some(supervisor)) = supervisor
            // The supervisor itself may hold the last reference; it ends after this.
            && supervisor.thread().id() != thread::current().id()
            && supervisor.join().is_err()
        {
            tracing::error!("the machine's supervisor has panicked");
        }
    }
}
