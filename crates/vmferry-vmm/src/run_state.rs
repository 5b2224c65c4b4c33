//! What a machine is doing, in QEMU's words.

use std::fmt;

/// State of a machine. The names are those of QMP's `RunState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Ready, and never started since power-on or since a reset of a stopped guest.
    Prelaunch,
    /// Waiting for a guest to arrive.
    InMigrate,
    /// The vCPUs execute.
    Running,
    /// Stopped by its user.
    Paused,
    /// Stopped by a migration, which alone decides where the guest goes on.
    FinishMigrate,
    /// The guest has left.
    PostMigrate,
    /// The guest has shut down or the machine was told to quit.
    Shutdown,
    /// A vCPU cannot go on.
    InternalError,
}

impl RunState {
    /// The name that QMP uses.
    pub fn as_str(self) -> &'static str {
        match self {
            RunState::Prelaunch => "prelaunch",
            RunState::InMigrate => "inmigrate",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::FinishMigrate => "finish-migrate",
            RunState::PostMigrate => "postmigrate",
            RunState::Shutdown => "shutdown",
            RunState::InternalError => "internal-error",
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
