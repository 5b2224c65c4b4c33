//! Dirty bitmaps for live migration: one bit per page, and who may clear it.

pub mod log;
pub mod units;
mod words;

pub use log::{DirtyLog, LogError};
pub use units::{BlockIndex, PAGE_SIZE, PageIndex, PageRange};
