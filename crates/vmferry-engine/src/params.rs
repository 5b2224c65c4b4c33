//! What a user can set.

use std::time::Duration;

use vmferry_dirty::{ArmingChunk, Discipline};

/// Parameters of a migration. Those marked *live* may be changed while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// How long the guest may stand still for the switch-over. *Live.*
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
