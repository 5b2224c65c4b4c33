//! What all tests share: processes that end with their test, and a guest whose own words are evidence.

pub mod command;
pub mod guest;
pub mod lab;
pub mod outcome;
pub mod story;
pub mod vm;

pub use vmferry_testing::host::say;
pub use vmferry_testing::random::Random;
pub use vmferry_testing::wait::{PATIENCE, eventually};
