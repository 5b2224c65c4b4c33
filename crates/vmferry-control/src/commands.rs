//! The commands: one table, from which the [`Handler`] trait, the dispatch and `query-commands` are made.
//!
//! To add a command, add its line to the table at the end of this file, and its types to [`crate::schema`]. The
//! compiler then asks every handler for the new method.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::arguments;
use crate::error::{ErrorClass, QmpError};
use crate::schema::{
    AnnounceSelf, Balloon, BalloonInfo, BlockInfo, BlockResize, CalcDirtyRate, Cont, CpuInfoFast,
    DirtyRateInfo, KvmInfo, Migrate, MigrateContinue, MigrateIncoming, MigrateSetCapabilities,
    MigrateSetParameters, MigrationCapabilityStatus, MigrationInfo, MigrationParameters, NameInfo,
    QueryDirtyRate, StatusInfo,
};

/// Decodes the arguments, calls the handler, encodes the result.
type Run = fn(&dyn Handler, &Map<String, Value>) -> Result<Value, QmpError>;

/// A row of the table.
struct Command {
    name: &'static str,
    run: Run,
}

/// The arguments of a command that has none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArguments {}

fn answer(result: impl Serialize) -> Result<Value, QmpError> {
    serde_json::to_value(result).map_err(|error| {
        QmpError::generic(format!("the result cannot be written as JSON: {error}"))
    })
}

/// Runs the command called `name`.
///
/// # Errors
/// No such command, arguments that do not fit, or the handler's own error.
pub(crate) fn dispatch(
    handler: &dyn Handler,
    name: &str,
    arguments: &Map<String, Value>,
) -> Result<Value, QmpError> {
    let command = COMMANDS
        .iter()
        .find(|command| command.name == name)
        .ok_or_else(|| {
            QmpError::new(
                ErrorClass::CommandNotFound,
                format!("The command {name} has not been found"),
            )
        })?;
    (command.run)(handler, arguments)
}

/// Reads the arguments of a command that has none.
///
/// # Errors
/// There are some.
pub(crate) fn no_arguments(arguments: &Map<String, Value>) -> Result<(), QmpError> {
    arguments::decode(arguments).map(|NoArguments {}| ())
}

/// The names in the table.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    COMMANDS.iter().map(|command| command.name)
}

macro_rules! commands {
    ($(
        $(#[$doc:meta])*
        $name:literal => $method:ident($($argument:ident: $type:ty)?) -> $result:ty;
    )*) => {
        /// What executes commands: the machine behind the monitor.
        ///
        /// Methods are called from the connections' threads, several at once if several clients ask. A method should
        /// answer promptly, as QMP's own commands do (`migrate` answers when the migration has been started): its
        /// client waits, and so does the end of the server. A method whose command has no result answers `()`, which
        /// goes out as `{}`. A method that panics costs its client the connection, and nobody else anything.
        ///
        /// # Errors
        /// Every method answers with the [`QmpError`] that the client is to see.
        pub trait Handler: Send + Sync {
            $( $(#[$doc])* fn $method(&self $(, $argument: $type)?) -> Result<$result, QmpError>; )*
        }

        static COMMANDS: &[Command] = &[ $( Command {
            name: $name,
            run: |handler, arguments| {
                commands!(@run handler.$method, arguments $(, $argument: $type)?)
            },
        }, )* ];
    };
    (@run $handler:ident.$method:ident, $arguments:ident) => {{
        no_arguments($arguments)?;
        answer($handler.$method()?)
    }};
    (@run $handler:ident.$method:ident, $arguments:ident, $argument:ident: $type:ty) => {{
        let $argument: $type = arguments::decode($arguments)?;
        answer($handler.$method($argument)?)
    }};
}

commands! {
    /// Whether the VM runs, and why not.
    "query-status" => query_status() -> StatusInfo;
    /// The VM's name.
    "query-name" => query_name() -> NameInfo;
    /// The vCPUs and their threads.
    "query-cpus-fast" => query_cpus_fast() -> Vec<CpuInfoFast>;
    /// The disks.
    "query-block" => query_block() -> Vec<BlockInfo>;
    /// Gives a disk another size, and tells the guest.
    "block_resize" => block_resize(arguments: BlockResize) -> ();
    /// Has network interfaces tell their networks where the guest is.
    "announce-self" => announce_self(arguments: AnnounceSelf) -> ();
    /// Asks the guest to make do with so many bytes of RAM.
    "balloon" => balloon(arguments: Balloon) -> ();
    /// How much RAM the guest has left.
    "query-balloon" => query_balloon() -> BalloonInfo;
    /// Whether KVM is there and in use.
    "query-kvm" => query_kvm() -> KvmInfo;
    /// Stops the vCPUs; not an error if they are stopped.
    "stop" => stop() -> ();
    /// Lets the vCPUs run; not an error if they do.
    "cont" => cont(arguments: Cont) -> ();
    /// Ends the VM. The answer is still delivered: the server, when dropped, sends what is queued first.
    "quit" => quit() -> ();
    /// Resets the VM as its reset button would.
    "system_reset" => system_reset() -> ();
    /// Presses the VM's power button.
    "system_powerdown" => system_powerdown() -> ();
    /// Starts a migration to the given address.
    "migrate" => migrate(arguments: Migrate) -> ();
    /// Starts to wait for a migration from the given address.
    "migrate-incoming" => migrate_incoming(arguments: MigrateIncoming) -> ();
    /// Stops the running migration; not an error if there is none.
    "migrate_cancel" => migrate_cancel() -> ();
    /// Lets a migration that waits in the given state go on.
    "migrate-continue" => migrate_continue(arguments: MigrateContinue) -> ();
    /// State and numbers of the current or the last migration.
    "query-migrate" => query_migrate() -> MigrationInfo;
    /// Changes parameters.
    "migrate-set-parameters" => migrate_set_parameters(arguments: MigrateSetParameters) -> ();
    /// The parameters in force.
    "query-migrate-parameters" => query_migrate_parameters() -> MigrationParameters;
    /// Turns capabilities on and off: all of those given, or none.
    "migrate-set-capabilities" => migrate_set_capabilities(arguments: MigrateSetCapabilities) -> ();
    /// The capabilities and whether they are on.
    "query-migrate-capabilities" => query_migrate_capabilities() -> Vec<MigrationCapabilityStatus>;
    /// Starts to measure how fast the guest dirties its memory.
    "calc-dirty-rate" => calc_dirty_rate(arguments: CalcDirtyRate) -> ();
    /// What came of the measurement; an error if it failed.
    "query-dirty-rate" => query_dirty_rate(arguments: QueryDirtyRate) -> DirtyRateInfo;
}
