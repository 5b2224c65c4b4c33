//! The live migration engine.

pub mod ram;
pub mod seam;
