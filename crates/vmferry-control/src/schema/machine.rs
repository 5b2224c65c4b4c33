//! The machine itself: version, state, name, CPUs.

use serde::{Deserialize, Serialize};

/// Three numbers of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// First number.
    pub major: u64,
    /// Second number.
    pub minor: u64,
    /// Third number.
    pub micro: u64,
}

/// Answer to `query-version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// The QEMU release whose QMP this is. Clients choose commands by it.
    pub qemu: Version,
    /// The program that answers, with its own version.
    pub package: String,
}

impl VersionInfo {
    /// What this crate speaks: QMP as of QEMU 10.0.0.
    pub fn current() -> Self {
        VersionInfo {
            qemu: Version {
                major: 10,
                minor: 0,
                micro: 0,
            },
            package: concat!("vmferry ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// An entry of the answer to `query-commands`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandInfo {
    /// The command's name.
    pub name: String,
}

/// QEMU's run states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Stopped by a debugger.
    Debug,
    /// Waits for an incoming migration.
    Inmigrate,
    /// Stopped by an error of the hypervisor.
    InternalError,
    /// Stopped by a failed disk request.
    IoError,
    /// Stopped by `stop`.
    Paused,
    /// Was migrated away.
    Postmigrate,
    /// Has not run yet.
    Prelaunch,
    /// Stopped to finish a migration.
    FinishMigrate,
    /// Loads a snapshot.
    RestoreVm,
    /// Runs.
    Running,
    /// Saves a snapshot.
    SaveVm,
    /// Powered off by the guest and kept.
    Shutdown,
    /// Suspended by the guest.
    Suspended,
    /// Stopped by the watchdog.
    Watchdog,
    /// The guest reported a panic.
    GuestPanicked,
    /// Stopped for a COLO checkpoint.
    Colo,
}

/// Answer to `query-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusInfo {
    /// The run state.
    pub status: RunState,
    /// Whether the vCPUs execute.
    pub running: bool,
}

/// Answer to `query-name`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameInfo {
    /// The VM's name, if it was given one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Answer to `query-kvm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmInfo {
    /// Whether the VM runs on KVM.
    pub enabled: bool,
    /// Whether this program can use KVM at all.
    pub present: bool,
}

/// Arguments of `cont`; QEMU's has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Cont {
    /// Start a guest that was handed over to another machine: the user knows that it does not run there.
    #[serde(default)]
    pub x_vmferry_run_twice: bool,
}

/// An entry of the answer to `query-cpus-fast`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInfoFast {
    /// Number of the vCPU, from 0.
    pub cpu_index: u64,
    /// The vCPU's path in QEMU's object tree.
    pub qom_path: String,
    /// The host's id of the thread that runs the vCPU.
    pub thread_id: u64,
    /// Its place in the topology.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub props: Option<CpuInstanceProperties>,
    /// The architecture, `x86_64`.
    pub target: String,
}

/// A vCPU's place in the topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInstanceProperties {
    /// Socket, from 0.
    pub socket_id: u64,
    /// Core in the socket, from 0.
    pub core_id: u64,
    /// Thread in the core, from 0.
    pub thread_id: u64,
}
