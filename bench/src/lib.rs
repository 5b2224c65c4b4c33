//! Benchmarks that run vmferry and its peers side by side, on one machine, with the same guest.
//!
//! `README.md` beside the manifest says which programs there are, and how to read what they print.

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
