//! The rig: a Linux with a working `/dev/kvm`, for tests on hosts that cannot run Linux guests at a useful speed.
//!
//! QEMU emulates a whole computer in software, AMD's virtualization extensions with nested paging among it. Debian's
//! kernel runs there as the *first level*; its KVM then runs *second-level* guests, as it would on any other host. What
//! is to run in the first level, and everything that it needs, goes in with the initial RAM disk. It is slow, and
//! complete.
//!
//! ```text
//! this host            vmferry-rig, QEMU
//!   first level          Debian's kernel, /dev/kvm, the command that was asked for
//!     second level         the guests that it runs
//! ```
//!
//! [`Debian`] gets kernel and userland from Debian's packages, [`Initramfs`] packs initial RAM disks for either level,
//! [`Rig`] boots the first level and runs one command in it. [`kvm::probe`] tells whether a host needs the rig at all.

mod archive;
mod cache;
mod debian;
mod error;
mod initramfs;
pub mod kvm;
mod libraries;
mod modules;
mod outlet;
mod process;
mod qemu;
mod rig;

pub use cache::default_cache;
pub use debian::Debian;
pub use error::RigError;
pub use initramfs::Initramfs;
pub use rig::{Ended, Rig};
