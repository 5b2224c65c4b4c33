//! A migration's state and its numbers.

use serde::{Deserialize, Serialize};

use vmferry_engine::Discipline;

use super::{SocketAddress, as_text};

/// QEMU's migration states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// No migration ever happened.
    None,
    /// Connects and prepares.
    Setup,
    /// Was told to stop and is about to.
    Cancelling,
    /// Was told to stop and did.
    Cancelled,
    /// Sends RAM while the guest runs.
    Active,
    /// Post-copy: the guest runs on the destination, pages follow.
    PostcopyActive,
    /// Post-copy lost its connection.
    PostcopyPaused,
    /// Post-copy gets a new connection.
    PostcopyRecoverSetup,
    /// Post-copy goes on over a new connection.
    PostcopyRecover,
    /// Done.
    Completed,
    /// Failed; `error-desc` says why.
    Failed,
    /// The VM is in fault-tolerance lock-step.
    Colo,
    /// Paused before the hand-over, until `migrate-continue`.
    PreSwitchover,
    /// The hand-over: the guest is stopped, device state is sent.
    Device,
    /// Waits for the guest to let go of a device.
    WaitUnplug,
}

/// Arguments of `migrate-continue`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateContinue {
    /// The state that the migration is expected to wait in.
    pub state: MigrationStatus,
}

/// Answer to `query-migrate`. Everything is absent on a VM that never migrated.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// The state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<MigrationStatus>,
    /// RAM accounting, from when the migration is active.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<MigrationRamStats>,
    /// Milliseconds since the migration began, or that it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Milliseconds of downtime to expect if the guest were stopped now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// Milliseconds that the guest stood still, once the migration is completed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// Milliseconds that the preparation took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// Why the migration failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// Why this VM cannot be migrated, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_reasons: Option<Vec<String>>,
    /// Where a destination listens, from [`SocketAddress::list`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_address: Option<Vec<SocketAddress>>,
    /// Microseconds that the guest stood still: `downtime`, more finely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_vmferry_downtime_us: Option<u64>,
    /// The discipline that the dirty bitmap is cleared by.
    #[serde(with = "as_text::option", skip_serializing_if = "Option::is_none")]
    pub x_vmferry_discipline: Option<Discipline>,
    /// What dirty tracking has cost the migration thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_vmferry_dirty_tracking: Option<DirtyTracking>,
    /// Bandwidth measured over the last pass, in bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_vmferry_bandwidth: Option<u64>,
    /// What the migration waits for at the moment; absent while it works.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_vmferry_waiting_for: Option<WaitingFor>,
}

/// A wait of a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct WaitingFor {
    /// Its name, for programs: that of a [`Wait`](vmferry_engine::Wait). Later versions may have more of them.
    pub name: String,
    /// The same for people; completes "the migration waits for ...".
    pub description: String,
    /// Milliseconds since it began.
    pub time: u64,
}

/// Time that the migration thread has spent on dirty tracking, out of `total-time`. All in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyTracking {
    /// Taking dirty pages out of the bitmap, waiting for its lock included.
    pub bitmap_us: u64,
    /// Arming the dirty log.
    pub arming_us: u64,
    /// Fetching the dirty log and merging it into the bitmap.
    pub sync_us: u64,
}

/// RAM accounting of a migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationRamStats {
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes that are still to be sent, as of now.
    pub remaining: u64,
    /// Bytes of RAM.
    pub total: u64,
    /// Pages sent as a single repeated byte.
    pub duplicate: u64,
    /// Pages sent whole.
    pub normal: u64,
    /// Bytes of the pages sent whole.
    pub normal_bytes: u64,
    /// Pages dirtied per second by the guest.
    pub dirty_pages_rate: u64,
    /// Throughput, in megabits (10^6) per second.
    pub mbps: f64,
    /// Times the dirty log was fetched.
    pub dirty_sync_count: u64,
    /// Pages that post-copy's destination asked for.
    pub postcopy_requests: u64,
    /// Bytes per page.
    pub page_size: u64,
    /// Bytes sent over multifd channels.
    pub multifd_bytes: u64,
    /// Pages sent per second.
    pub pages_per_second: u64,
    /// Bytes sent while the guest ran, before the hand-over.
    pub precopy_bytes: u64,
    /// Bytes sent while the guest stood still.
    pub downtime_bytes: u64,
    /// Bytes sent after the hand-over.
    pub postcopy_bytes: u64,
    /// Times that zero-copy sending fell back to copying.
    pub dirty_sync_missed_zero_copy: u64,
    /// Pages not sent because the guest said that it does not use them.
    pub x_vmferry_hinted_pages: u64,
}
