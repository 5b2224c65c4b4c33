//! What happens to a machine.

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The vCPUs have stopped, for the user or for a migration.
    Stop,
    /// The vCPUs run.
    Resume,
    /// The guest has started again.
    Reset {
        /// Whether it asked for that itself.
        guest: bool,
    },
    /// The power button was pressed.
    PowerButton,
    /// The guest has stopped for good.
    Shutdown {
        /// Why.
        cause: ShutdownCause,
    },
    /// A vCPU cannot go on.
    InternalError {
        /// Which vCPU.
        vcpu: u32,
        /// Why, with the registers that tell where.
        reason: String,
    },
    /// The guest has taken memory from its balloon, or given some to it.
    BalloonChange {
        /// Bytes of RAM that it has left.
        actual: u64,
    },
    /// The user of the console has pressed the keys that mean "quit".
    QuitKey,
}

/// Why a guest has stopped for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownCause {
    /// It has powered its machine off.
    GuestShutdown,
    /// It has reset itself, and that was to be its end.
    GuestReset,
    /// Its user wants it.
    User,
}

/// Is told what happens to a machine, in the order in which it does, from whichever thread it happens on, which
/// may hold the machine's run state: it must be quick, and leave the machine alone.
pub type OnEvent = Box<dyn Fn(MachineEvent) + Send + Sync>;
