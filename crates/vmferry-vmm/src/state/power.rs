//! A reset or power-off that the guest has asked for and not been given when it was stopped: it happens where it
//! goes on.

use serde::{Deserialize, Serialize};

use super::SectionKind;

/// The section of the power state.
pub(crate) const SECTION: SectionKind = SectionKind {
    name: "vmferry/power",
    version: 2,
};

/// What the guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PowerState {
    /// Nothing.
    On,
    /// A reset.
    ResetRequested,
    /// To be switched off.
    PowerOffRequested,
}
