//! Dirty logs: who wrote which page since we last asked.
//!
//! A log is the hypervisor's half of dirty tracking. Fetching it (a *sync*) and re-arming it are two
//! operations, because on KVM's mechanisms they are (manual protect, the dirty ring's reset): a page that was
//! reported as written is not reported again until it has been re-armed. Law 3, *protect before read*,
//! follows: re-arm a page, then read it for sending. A write between the two is seen by the next sync; the
//! other way round it would be lost. Where the kernel does both in one step, as with [`UffdLog`], the fetch
//! re-arms what it reports.

use crate::units::{BlockIndex, PageRange};

mod kvm;
mod kvm_ring;
mod kvm_slots;
mod uffd;
mod vmm_writes;

pub use kvm::KvmDirtyLog;
pub use kvm_ring::{KvmDirtyRing, KvmDirtyRings, RingSize};
pub use kvm_slots::KvmSlot;
pub use uffd::{UffdLog, UffdRegion};
pub use vmm_writes::{VmmWriteLog, VmmWrites, WithVmmWrites};

/// What went wrong with a dirty log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The kernel refused an operation on the log.
    #[error("cannot {action} for RAM block {}: {source}", block.0)]
    Kernel {
        /// What was attempted, as a verb phrase ("fetch the dirty log").
        action: &'static str,
        /// The block it was attempted on.
        block: BlockIndex,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// This host cannot keep such a log.
    #[error("{what} is not available ({source}): it needs {needs}")]
    Unsupported {
        /// What is missing.
        what: &'static str,
        /// What would have it.
        needs: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The kernel cannot track this memory.
    #[error(
        "cannot track {start:#x}..{end:#x} of RAM block {}: {source}; it has to be whole pages of mapped, \
         writable memory that no other userfaultfd has", block.0
    )]
    Region {
        /// The block that the memory is part of.
        block: BlockIndex,
        /// The memory's first address.
        start: u64,
        /// The first address after it.
        end: u64,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The kernel refused an operation on the log of the whole virtual machine.
    #[error("cannot {action}: {source}")]
    Machine {
        /// What was attempted, as a verb phrase ("enable the dirty rings of the vCPUs").
        action: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The host's KVM has no dirty ring.
    #[error("this host's KVM has no dirty ring (Linux 5.11 and newer have it): use its dirty log")]
    NoRing,
    /// A dirty ring cannot have so many entries.
    #[error("a dirty ring cannot have {entries} entries: {hint}")]
    RingSize {
        /// How many were asked for.
        entries: u32,
        /// What is possible.
        hint: String,
    },
}

/// A source of "these pages were written", one bit a page.
///
/// `start`, `stop` and `fetch` are called one at a time. `arm` may be called by several threads at once, for different
/// blocks, and beside a `fetch` of another block. ([`DirtyTracker`](crate::DirtyTracker) sees to that.)
pub trait DirtyLog: Send + Sync {
    /// Begins tracking writes to every block. From its return on, a write to a page is either reported by a
    /// later [`fetch`](Self::fetch) or belongs to a page that this log reports as dirty at first anyway.
    fn start(&self) -> Result<(), LogError>;

    /// Ends tracking. The log is empty afterwards; calling it on a stopped log does nothing.
    fn stop(&self) -> Result<(), LogError>;

    /// ORs the pages of `block` that were written since they were last armed into `into`: bit `i % 64` of
    /// word `i / 64` for page `i`. `into` has one bit for each page of the block, rounded up to whole words;
    /// bits beyond the block's end stay clear.
    ///
    /// What `into` held before stays there. A fetch that fails may have reported a part of the pages, and a later one
    /// reports the others.
    ///
    /// With [`needs_arming`](Self::needs_arming) the same page is reported again by every fetch until it has
    /// been armed; without, a fetch arms what it reports.
    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError>;

    /// Whether fetched pages have to be armed by a call of their own before they are read.
    fn needs_arming(&self) -> bool;

    /// Re-arms pages of `block`: those of `range` whose bit in `pages` is set, where bit 0 of `pages[0]` is
    /// the range's first page. Only pages that a fetch has reported may be named: arming forgets the page's
    /// past writes. `range.start` is a multiple of 64, and so is `range.end` unless it is the block's end.
    fn arm(&self, block: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError>;

    /// How many pages each vCPU has had logged since the log was last started, vCPU 0 first; `None` if this log
    /// cannot tell who wrote. A page counts for each time that it was armed and written again (KVM may log it
    /// more than once even so), and only what a [`fetch`](Self::fetch) (or the log by itself) has collected counts: fetch before reading it.
    fn written_per_vcpu(&self) -> Option<Vec<u64>> {
        None
    }
}
