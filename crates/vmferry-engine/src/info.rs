//! Figures of a migration, for those who watch it.

use std::time::Duration;

use vmferry_dirty::Discipline;

use crate::status::Status;
use crate::transport::Uri;
use crate::wait::Waiting;

/// A snapshot of a migration's figures. All counts are totals since its start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Info {
    /// What it is doing.
    pub status: Status,
    /// What it waits for, if it does not work at the moment.
    pub waiting: Option<Waiting>,
    /// Why it failed, when it has.
    pub error: Option<String>,
    /// Where a destination listens, once it does.
    pub listening: Option<Uri>,
    /// Time since the start; of a finished migration, all it took.
    pub total_time: Duration,
    /// Time until the first page was sent.
    pub setup_time: Duration,
    /// How long the guest stood still; known at the end.
    pub downtime: Option<Duration>,
    /// How long it would stand still if the switch-over came now, as measured so far; `None` before anything is.
    pub expected_downtime: Option<Duration>,
    /// The guest's RAM.
    pub ram: RamInfo,
    /// How the dirty bitmap is kept right (source only).
    pub discipline: Option<Discipline>,
    /// What dirty tracking costs the migration thread (source only).
    pub tracking: TrackingInfo,
    /// Bytes a second that the channel takes, as measured (0: not yet).
    pub bandwidth: u64,
}

/// Time that the migration thread has spent on dirty tracking. Divide by [`Info::total_time`] for its share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrackingInfo {
    /// Finding dirty pages in the bitmap and taking them, with the wait for a lock if the discipline has one.
    pub bitmap: Duration,
    /// Arming the dirty log, chunk by chunk.
    pub arming: Duration,
    /// Fetching the dirty log and merging it, and switching it on.
    pub sync: Duration,
}

/// The part of [`Info`] that is about RAM.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RamInfo {
    /// Bytes of all RAM blocks.
    pub total: u64,
    /// Bytes of the stream so far, with everything in it.
    pub transferred: u64,
    /// Bytes of the pages that must still be sent.
    pub remaining: u64,
    /// Pages that were all zero, and not sent as data.
    pub duplicate: u64,
    /// Pages sent as data.
    pub normal: u64,
    /// Pages that were not sent because the guest said that it does not use them. A page counts each time that it was
    /// dirty and free.
    pub hinted: u64,
    /// Pages a second that the guest dirtied, between the last two syncs.
    pub dirty_pages_rate: u64,
    /// Pages a second that were sent, in the last pass.
    pub pages_per_second: u64,
    /// How often the dirty log was fetched.
    pub dirty_sync_count: u64,
    /// Bytes of the stream sent while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes of the stream sent while it was paused.
    pub downtime_bytes: u64,
}

/// Is told what happens, as it happens and in that order. Called from the migration's own thread, or from the
/// one that starts or cancels it: be quick, and do not steer the migration from in here.
pub trait Observer: Send + Sync {
    /// The migration has entered a state.
    fn status(&self, status: Status);
    /// The dirty log was fetched for the `number`th time: a pass over the bitmap begins.
    fn pass(&self, number: u64);
}
