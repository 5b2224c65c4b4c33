//! The live migration engine: moves a running guest from one process to another without losing a byte.
//!
//! A VMM implements [`seam::Guest`]; [`Source`] then copies the guest away and [`Destination`] receives it.
//! The engine knows no KVM, no devices and no monitor. `examples/toy.rs` is the smallest VMM that migrates.

mod cancel;
pub mod destination;
pub mod dirty_rate;
mod error;
mod hints;
mod info;
mod params;
mod ram;
pub mod room;
mod run_state;
pub mod seam;
pub mod source;
mod status;
mod transport;
mod wait;
mod zero;

pub use destination::Destination;
pub use dirty_rate::DirtyRate;
pub use error::MigrationError;
pub use info::{Info, Observer, RamInfo, TrackingInfo};
pub use params::Parameters;
pub use ram::{RamBlock, RamBlockError};
pub use source::{Source, SteerError};
pub use status::Status;
pub use transport::{TransportError, Uri, UriError};
pub use vmferry_dirty::{ArmingChunk, Discipline};
pub use wait::{Wait, Waiting};
