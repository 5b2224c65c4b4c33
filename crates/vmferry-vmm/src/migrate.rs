//! The machine as the migration engine sees it.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vm_superio::SerialState;
use vmferry_dirty::DirtyLog;
use vmferry_engine::seam::{
    Activity, Departure, DeviceState, FreePageHinting, Guest, GuestError, PauseError, RamBlock,
};

use crate::cpuid;
use crate::error::MachineError;
use crate::machine::{
    ChangedDisks, Handover, Lifecycle, Machine, MachineEvent, Owner, STANDSTILL_LIMIT, wrong_state,
};
use crate::run_state::RunState;
use crate::state::Sections;
use crate::state::clock::{self, ClockState};
use crate::state::cpu::{self, CpuState};
use crate::state::events::{self, EventState};
use crate::state::irqchip::{IRQCHIP, IrqchipState, PIT, PitState};
use crate::state::machine::{self as description, Description};
use crate::state::power::{self, PowerState};
use crate::state::serial::{self, SavedSerial};
use crate::state::virtio;
use crate::vcpu::GuestRequest;
use crate::virtio::{BalloonPort, Comparison, Disk, SavedTransport, Settled};

/// Bytes of a description; that of the largest machine is a fraction of this.
const LONGEST_DESCRIPTION: usize = 64 << 10;

impl Guest for Machine {
    fn ram(&self) -> &[RamBlock] {
        &self.ram.blocks
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &*self.log
    }

    fn free_page_hinting(&self) -> Option<&dyn FreePageHinting> {
        self.devices.balloon().and_then(BalloonPort::hinting)
    }

    fn describe(&self) -> Result<DeviceState, GuestError> {
        let description = Description {
            // The size of a disk may be another one by now.
            devices: self.devices.describe(&self.config),
            ..self.lifecycle().description.clone()
        };
        description::SECTION.encode(0, &description)
    }

    fn check_description(&self, source: &DeviceState) -> Result<(), GuestError> {
        let kind = description::SECTION;
        if source.idstr != kind.name || source.instance_id != 0 {
            return Err(GuestError(format!(
                "the source describes a '{}' where a '{}' was expected: it is not a vmferry machine",
                source.idstr.escape_debug(),
                kind.name
            )));
        }
        // Known before a list in it takes many times its length here.
        if source.data.len() > LONGEST_DESCRIPTION {
            return Err(GuestError(format!(
                "the source's description has {} bytes, {LONGEST_DESCRIPTION} are possible: it is not a vmferry machine",
                source.data.len()
            )));
        }
        let source: Description = kind.decode(source)?;
        for disk in self.devices.disks() {
            disk.take_image_size().map_err(GuestError::new)?;
        }
        let offers = Description {
            devices: self.devices.describe(&self.config),
            ..self.offers.clone()
        };
        offers
            .accepts(&source, self.hypervisor.features.tsc_scaling)
            .map_err(GuestError::new)
    }

    /// Most of what the disks' guest has written is safe before it stands still; the rest follows when it does.
    fn prepare_pause(&self) -> Result<(), GuestError> {
        settle(self.devices.disks(), None).map_err(GuestError::new)
    }

    fn pause(&self, limit: Duration) -> Result<Activity, PauseError> {
        let mut lifecycle = self.lifecycle();
        let before = lifecycle.state;
        let (activity, hint) = match before {
            RunState::Running => (Activity::Running, ""),
            _ if lifecycle.owner == Owner::AnotherMachine => {
                (Activity::Paused, "it has left already")
            }
            RunState::Prelaunch | RunState::Paused => (Activity::Paused, ""),
            RunState::PostMigrate => (Activity::Paused, "it has left already"),
            RunState::FinishMigrate => (Activity::Paused, "another migration has stopped it"),
            RunState::InMigrate => (Activity::Paused, "it has not arrived here yet"),
            RunState::Shutdown | RunState::InternalError => (Activity::Paused, "reset it first"),
        };
        if !hint.is_empty() {
            let error = wrong_state("migrate the guest", before, hint);
            return Err(GuestError::new(error).into());
        }
        let limit = limit.min(STANDSTILL_LIMIT);
        let end = Instant::now() + limit;
        if activity == Activity::Running {
            self.try_to_hold(limit).map_err(pause_error)?;
            if let Some(GuestRequest::InternalError { vcpu, reason }) = self.gate.pending() {
                let why = GuestError(format!("cannot migrate the guest: vCPU {vcpu}: {reason}"));
                self.fail(&mut lifecycle, vcpu, reason);
                return Err(why.into());
            }
        }
        // Nothing is in flight, so what was not flushed yet is all that there will be.
        let clocks = settle(self.devices.disks(), Some(end)).and_then(|()| self.read_clocks());
        match clocks {
            Ok(clocks) => {
                lifecycle.state = RunState::FinishMigrate;
                lifecycle.handover = Handover::Leaving { before, clocks };
                if activity == Activity::Running {
                    self.emit(MachineEvent::Stop);
                }
                Ok(activity)
            }
            Err(error) => {
                if activity == Activity::Running {
                    self.go();
                }
                Err(pause_error(error))
            }
        }
    }

    fn resume(&self, was: Activity) -> Result<(), GuestError> {
        let mut lifecycle = self.stays()?;
        match was {
            Activity::Running => self.run(&mut lifecycle),
            Activity::Paused => self.lock_disks(),
        }
        .map_err(GuestError::new)
    }

    fn resume_in_doubt(&self) -> Result<(), GuestError> {
        self.stays().map(drop)
    }

    fn left(&self, how: Departure) {
        let mut lifecycle = self.lifecycle();
        if lifecycle.state != RunState::FinishMigrate {
            // The user has ended it meanwhile.
            return;
        }
        lifecycle.state = RunState::PostMigrate;
        lifecycle.handover = Handover::None;
        lifecycle.owner = match how {
            Departure::HandedOver => Owner::AnotherMachine,
            Departure::Written => Owner::ThisMachine,
        };
    }

    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError> {
        let lifecycle = self.lifecycle();
        let Handover::Leaving { clocks, .. } = &lifecycle.handover else {
            let hint = "no migration has stopped it";
            let error = wrong_state("save the guest's state", lifecycle.state, hint);
            return Err(GuestError::new(error));
        };
        let mut sections = Vec::with_capacity(self.vcpus.len() + 6 + self.devices.slots().len());
        let features = self.hypervisor.features;
        for vcpu in &self.vcpus {
            let failed = |e: MachineError| cpu::SECTION.error(vcpu.index, "save", e);
            let state = CpuState::save(&vcpu.lock(), features, &self.msrs).map_err(failed)?;
            sections.push(cpu::SECTION.encode(vcpu.index, &state)?);
        }
        let vm = &self.hypervisor.vm;
        let irqchip = IrqchipState::save(vm).map_err(|e| IRQCHIP.error(0, "save", e))?;
        sections.push(IRQCHIP.encode(0, &irqchip)?);
        let pit = PitState::save(vm).map_err(|e| PIT.error(0, "save", e))?;
        sections.push(PIT.encode(0, &pit)?);
        sections.push(clock::SECTION.encode(0, clocks)?);
        let serial = SavedSerial::from(self.bus.serial.state());
        sections.push(serial::SECTION.encode(0, &serial)?);
        let events = EventState {
            selector: self.events.selector(),
        };
        sections.push(events::SECTION.encode(0, &events)?);
        let power = PowerState::from(self.gate.pending());
        sections.push(power::SECTION.encode(0, &power)?);
        for (number, slot) in (0..).zip(self.devices.slots()) {
            sections.push(virtio::section(slot.kind()).encode(number, &slot.save())?);
        }
        // From here on the destination may need the disks. Whoever lets the guest go on, here or there, locks them
        // first.
        for disk in self.devices.disks() {
            disk.unlock().map_err(GuestError::new)?;
        }
        Ok(sections)
    }

    fn load_devices(&self, states: &[DeviceState]) -> Result<(), GuestError> {
        let mut lifecycle = self.lifecycle();
        if !matches!(
            lifecycle.state,
            RunState::InMigrate | RunState::FinishMigrate
        ) {
            let hint = "the machine was not started to receive a guest";
            let error = wrong_state("receive a guest", lifecycle.state, hint);
            return Err(GuestError::new(error));
        }
        // Everything is decoded before anything is changed.
        let mut sections = Sections::new(states);
        let cpus = self
            .vcpus
            .iter()
            .map(|vcpu| sections.take::<CpuState>(cpu::SECTION, vcpu.index))
            .collect::<Result<Vec<_>, _>>()?;
        let irqchip: IrqchipState = sections.take(IRQCHIP, 0)?;
        let pit: PitState = sections.take(PIT, 0)?;
        let clocks: ClockState = sections.take(clock::SECTION, 0)?;
        let serial: SavedSerial = sections.take(serial::SECTION, 0)?;
        let events: EventState = sections.take(events::SECTION, 0)?;
        let power: PowerState = sections.take(power::SECTION, 0)?;
        let devices = (0..)
            .zip(self.devices.slots())
            .map(|(number, slot)| {
                sections.take::<SavedTransport>(virtio::section(slot.kind()), number)
            })
            .collect::<Result<Vec<_>, _>>()?;
        sections.finish()?;
        // Better now than when the source has given the guest away; but the locks are not taken before it has.
        for disk in self.devices.disks() {
            disk.check_lock().map_err(GuestError::new)?;
        }
        let features = self.hypervisor.features;
        let tables: Vec<_> = cpus.iter().map(CpuState::cpuid).collect();
        cpuid::accept(&tables, self.config.cpus, &self.offers.cpuid)
            .map_err(|why| GuestError(format!("cannot load the guest's vCPUs: {why}")))?;
        for (vcpu, state) in self.vcpus.iter().zip(&cpus) {
            state
                .check(&self.msrs)
                .map_err(|e| cpu::SECTION.error(vcpu.index, "load", e))?;
        }
        irqchip.check().map_err(|e| IRQCHIP.error(0, "load", e))?;
        pit.check().map_err(|e| PIT.error(0, "load", e))?;
        clocks
            .check(self.vcpus.len())
            .and_then(|()| {
                self.offers
                    .accepts_tsc(clocks.tsc_khz(), features.tsc_scaling)
            })
            .map_err(|e| clock::SECTION.error(0, "load", e))?;

        for (vcpu, state) in self.vcpus.iter().zip(&cpus) {
            let failed = |e: MachineError| cpu::SECTION.error(vcpu.index, "load", e);
            let mut vcpu = vcpu.lock();
            if features.tsc_scaling {
                clocks
                    .set_frequency(&vcpu.fd)
                    .map_err(|e| clock::SECTION.error(0, "load", e))?;
            }
            state
                .load(&mut vcpu, features, &self.msrs)
                .map_err(failed)?;
        }
        let vm = &self.hypervisor.vm;
        irqchip.load(vm).map_err(|e| IRQCHIP.error(0, "load", e))?;
        pit.load(vm).map_err(|e| PIT.error(0, "load", e))?;
        self.bus
            .serial
            .set_state(&SerialState::from(serial))
            .map_err(|e| serial::SECTION.error(0, "load", e))?;
        self.events.set_selector(events.selector);
        for (number, (slot, saved)) in (0..).zip(self.devices.slots().iter().zip(&devices)) {
            let failed = |e| virtio::section(slot.kind()).error(number, "load", e);
            slot.load(saved).map_err(failed)?;
        }
        self.gate.set_pending(power.into());

        lifecycle.description = Description {
            tsc_khz: clocks.tsc_khz(),
            cpuid: cpus[0].cpuid().to_vec(),
            ..self.offers.clone()
        };
        lifecycle.handover = Handover::Arrived {
            clocks,
            tsc_deadlines: cpus.iter().map(CpuState::tsc_deadline).collect(),
        };
        Ok(())
    }

    fn check_snapshot(&self) -> Result<(), GuestError> {
        for disk in self.devices.disks() {
            match disk.compare_with_arrived().map_err(GuestError::new)? {
                None | Some(Comparison::Same) => {}
                Some(Comparison::Unknown) => tracing::warn!(
                    id = disk.id(),
                    path = %disk.path().display(),
                    "a block device does not tell whether it has changed since the snapshot: a guest damages its file \
                     system if it goes on with a disk that has"
                ),
                Some(Comparison::Changed) => self.hear_of_changed_disk(disk)?,
            }
        }
        Ok(())
    }

    fn start(&self, activity: Activity, paused_for: Duration) -> Result<(), GuestError> {
        // Should the start fail, the guest stays here, its user's to start.
        let mut lifecycle = self.arrives(paused_for)?;
        match (activity, lifecycle.on_arrival) {
            (Activity::Running, Activity::Running) => self.run(&mut lifecycle),
            _ => self.lock_disks(),
        }
        .map_err(GuestError::new)
    }

    fn start_in_doubt(&self, paused_for: Duration) -> Result<(), GuestError> {
        self.arrives(paused_for).map(drop)
    }
}

/// Makes everything safe that the guest has written so far, on all disks at the same time, until `end` at the latest if
/// there is one. A flush that takes longer goes on, and harms nobody.
fn settle(disks: &[Arc<Disk>], end: Option<Instant>) -> Result<(), MachineError> {
    let wanted = disks
        .iter()
        .map(Disk::begin_to_settle)
        .collect::<Result<Vec<_>, _>>()?;
    let mut busy = Vec::new();
    for (disk, wanted) in disks.iter().zip(wanted) {
        match disk.settled_by(wanted, end)? {
            Settled::Safe => {}
            Settled::NotYet => busy.push(format!("'{}' ({})", disk.id(), disk.path().display())),
        }
    }
    match busy.is_empty() {
        true => Ok(()),
        false => Err(MachineError::Busy(format!(
            "cannot stop the guest: what it has written to its disks is not safe in time; flushes under way: {}; look \
             at the host's storage",
            busy.join(", ")
        ))),
    }
}

fn pause_error(error: MachineError) -> PauseError {
    match error {
        MachineError::Busy(why) => PauseError::Busy(why),
        error => GuestError::new(error).into(),
    }
}

impl Machine {
    /// A disk has changed since the snapshot was taken that has arrived.
    fn hear_of_changed_disk(&self, disk: &Disk) -> Result<(), GuestError> {
        let (id, path) = (disk.id(), disk.path().display());
        match self.lifecycle().changed_disks {
            ChangedDisks::Accept => {
                tracing::warn!(id, %path, "a disk has changed since the snapshot, and is taken all the same");
                Ok(())
            }
            ChangedDisks::Refuse => Err(GuestError(format!(
                "the disk '{id}' ({path}) has changed since this snapshot was taken, and its guest would damage the file \
                 system on it: put the image of that time back (a copy must keep its time, as with 'cp -a'), or take the \
                 disk as it is with --allow-changed-disks"
            ))),
        }
    }

    /// Has a guest stay that a migration has stopped. It does not go on yet, and its disks are nobody's.
    fn stays(&self) -> Result<MutexGuard<'_, Lifecycle>, GuestError> {
        let mut lifecycle = self.lifecycle();
        let Handover::Leaving { before, .. } = lifecycle.handover else {
            let hint = "no migration has stopped it here";
            let error = wrong_state("let the guest go on", lifecycle.state, hint);
            return Err(GuestError::new(error));
        };
        // Where it does not go on at once, it is its user's to start.
        lifecycle.state = match before {
            RunState::Running => RunState::Paused,
            state => state,
        };
        lifecycle.handover = Handover::None;
        Ok(lifecycle)
    }

    /// Completes a guest whose state is in place. It does not run yet, and its disks are nobody's.
    fn arrives(&self, paused_for: Duration) -> Result<MutexGuard<'_, Lifecycle>, GuestError> {
        let mut lifecycle = self.lifecycle();
        let Handover::Arrived {
            clocks,
            tsc_deadlines,
        } = &lifecycle.handover
        else {
            let hint = "no guest's state has arrived here";
            let error = wrong_state("start the guest", lifecycle.state, hint);
            return Err(GuestError::new(error));
        };
        self.set_clocks(clocks, paused_for, tsc_deadlines)
            .map_err(|e| clock::SECTION.error(0, "load", e))?;
        lifecycle.state = RunState::Paused;
        lifecycle.handover = Handover::None;
        for disk in self.devices.disks() {
            disk.forget_cache();
        }
        self.announce_arrival();
        Ok(lifecycle)
    }

    fn read_clocks(&self) -> Result<ClockState, MachineError> {
        let vcpus: Vec<_> = self.vcpus.iter().map(|vcpu| vcpu.lock()).collect();
        ClockState::save(&self.hypervisor.vm, vcpus.iter().map(|vcpu| &vcpu.fd))
    }

    fn set_clocks(
        &self,
        clocks: &ClockState,
        later: Duration,
        tsc_deadlines: &[u64],
    ) -> Result<(), MachineError> {
        let vcpus: Vec<_> = self.vcpus.iter().map(|vcpu| vcpu.lock()).collect();
        let fds: Vec<&VcpuFd> = vcpus.iter().map(|vcpu| &vcpu.fd).collect();
        clocks.load(later, &self.hypervisor.vm, fds.iter().copied())?;
        for (fd, deadline) in fds.iter().zip(tsc_deadlines) {
            cpu::set_tsc_deadline(fd, *deadline)?;
        }
        Ok(())
    }
}
