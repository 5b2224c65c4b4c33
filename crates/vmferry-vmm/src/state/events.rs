//! Events that the guest was told of and has not looked at: that its power button was pressed.

use serde::{Deserialize, Serialize};

use super::SectionKind;

/// The section of the generic event device.
pub(crate) const SECTION: SectionKind = SectionKind {
    name: "vmferry/acpi-ged",
    version: 1,
};

/// The device's registers. The others keep nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EventState {
    pub selector: u32,
}
