//! What the benchmarks of dirty bitmaps share: bitmaps to drain, those who drain them, and hints meanwhile.

pub mod contender;
pub mod hints;
pub mod pattern;
