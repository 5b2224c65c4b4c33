//! Migration capabilities: what a migration may make use of.

use serde::{Deserialize, Serialize};

/// The capabilities that exist here. Setting another of QEMU's is refused by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationCapability {
    /// MIGRATION and MIGRATION_PASS events are emitted.
    Events,
    /// The destination answers the source. The hand-over relies on it, so a handler should refuse to turn it off.
    ReturnPath,
    /// The migration waits in `pre-switchover`, with the guest stopped, until `migrate-continue`.
    PauseBeforeSwitchover,
    /// A guest with a balloon tells which of its pages are free, and they are not sent.
    #[serde(rename = "x-vmferry-free-page-hints")]
    FreePageHints,
}

/// A capability and whether it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationCapabilityStatus {
    /// Which.
    pub capability: MigrationCapability,
    /// Whether it is on.
    pub state: bool,
}

/// Arguments of `migrate-set-capabilities`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateSetCapabilities {
    /// The capabilities to change; the others stay as they are.
    pub capabilities: Vec<MigrationCapabilityStatus>,
}
