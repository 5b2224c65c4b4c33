//! What a migration is doing, in QEMU's words.

use std::fmt;

/// State of a migration, on either side.
///
/// ```text
///  source:       none -> setup -> active -> [pre-switchover] -> device -> completed
///                          |        |             |               |
///                          +--------+------+------+---------------+---> failed       (any error)
///                                          +--> cancelling --> cancelled             (its user)
///  destination:  none -> setup -> active -> device -> completed, or failed
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// Nothing has happened yet.
    #[default]
    None,
    /// Connecting (source), or waiting for the source (destination).
    Setup,
    /// RAM is being copied while the guest runs.
    Active,
    /// The guest is paused, and waits for `migrate-continue` (capability `pause-before-switchover`).
    PreSwitchover,
    /// The guest is paused; the last pages and the device state are on their way.
    Device,
    /// The guest belongs to the destination.
    Completed,
    /// The migration ended with an error.
    Failed,
    /// The user's wish to cancel is being carried out.
    Cancelling,
    /// Cancelled; the guest is as it was.
    Cancelled,
}

impl Status {
    /// QEMU's name of the state.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::None => "none",
            Status::Setup => "setup",
            Status::Active => "active",
            Status::PreSwitchover => "pre-switchover",
            Status::Device => "device",
            Status::Completed => "completed",
            Status::Failed => "failed",
            Status::Cancelling => "cancelling",
            Status::Cancelled => "cancelled",
        }
    }

    /// Whether the migration is over.
    pub fn is_final(self) -> bool {
        matches!(self, Status::Completed | Status::Failed | Status::Cancelled)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
