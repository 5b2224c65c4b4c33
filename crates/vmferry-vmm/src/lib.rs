//! The KVM machine: vCPUs, RAM, a serial port and what a kernel needs to start, laid out like QEMU's `microvm`.
//!
//! [`Machine`] is a whole virtual machine. Its user starts, pauses and resets it; the migration engine drives it
//! through [`vmferry_engine::seam::Guest`], which it implements. Who may do what, and when, is decided in one
//! place: the [`RunState`], held under one mutex.
//!
//! | module | idea |
//! |---|---|
//! | `acpi` | tables that tell a kernel what the machine has |
//! | `config` | what a machine is made of, and what is refused |
//! | `memory` | one RAM block, seen by the guest in two pieces around the hole below 4 GiB |
//! | `reclaim` | guest memory that is given back to the host |
//! | `dirty_log` | which of KVM's dirty logs the machine has |
//! | `boot` | kernels: PVH ELF images and bzImages |
//! | `vcpu` | threads that run guest code, and the gate that holds them |
//! | `devices` | the serial port and its back ends, the reset line of the i8042, the event device of ACPI |
//! | `state` | everything that KVM and the devices know about the guest, out and in |
//! | `virtio` | virtio-mmio, and the devices behind it: disks, networks, a console, random numbers, a balloon |
//! | `machine`, `migrate` | the whole, as its user and as the engine see it |

mod acpi;
mod boot;
mod config;
mod cpuid;
mod devices;
mod dirty_log;
mod error;
mod hypervisor;
mod layout;
mod machine;
mod memory;
mod migrate;
mod reclaim;
mod run_state;
mod state;
mod supervisor;
#[cfg(test)]
mod tests;
mod vcpu;
mod virtio;

pub use boot::BootError;
pub use config::{
    Access, Backing, BadMacAddress, BalloonConfig, Caching, DirtyLogChoice, DiskConfig,
    ImageFormat, KernelSource, MacAddress, MachineConfig, NetBackend, NetConfig, OnReset,
    SerialConfig,
};
pub use dirty_log::DirtyLogKind;
pub use error::MachineError;
pub use machine::{BalloonInfo, DiskInfo, Machine, MachineEvent, OnEvent, ShutdownCause, VcpuInfo};
pub use run_state::RunState;
#[cfg(fuzzing)]
pub use virtio::fuzz;
pub use virtio::{Announcement, DiskIo};
pub use vmferry_dirty::log::RingSize;
