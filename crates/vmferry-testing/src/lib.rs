//! What the tests of all of vmferry's crates share.
//!
//! Nothing here knows vmferry's other crates, so each of them can use it for its tests.
//!
//! - [`proxy`]: a network that is slow, breaks, or falls silent where a test wants it to;
//! - [`backlog`]: addresses that exist, but accept no connection;
//! - [`random`]: random choices that can be repeated;
//! - [`wait`]: waiting for something with an end to patience;
//! - [`host`]: what this host can do, and what a test says when it cannot run here.

pub mod backlog;
pub mod host;
pub mod proxy;
pub mod random;
pub mod wait;
