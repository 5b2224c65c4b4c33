//! What goes over the wire: QEMU 10's names and units, as types.

mod address;
mod capabilities;
mod events;
mod machine;
mod migration;
mod parameters;

pub use address::{InvalidUri, Migrate, MigrateIncoming, MigrationAddress};
pub use capabilities::{MigrateSetCapabilities, MigrationCapability, MigrationCapabilityStatus};
pub use events::{Event, MigrationData, MigrationPassData, ShutdownCause, ShutdownData};
pub use machine::{
    CommandInfo, CpuInfoFast, CpuInstanceProperties, KvmInfo, NameInfo, RunState, StatusInfo,
    Version, VersionInfo,
};
pub use migration::{
    BitmapAccounting, MigrateContinue, MigrationInfo, MigrationRamStats, MigrationStatus,
};
pub use parameters::{
    Discipline, MAX_DOWNTIME_LIMIT_MS, MAX_PEER_TIMEOUT_MS, MigrateSetParameters,
    MigrationParameters,
};
