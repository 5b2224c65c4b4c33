//! The seam: what the engine needs to know about a virtual machine, and all it needs to know.
//!
//! A VMM author implements [`Guest`] and can then migrate: [`crate::source`] drives it on the
//! host that the guest leaves, [`crate::destination`] on the host that it comes to. The engine does not
//! know KVM; `examples/toy.rs` migrates a guest that is a thread writing to a memory region.
//!
//! # The order of calls
//!
//! | source | destination |
//! |---|---|
//! | `ram`, `describe` | `ram` |
//! | `dirty_log().start()` | `check_description` |
//! | `dirty_log().fetch()` / `.arm()`, many times | (RAM is written through [`RamBlock`]) |
//! | between two fetches: `free_page_hinting().start()` .. `.stop()`; `.done()` in the end | |
//! | `prepare_pause` | |
//! | `pause`; if it is [`PauseError::Busy`], back to the fetches | |
//! | `save_devices` | |
//! | a last `fetch`, `.arm()` | `load_devices` |
//! | `dirty_log().stop()` | `start` if the guest ran on the source |
//! | on failure before the hand-over: `resume`; else `left` | |
//!
//! # What an implementation guarantees
//!
//! - After [`Guest::pause`] has returned, nothing but `save_devices` writes to guest memory until `resume`.
//! - Every byte written to guest memory, by a vCPU or by the VMM itself, shows in [`Guest::dirty_log`]
//!   (law 1). `vmferry_dirty::VmmWriteLog` is there for the VMM's own writes.
//! - On a destination, all RAM reads as zero before the first byte of the stream arrives: zero pages that
//!   come as the first content of a page are not written, so that memory the guest never used stays free.
//! - On a destination, RAM that is given back to the kernel (`madvise`) reads as zero, as anonymous memory and memfds do, and
//!   nobody has pinned it: memory in which no data arrives is given back before `load_devices`, and all of it if the stream
//!   does not come to its end.
//!
//! # A toy VMM
//!
//! `examples/toy.rs`, whole. It runs as a test of this documentation.
//!
//! ```
#![doc = include_str!("../examples/toy.rs")]
//! ```

use std::sync::Arc;
use std::time::Duration;

use vmferry_dirty::{BlockIndex, DirtyLog, LogError, PageRange};

pub use crate::hints::FreePageHints;
pub use crate::ram::RamBlock;
pub use vmferry_wire::DeviceState;

/// Why a virtual machine could not do what the engine asked: what was attempted, on what, and what the user
/// can do, in one sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GuestError(pub String);

impl GuestError {
    /// An error from anything that prints itself as a full sentence.
    pub fn new(why: impl std::fmt::Display) -> Self {
        GuestError(why.to_string())
    }
}

/// Why a guest could not be paused. It runs on.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// It did not come to a stand in time: the words say what it waited for. The engine goes on copying, and tries again, up
    /// to five times in all.
    #[error("{0}")]
    Busy(String),
    /// It cannot be, and the migration fails.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// Whether the guest's vCPUs were executing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// The guest was running.
    Running,
    /// The guest was paused by its user, or had not been started.
    Paused,
}

/// How a guest has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// The destination has confirmed that the guest is its own. Whoever starts the guest here as well runs it twice.
    HandedOver,
    /// The guest was written to a file, a pipe or a command, none of which can confirm anything. The source's user knows
    /// what becomes of it, and may start it here again.
    Written,
}

/// A balloon by which a guest tells, while it is migrated, which of its pages are free: virtio-balloon's free-page
/// hinting. Methods are called from the migration thread, and do not wait for the guest.
pub trait FreePageHinting: Send + Sync {
    /// Asks the guest, under a new command id. What it answers to this question, and not to an earlier one, goes to
    /// `hints`, from whichever thread. The dirty log was fetched just now, and armed.
    fn start(&self, hints: FreePageHints);

    /// The dirty log is about to be fetched: the guest is told to stop. What it still answers is of no use.
    fn stop(&self);

    /// The migration is over, or about to pause the guest: the guest is told to use its pages again. Called once, and
    /// last.
    fn done(&self);
}

/// A virtual machine, as the engine sees it. All methods are called from the engine's migration thread
/// (`ram` and `dirty_log` from that of a [`crate::dirty_rate`] measurement as well); the VMM goes on serving its
/// user meanwhile, hence `&self`.
pub trait Guest: Send + Sync {
    /// The guest's RAM blocks, in the order of the stream; the same ones for the guest's whole life.
    fn ram(&self) -> &[RamBlock];

    /// The log of writes to those blocks.
    fn dirty_log(&self) -> &dyn DirtyLog;

    /// The balloon that the guest tells its free pages to, if there is one and its driver is there.
    fn free_page_hinting(&self) -> Option<&dyn FreePageHinting> {
        None
    }

    /// What a destination must look like to take this guest (vCPUs, devices), in the VMM's own encoding.
    /// Sent first, so that a misfit is known before any RAM is copied.
    fn describe(&self) -> Result<DeviceState, GuestError>;

    /// Compares a source's description with this machine; the error says what differs and how to start the
    /// destination so that it fits.
    fn check_description(&self, source: &DeviceState) -> Result<(), GuestError>;

    /// The guest is about to be paused: work that shortens the pause, while the guest still runs. Flushing its disks is
    /// such work, of which little is then left for [`pause`](Self::pause). May take its time; what the
    /// guest writes to its memory meanwhile is sent before the pause. Called once before each attempt to pause it, or twice
    /// if it takes long, each time from a thread of its own: it is not waited for when the user cancels the migration.
    fn prepare_pause(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Stops the vCPUs and the devices for the switch-over, and says what they were doing. From here until
    /// [`resume`](Self::resume) the VMM lets nobody else start the guest.
    ///
    /// The guest stands still from the call on, so an implementation that has to wait (for requests that a disk has not
    /// finished, say, or for a flush of what was written since [`prepare_pause`](Self::prepare_pause)) gives up after `limit`:
    /// an error leaves the guest running.
    fn pause(&self, limit: Duration) -> Result<Activity, PauseError>;

    /// Undoes [`pause`](Self::pause) after a migration that failed: the guest goes on as it was before
    /// (`was` is what `pause` returned), as though nothing had happened.
    fn resume(&self, was: Activity) -> Result<(), GuestError>;

    /// As [`resume`](Self::resume), after a hand-over whose end is not known: the guest may have gone on at the
    /// destination. It stays paused, and what only one side can have (the lock of a disk) is not taken before its user
    /// lets it go on here.
    fn resume_in_doubt(&self) -> Result<(), GuestError> {
        self.resume(Activity::Paused)
    }

    /// Ends a migration that succeeded, in place of [`resume`](Self::resume): the paused guest is no longer this machine's.
    /// A VMM that lets its user start the guest here once more must ask for an explicit word first if the guest was handed
    /// over (law 7).
    fn left(&self, how: Departure) {
        let _ = how;
    }

    /// The state of vCPUs and devices of the paused guest. May write to guest memory (KVM does, for some of
    /// its paravirtual state), which is why the engine reads the dirty log once more afterwards.
    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError>;

    /// Puts the state in place that a source saved. The guest does not run before [`start`](Self::start). The
    /// error names the section and says what did not fit.
    fn load_devices(&self, states: &[DeviceState]) -> Result<(), GuestError>;

    /// Nobody hands this guest over: its stream is a file, or comes from a command, and may have been used before. Refuses
    /// what does not fit it any longer, such as a disk that was written to since; the error says which. Called after
    /// [`load_devices`](Self::load_devices).
    fn check_snapshot(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Starts a guest that arrived. `paused_for` is how long it stood still as seen from here: never longer
    /// than the true downtime, so that its clocks may be moved on by it. With [`Activity::Paused`] the guest
    /// arrives paused, and only becomes its user's to start. The VMM may leave a guest paused that ran on the source, if
    /// its user has asked for that.
    fn start(&self, activity: Activity, paused_for: Duration) -> Result<(), GuestError>;

    /// As [`start`](Self::start), after a hand-over whose end is not known: the source may have kept the guest. It stays
    /// paused, and what only one side can have is not taken before its user lets it go on here.
    fn start_in_doubt(&self, paused_for: Duration) -> Result<(), GuestError> {
        self.start(Activity::Paused, paused_for)
    }
}

/// The dirty log of a guest, together with the guest: for who needs the log for longer than it can borrow the guest.
pub struct GuestLog(Arc<dyn Guest>);

impl GuestLog {
    /// The log of `guest`, which stays alive with it.
    pub fn new(guest: Arc<dyn Guest>) -> Self {
        GuestLog(guest)
    }
}

impl DirtyLog for GuestLog {
    fn start(&self) -> Result<(), LogError> {
        self.0.dirty_log().start()
    }

    fn stop(&self) -> Result<(), LogError> {
        self.0.dirty_log().stop()
    }

    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        self.0.dirty_log().fetch(block, into)
    }

    fn needs_arming(&self) -> bool {
        self.0.dirty_log().needs_arming()
    }

    fn arm(&self, block: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError> {
        self.0.dirty_log().arm(block, range, pages)
    }

    fn written_per_vcpu(&self) -> Option<Vec<u64>> {
        self.0.dirty_log().written_per_vcpu()
    }
}
