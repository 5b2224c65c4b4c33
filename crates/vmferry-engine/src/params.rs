//! What a user can set.

use std::time::Duration;

use vmferry_dirty::{ArmingChunk, Discipline};

/// Parameters of a migration. Those marked *live* may be changed while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// How long the guest may stand still for the switch-over: pre-copy goes on until what is left can be sent within
    /// this time, at the rate that the destination was seen to take it. If it then takes longer, the source takes its
    /// guest back after [`pause_bound`](Self::pause_bound). *Live.*
    pub downtime_limit: Duration,
    /// Bytes a second that may be sent while the guest runs; `None` is no limit. *Live.*
    pub max_bandwidth: Option<u64>,
    /// How the dirty bitmap is kept right. Taken when the migration starts.
    pub discipline: Discipline,
    /// How much of the dirty log is armed at a time. Taken when the migration starts.
    pub arming_chunk: ArmingChunk,
    /// How long the other side may make no progress before the migration fails. *Live.*
    pub peer_timeout: Duration,
    /// Ask a guest that can tell for its free pages, and do not send them. Taken when the migration starts.
    pub free_page_hints: bool,
    /// Stop between pausing the guest and sending the last of it, until the user says go. *Live.*
    pub pause_before_switchover: bool,
}

/// A guest stands still for at most this multiple of the downtime limit.
const PAUSE_BOUND: u32 = 3;

/// However short the limit, a pause that is over within this time is not worth a migration.
const SHORTEST_PAUSE_BOUND: Duration = Duration::from_secs(2);

impl Parameters {
    /// How long a guest may stand still before it is given away: three times the downtime limit, and two seconds at least.
    /// Then the source takes it back, and the migration fails. The time in which the migration waits for its user
    /// (`pause_before_switchover`) does not count, nor that in which a one-way stream is completed: a file that gets to
    /// its disk, a command that ends.
    pub fn pause_bound(&self) -> Duration {
        (self.downtime_limit.saturating_mul(PAUSE_BOUND)).max(SHORTEST_PAUSE_BOUND)
    }
}

/// QEMU's defaults, where the parameter is QEMU's.
impl Default for Parameters {
    fn default() -> Self {
        Parameters {
            downtime_limit: Duration::from_millis(300),
            max_bandwidth: None,
            discipline: Discipline::default(),
            arming_chunk: ArmingChunk::default(),
            peer_timeout: Duration::from_secs(10),
            free_page_hints: true,
            pause_before_switchover: false,
        }
    }
}
