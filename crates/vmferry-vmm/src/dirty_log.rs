//! Which of KVM's dirty logs a machine has. KVM wants to know before the first vCPU is created.

use std::fmt;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmferry_dirty::DirtyLog;
use vmferry_dirty::log::{
    KvmDirtyLog, KvmDirtyRing, KvmDirtyRings, KvmSlot, LogError, VmmWriteLog, WithVmmWrites,
};

use crate::config::DirtyLogChoice;
use crate::vcpu::Vcpu;

/// The dirty log that a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyLogKind {
    /// KVM's bitmaps, one a memory slot.
    Log,
    /// KVM's rings, one a vCPU.
    Ring {
        /// Entries of each ring.
        entries: u32,
    },
}

impl fmt::Display for DirtyLogKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DirtyLogKind::Log => f.write_str("log"),
            DirtyLogKind::Ring { entries } => write!(f, "ring:{entries}"),
        }
    }
}

/// A log that was chosen, of a machine that has no vCPUs yet.
pub(crate) enum Chosen {
    Log(Arc<VmFd>),
    Ring(KvmDirtyRings),
}

/// A machine's log, on KVM's side.
pub(crate) enum KvmLog {
    Log(KvmDirtyLog),
    Ring(KvmDirtyRing),
}

impl Chosen {
    /// Makes the choice come true as far as that can be before there are vCPUs.
    pub fn new(choice: DirtyLogChoice, vm: &Arc<VmFd>) -> Result<Self, LogError> {
        match choice {
            DirtyLogChoice::Auto | DirtyLogChoice::Log => Ok(Chosen::Log(vm.clone())),
            DirtyLogChoice::Ring(size) => KvmDirtyRings::enable(vm.clone(), size).map(Chosen::Ring),
        }
    }

    /// Completes the log.
    ///
    /// # Safety
    ///
    /// The slots must be registered with the virtual machine as described, without flags, and stay registered, and
    /// their memory mapped, while the returned value lives.
    pub unsafe fn complete(
        self,
        slots: Vec<KvmSlot>,
        vcpus: &[Arc<Vcpu>],
    ) -> Result<KvmLog, LogError> {
        match self {
            // SAFETY: passed on to the caller.
            Chosen::Log(vm) => unsafe { KvmDirtyLog::new(vm, slots) }.map(KvmLog::Log),
            Chosen::Ring(rings) => {
                let vcpus: Vec<_> = vcpus.iter().map(|vcpu| vcpu.lock()).collect();
                let fds: Vec<_> = vcpus.iter().map(|vcpu| &vcpu.fd).collect();
                // SAFETY: passed on to the caller.
                unsafe { rings.into_log(slots, &fds) }.map(KvmLog::Ring)
            }
        }
    }
}

impl KvmLog {
    pub fn kind(&self) -> DirtyLogKind {
        match self {
            KvmLog::Log(_) => DirtyLogKind::Log,
            KvmLog::Ring(ring) => DirtyLogKind::Ring {
                entries: ring.size().entries(),
            },
        }
    }

    /// What vCPUs call on when their ring is full.
    pub fn ring(&self) -> Option<KvmDirtyRing> {
        match self {
            KvmLog::Log(_) => None,
            KvmLog::Ring(ring) => Some(ring.clone()),
        }
    }

    /// The log together with the VMM's own writes.
    pub fn with(self, writes: Vec<Arc<VmmWriteLog>>) -> Box<dyn DirtyLog> {
        match self {
            KvmLog::Log(log) => Box::new(WithVmmWrites::new(log, writes)),
            KvmLog::Ring(ring) => Box::new(WithVmmWrites::new(ring, writes)),
        }
    }
}
