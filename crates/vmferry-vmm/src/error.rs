//! Why a machine could not do what it was asked.

use std::io;

use vmferry_dirty::LogError;

use crate::boot::BootError;
use crate::run_state::RunState;

/// What was attempted, on what, why it failed and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration asks for something that cannot be.
    #[error("{0}")]
    Config(String),
    /// KVM refused an operation.
    #[error("KVM cannot {action}: {source}")]
    Kvm {
        /// What was attempted, as a verb phrase ("create a vCPU").
        action: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// The operating system refused an operation.
    #[error("cannot {action}: {source}")]
    Os {
        /// What was attempted, as a verb phrase ("map 1024 MiB of guest memory").
        action: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel image cannot be started.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The dirty log cannot be set up.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The machine is in the wrong state for the request.
    #[error("cannot {attempted} while the guest is in state '{state}': {hint}")]
    State {
        /// What was asked for, as a verb phrase ("resume the guest").
        attempted: &'static str,
        /// The state that the machine is in.
        state: RunState,
        /// What the user can do.
        hint: &'static str,
    },
    /// The guest was handed over to another machine.
    #[error(
        "cannot resume the guest: it was handed over to another machine, which runs it or may start it at any time, and a \
         guest that runs twice damages its disks and its network"
    )]
    HandedOver,
    /// Another process uses a disk.
    #[error("{0}")]
    Locked(String),
    /// The guest's devices do not come to a stand.
    #[error("{0}")]
    Busy(String),
    /// State that was saved elsewhere does not fit this machine.
    #[error("{0}")]
    Misfit(String),
}

/// Names what was attempted in an error of KVM.
pub(crate) trait Attempt<T> {
    fn attempt(self, action: &'static str) -> Result<T, MachineError>;
}

impl<T> Attempt<T> for Result<T, kvm_ioctls::Error> {
    fn attempt(self, action: &'static str) -> Result<T, MachineError> {
        self.map_err(|source| MachineError::Kvm { action, source })
    }
}
