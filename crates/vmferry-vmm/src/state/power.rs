//! A reset or power-off that the guest has asked for and not been given when it was stopped: it happens where it
//! goes on.

use serde::{Deserialize, Serialize};

use super::SectionKind;
use crate::vcpu::GuestRequest;

/// Characters of a reason; one of ours is a fraction of this.
const LONGEST_REASON: usize = 1024;

/// The section of the power state.
pub(crate) const SECTION: SectionKind = SectionKind {
    name: "vmferry/power",
    version: 3,
};

/// What the guest waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PowerState {
    /// Nothing.
    On,
    /// A reset.
    ResetRequested,
    /// To be switched off.
    PowerOffRequested,
    /// To be given up: a vCPU cannot go on. The guest was stopped before its machine had noticed.
    Broken {
        /// Which vCPU.
        vcpu: u32,
        /// Why.
        reason: String,
    },
}

impl From<Option<GuestRequest>> for PowerState {
    fn from(request: Option<GuestRequest>) -> Self {
        match request {
            None => PowerState::On,
            Some(GuestRequest::Reset) => PowerState::ResetRequested,
            Some(GuestRequest::PowerOff) => PowerState::PowerOffRequested,
            Some(GuestRequest::InternalError { vcpu, reason }) => {
                PowerState::Broken { vcpu, reason }
            }
        }
    }
}

impl From<PowerState> for Option<GuestRequest> {
    fn from(state: PowerState) -> Self {
        match state {
            PowerState::On => None,
            PowerState::ResetRequested => Some(GuestRequest::Reset),
            PowerState::PowerOffRequested => Some(GuestRequest::PowerOff),
            PowerState::Broken { vcpu, reason } => Some(GuestRequest::InternalError {
                vcpu,
                // It is printed, and has come from a peer.
                reason: reason
                    .chars()
                    .take(LONGEST_REASON)
                    .flat_map(char::escape_debug)
                    .collect(),
            }),
        }
    }
}
