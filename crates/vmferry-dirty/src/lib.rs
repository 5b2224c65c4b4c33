#![doc = include_str!("../README.md")]

mod arming;
mod batch;
mod bitmap;
mod discipline;
pub mod log;
mod set;
mod slice;
mod sync;
mod tracker;
pub mod units;
mod words;

pub use arming::ArmingChunk;
pub use batch::Batch;
pub use bitmap::DirtyBitmap;
pub use discipline::{Discipline, UnknownDiscipline};
pub use log::{DirtyLog, LogError};
pub use set::DirtySet;
pub use slice::{Cursor, PUBLISH_INTERVAL, Run, Slice};
pub use tracker::{DirtyTracker, HintRound, TrackedSlice};
pub use units::{BlockIndex, PAGE_SIZE, PageIndex, PageRange};
