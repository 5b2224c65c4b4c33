//! Starting, stopping and resetting the guest: by its user, by a migration, by itself.

use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use vm_superio::SerialState;
use vmferry_engine::seam::Activity;

use super::{Machine, MachineEvent, ShutdownCause};
use crate::boot::{Images, Occasion};
use crate::config::OnReset;
use crate::error::MachineError;
use crate::run_state::RunState;
use crate::state::clock::ClockState;
use crate::state::cpu;
use crate::state::machine::Description;
use crate::vcpu::{GuestRequest, Wanted};

/// How long a guest that is to stop may wait for its disks at most: requests that the host has begun have to be complete, and
/// for a migration what was written has to be safe. What takes longer is no delay but a failure.
pub(crate) const STANDSTILL_LIMIT: Duration = Duration::from_secs(5);

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

/// What becomes of a snapshot whose disks have changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChangedDisks {
    /// It is refused: its guest would damage the file systems on them.
    Refuse,
    /// It is taken: the user has said so.
    Accept,
}

/// Which machine the guest is, or may be, run by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// This one, when its user likes.
    ThisMachine,
    /// The guest was handed over. A reset does not change that: it would start the same guest, with the same network
    /// addresses, for a second time.
    AnotherMachine,
}

/// What the machine is doing. Whoever holds the mutex around it is the only one to start or stop the guest.
pub(crate) struct Lifecycle {
    pub state: RunState,
    pub handover: Handover,
    pub owner: Owner,
    /// What a guest that ran on the source does when it arrives here.
    pub on_arrival: Activity,
    /// The machine as its guest knows it; a guest that arrived knows its source's CPU.
    pub description: Description,
    /// Of a guest that is still to arrive.
    pub changed_disks: ChangedDisks,
}

impl Machine {
    /// What the machine is doing.
    pub fn run_state(&self) -> RunState {
        self.lifecycle().state
    }

    /// Returns whether the guest has left, and was not started here again.
    pub fn has_left(&self) -> bool {
        let lifecycle = self.lifecycle();
        lifecycle.state == RunState::PostMigrate || lifecycle.owner == Owner::AnotherMachine
    }

    /// Starts the guest, or lets it go on. Does nothing if it runs. A guest that has not arrived yet will run when it does.
    ///
    /// # Errors
    ///
    /// [`MachineError::HandedOver`] if the guest was handed over to another machine, whether or not it was reset here
    /// since; see [`resume_anyway`](Self::resume_anyway).
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut lifecycle = self.lifecycle();
        match lifecycle.owner {
            Owner::ThisMachine => self.resume_in(&mut lifecycle),
            Owner::AnotherMachine => Err(MachineError::HandedOver),
        }
    }

    /// As [`resume`](Self::resume), also for a guest that was handed over to another machine. Only the user can know
    /// that it does not run there: call this on their explicit word.
    pub fn resume_anyway(&self) -> Result<(), MachineError> {
        self.resume_in(&mut self.lifecycle())
    }

    fn resume_in(&self, lifecycle: &mut Lifecycle) -> Result<(), MachineError> {
        let hint = match lifecycle.state {
            RunState::Running => return Ok(()),
            RunState::Prelaunch | RunState::Paused | RunState::PostMigrate => {
                return self.run(lifecycle);
            }
            RunState::InMigrate => {
                lifecycle.on_arrival = Activity::Running;
                return Ok(());
            }
            RunState::FinishMigrate => {
                "a migration decides on which host it goes on; wait for its end, or cancel it"
            }
            RunState::Shutdown | RunState::InternalError => "reset it first",
        };
        Err(wrong_state("resume the guest", lifecycle.state, hint))
    }

    /// Stops the guest until [`resume`](Self::resume). Does nothing if it does not run. A guest that has not arrived yet
    /// will be paused when it does.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut lifecycle = self.lifecycle();
        let hint = match lifecycle.state {
            RunState::Running => {
                self.try_to_hold(STANDSTILL_LIMIT)?;
                lifecycle.state = RunState::Paused;
                self.emit(MachineEvent::Stop);
                return Ok(());
            }
            RunState::FinishMigrate => {
                "a migration has stopped it already; wait for its end, or cancel it"
            }
            RunState::InMigrate => {
                lifecycle.on_arrival = Activity::Paused;
                return Ok(());
            }
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
                let images = self.images()?;
                self.try_to_hold(STANDSTILL_LIMIT)?;
                self.switch_on_or_fail(&mut lifecycle, images)?;
                self.go();
            }
            _ => {
                self.switch_on_or_fail(&mut lifecycle, self.images()?)?;
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

    /// Takes a guest that arrives from a snapshot even if its disks have changed since.
    pub fn accept_changed_disks(&self) {
        self.lifecycle().changed_disks = ChangedDisks::Accept;
    }

    pub(crate) fn lifecycle(&self) -> MutexGuard<'_, Lifecycle> {
        self.lifecycle
            .lock()
            .expect("no holder of the run state panics")
    }

    /// Lets the vCPUs run, if the machine has its disks to itself; else everything stays as it is.
    pub(crate) fn run(&self, lifecycle: &mut Lifecycle) -> Result<(), MachineError> {
        self.lock_disks()?;
        for vcpu in &self.vcpus {
            // Lets the guest's watchdogs know that time went by, here or on the host before. It fails if the guest has no
            // kvmclock.
            let _ = vcpu.lock().fd.kvmclock_ctrl();
        }
        lifecycle.state = RunState::Running;
        lifecycle.handover = Handover::None;
        lifecycle.owner = Owner::ThisMachine;
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

    pub(crate) fn go(&self) {
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

    /// Stops running vCPUs and devices. Instructions and requests are complete then, and nothing writes to guest memory.
    /// If that takes longer than `limit`, everything goes on instead.
    pub(crate) fn try_to_hold(&self, limit: Duration) -> Result<(), MachineError> {
        self.ask_to_hold();
        let end = Instant::now() + limit;
        // A vCPU may wait for a device.
        if self.gate.held_by(end) && self.devices.held_by(end) {
            return Ok(());
        }
        let busy = self.devices.busy();
        self.go();
        Err(MachineError::Busy(format!(
            "cannot stop the guest: it does not come to a stand within {limit:?}{}",
            match busy.is_empty() {
                true => String::new(),
                false => format!("; requests in flight: {busy}; look at the host's storage"),
            }
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

    /// What the guest starts from.
    pub(super) fn images(&self) -> Result<&Images, MachineError> {
        self.images.as_ref().ok_or_else(|| {
            MachineError::Config(
                "cannot reset the guest: it arrived here without its kernel image; start the destination with the \
                 source's --kernel"
                    .into(),
            )
        })
    }

    /// Starts the guest anew. One for which that fails half-way cannot go on either.
    fn switch_on_or_fail(
        &self,
        lifecycle: &mut Lifecycle,
        images: &Images,
    ) -> Result<(), MachineError> {
        self.switch_on(images, Occasion::Reset)
            .inspect_err(|error| {
                let reason = format!("the guest cannot be reset: {error}");
                self.fail(lifecycle, 0, reason);
            })
    }

    /// Puts the machine into the state in which its kernel starts.
    pub(super) fn switch_on(
        &self,
        images: &Images,
        occasion: Occasion,
    ) -> Result<(), MachineError> {
        let entry = images.load(&self.ram.memory, self.config.memory, occasion)?;
        let features = self.hypervisor.features;
        for (vcpu, power_on) in self.vcpus.iter().zip(&self.power_on.cpus) {
            let inner = vcpu.lock();
            power_on.load_registers(&inner.fd, features, &self.msrs)?;
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

    /// Does what a vCPU of the running guest waits for. False if it has to wait longer, for the guest's disks.
    pub(crate) fn answer(&self) -> bool {
        let mut lifecycle = self.lifecycle();
        if lifecycle.state != RunState::Running {
            // Stopped meanwhile; the request stands until the guest goes on.
            return true;
        }
        if let Err(error) = self.try_to_hold(STANDSTILL_LIMIT) {
            tracing::warn!(%error, "what the guest has asked for has to wait");
            return false;
        }
        match self.gate.pending() {
            None => self.go(),
            Some(GuestRequest::PowerOff) => {
                self.shut_down(&mut lifecycle, ShutdownCause::GuestShutdown);
            }
            Some(GuestRequest::Reset) if self.config.on_reset == OnReset::Shutdown => {
                self.shut_down(&mut lifecycle, ShutdownCause::GuestReset);
            }
            Some(GuestRequest::Reset) => match self.images() {
                Ok(images) => {
                    // The guest's end has been told, if it fails.
                    if self.switch_on_or_fail(&mut lifecycle, images).is_ok() {
                        self.emit(MachineEvent::Reset { guest: true });
                        self.go();
                    }
                }
                Err(error) => self.fail(&mut lifecycle, 0, error.to_string()),
            },
            Some(GuestRequest::InternalError { vcpu, reason }) => {
                self.fail(&mut lifecycle, vcpu, reason);
            }
        }
        true
    }

    fn shut_down(&self, lifecycle: &mut Lifecycle, cause: ShutdownCause) {
        lifecycle.state = RunState::Shutdown;
        self.emit(MachineEvent::Shutdown { cause });
    }

    /// Gives up a guest that cannot go on.
    pub(crate) fn fail(&self, lifecycle: &mut Lifecycle, vcpu: u32, reason: String) {
        // One that is stopped already has told of that.
        if lifecycle.state == RunState::Running {
            self.emit(MachineEvent::Stop);
        }
        lifecycle.state = RunState::InternalError;
        tracing::warn!(vcpu, reason, "the guest cannot go on");
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
