//! What goes over the wire: QEMU 10's names and units, as types.

mod address;
mod announce;
mod as_text;
mod balloon;
mod block;
mod capabilities;
mod dirty_rate;
mod events;
mod machine;
mod migration;
mod parameters;

pub use address::{Migrate, MigrateIncoming, SocketAddress};
pub use announce::AnnounceSelf;
pub use balloon::{Balloon, BalloonChangeData, BalloonInfo};
pub use block::{
    BlockDeviceInfo, BlockInfo, BlockIo, BlockResize, BlockdevCacheInfo, DetectZeroes, ImageInfo,
};
pub use capabilities::{MigrateSetCapabilities, MigrationCapability, MigrationCapabilityStatus};
pub use dirty_rate::{
    CALC_TIME_RANGE, CalcDirtyRate, DirtyRateInfo, DirtyRateMeasureMode, DirtyRateStatus,
    DirtyRateVcpu, QueryDirtyRate, SAMPLE_PAGES_RANGE, TimeUnit,
};
pub use events::{Event, MigrationData, MigrationPassData, ShutdownCause, ShutdownData};
pub use machine::{
    CommandInfo, Cont, CpuInfoFast, CpuInstanceProperties, KvmInfo, NameInfo, RunState, StatusInfo,
    Version, VersionInfo,
};
pub use migration::{
    DirtyTracking, MigrateContinue, MigrationInfo, MigrationRamStats, MigrationStatus, WaitingFor,
};
pub use parameters::{
    ARMING_CHUNK_BYTES, MAX_DOWNTIME_LIMIT_MS, MAX_PEER_TIMEOUT_MS, MigrateSetParameters,
    MigrationParameters,
};
