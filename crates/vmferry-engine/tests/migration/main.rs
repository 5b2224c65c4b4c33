//! Whole migrations, from a source to a destination in one process, and measurements, with the guest of
//! `examples/toy.rs`.

mod common;
#[path = "../../examples/toy.rs"]
#[expect(dead_code, reason = "`main` is the example's")]
mod toy;

mod back_and_forth;
mod cancel;
mod convergence;
mod dirty_rate;
mod downtime;
mod files;
mod hints;
mod hostile;
mod misfits;
mod one_runner;
mod pausing;
mod peer_timeout;
mod steering;
mod waits;
mod zeros;
