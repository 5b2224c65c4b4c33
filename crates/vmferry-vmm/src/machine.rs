//! A virtual machine as its user sees it.
//!
//! | module | idea |
//! |---|---|
//! | `lifecycle` | starting, stopping and resetting the guest |
//! | `peripherals`, `network` | what there is around it, for its user |
//! | `event` | what its user is told |

use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use kvm_ioctls::Kvm;
use vmferry_dirty::DirtyLog;
use vmferry_engine::seam::Activity;

use crate::acpi::{self, Platform};
use crate::boot::{Images, Occasion};
use crate::config::MachineConfig;
use crate::cpuid;
use crate::devices::{Bus, EventDevice, MmioRange, SerialPort, events};
use crate::dirty_log::{Chosen, DirtyLogKind};
use crate::error::{Attempt, MachineError};
use crate::hypervisor::Hypervisor;
use crate::layout::{EVENT_DEVICE, EVENT_DEVICE_IRQ, SERIAL_IRQ};
use crate::memory::GuestRam;
use crate::run_state::RunState;
use crate::state::cpu::CpuState;
use crate::state::irqchip::{IrqchipState, PitState};
use crate::state::machine::Description;
use crate::state::msrs;
use crate::supervisor;
use crate::vcpu::{Gate, Vcpu, VcpuThread, Wanted};
use crate::virtio::{Announcement, Devices};

mod event;
mod lifecycle;
mod network;
mod peripherals;

pub use event::{MachineEvent, OnEvent, ShutdownCause};
pub(crate) use lifecycle::{
    ChangedDisks, Handover, Lifecycle, Owner, STANDSTILL_LIMIT, wrong_state,
};
pub use peripherals::{BalloonInfo, DiskInfo, VcpuInfo};

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
                owner: Owner::ThisMachine,
                on_arrival: Activity::Running,
                description: offers.clone(),
                changed_disks: ChangedDisks::Refuse,
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
            machine.switch_on(machine.images()?, Occasion::PowerOn)?;
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

    pub(crate) fn emit(&self, event: MachineEvent) {
        (self.on_event)(event);
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
