//! The command from end to end: real processes, a real guest under KVM that checks itself.
//!
//! Needs `/dev/kvm`; without it, the tests that do say `SKIPPED` and pass.

mod common;

mod arrives_paused;
mod balloon;
mod cancelled;
mod clock;
mod command_line;
mod damaged_line;
mod demo;
mod dirty_log;
mod dirty_rate;
mod disk_full;
mod disk_handover;
mod disks;
mod events;
mod hints;
mod killed;
mod logging;
mod memory_limit;
mod misfit;
mod monitor;
mod networks;
mod qemu_qmp;
mod resident;
mod second_runner;
mod signals;
mod soak;
mod there_and_back;
mod transports;
mod waits;
