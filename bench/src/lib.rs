//! Benchmarks that run vmferry and its peers side by side, on one machine, with the same guest.
//!
//! The programs are `peers`, which migrates a guest with QEMU and with vmferry in turn, `transfer`, which
//! measures what the machine's loopback and memory could do at best, and `dirty_log`, which compares KVM's two ways
//! to log a guest's writes.

pub mod bitmap;
pub mod case;
pub mod felt;
pub mod host;
pub mod interrupt;
pub mod median;
pub mod peer;
pub mod race;
pub mod report;
pub mod serial;
pub mod tracking;
pub mod vm;
