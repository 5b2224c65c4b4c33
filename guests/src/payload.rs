//! The parts of the payload guests that run anywhere, for their unit tests. The modules are siblings
//! here as they are in the guest.

#![allow(dead_code, reason = "the guest uses what the tests do not")]

#[path = "../payload/dirtier/answer.rs"]
mod answer;
#[path = "../payload/rt/cmdline.rs"]
pub mod cmdline;
#[path = "../payload/dirtier/ledger.rs"]
mod ledger;
#[path = "../payload/dirtier/pacer.rs"]
mod pacer;
#[path = "../payload/dirtier/page.rs"]
mod page;
#[path = "../payload/dirtier/params.rs"]
mod params;
#[path = "../payload/dirtier/plan.rs"]
mod plan;
#[path = "../payload/rt/virtio/queue.rs"]
mod queue;
#[path = "../payload/dirtier/random.rs"]
mod random;

/// What the guest calls `rt`.
mod rt {
    pub use super::cmdline;
}
