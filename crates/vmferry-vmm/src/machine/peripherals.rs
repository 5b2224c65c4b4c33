//! The machine's vCPUs, disks, balloon and power button, for its user.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::MutexGuard;

use super::lifecycle::{Lifecycle, STANDSTILL_LIMIT, wrong_state};
use super::{Machine, MachineEvent};
use crate::config::{Access, Caching};
use crate::error::MachineError;
use crate::run_state::RunState;
use crate::virtio::{BalloonPort, Disk, DiskIo};

/// A vCPU, for its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuInfo {
    /// Its number.
    pub index: u32,
    /// The kernel's number of its thread.
    pub thread_id: i32,
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
    /// Its size, as the guest knows it.
    pub bytes: u64,
    /// Whether this machine holds its lock: no other may write to it.
    pub locked: bool,
}

/// A balloon, for its user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonInfo {
    /// Bytes of RAM that the guest has left.
    pub actual: u64,
    /// What the guest last told of its memory, by QEMU's names.
    pub statistics: BTreeMap<&'static str, u64>,
}

impl Machine {
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
            locked: disk.is_locked(),
        };
        self.devices.disks_and_io().map(info).collect()
    }

    /// The name of the disk whose image is at `path`, by whatever name.
    pub fn disk_at(&self, path: &Path) -> Option<String> {
        let disks = self.devices.disks().iter();
        let mut here = disks.filter(|disk| disk.is_at(path));
        here.next().map(|disk| disk.id().to_owned())
    }

    /// Gives a disk another size, and tells the guest of it. An image that is a file is cut or made longer; what is cut off
    /// is lost.
    ///
    /// # Errors
    ///
    /// There is no such disk, or it cannot have this size. A guest whose devices do not come to a stand goes on as it was.
    pub fn resize_disk(&self, id: &str, bytes: u64) -> Result<(), MachineError> {
        let lifecycle = self.expect_here(
            "resize the guest's disk",
            "it has left; resize it where it is",
        )?;
        let (disk, slot) = self
            .devices
            .disk(id)
            .ok_or_else(|| MachineError::Config(format!("there is no disk '{id}'")))?;
        let runs = lifecycle.state == RunState::Running;
        if runs {
            // A write in flight could make a file longer again.
            self.try_to_hold(STANDSTILL_LIMIT)?;
        }
        let resized = disk.resize(bytes);
        if runs {
            self.go();
        }
        resized?;
        slot.config_changed();
        Ok(())
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
        let _here = self.expect_here(
            "ask the guest for memory",
            "it has left; ask it where it is",
        )?;
        balloon.set_target(bytes);
        Ok(())
    }

    /// Presses the power button. What follows is up to the guest: an operating system shuts down.
    pub fn power_button(&self) -> Result<(), MachineError> {
        let attempted = "press the guest's power button";
        let _here = self.expect_here(attempted, "it has left; press the button where it is")?;
        self.events.press_power_button();
        self.emit(MachineEvent::PowerButton);
        Ok(())
    }

    /// Holds the run state for what needs a guest that is here, whether it runs or not. `gone` is what to do if it has
    /// left.
    fn expect_here(
        &self,
        attempted: &'static str,
        gone: &'static str,
    ) -> Result<MutexGuard<'_, Lifecycle>, MachineError> {
        let lifecycle = self.lifecycle();
        let hint = match lifecycle.state {
            RunState::Running | RunState::Prelaunch | RunState::Paused => return Ok(lifecycle),
            RunState::FinishMigrate => "wait for the end of the migration, or cancel it",
            RunState::InMigrate => "it has not arrived yet; wait for the incoming migration",
            RunState::PostMigrate => gone,
            RunState::Shutdown | RunState::InternalError => "it has stopped for good",
        };
        Err(wrong_state(attempted, lifecycle.state, hint))
    }
}
