//! An observer that remembers what it was told, and objects to what it must never be told.

use std::sync::{Arc, Mutex};

use vmferry_engine::{Observer, Status};

/// Every step that an outgoing migration may take. Failing and cancelling are possible from everywhere
/// before the end, and nothing follows the end.
const SOURCE: &[(Status, &[Status])] = &[
    (Status::None, &[Status::Setup]),
    (
        Status::Setup,
        &[Status::Active, Status::Cancelling, Status::Failed],
    ),
    (
        Status::Active,
        &[
            Status::PreSwitchover,
            Status::Device,
            Status::Cancelling,
            Status::Failed,
        ],
    ),
    (
        Status::PreSwitchover,
        &[Status::Device, Status::Cancelling, Status::Failed],
    ),
    (
        Status::Device,
        &[Status::Completed, Status::Cancelling, Status::Failed],
    ),
    (Status::Cancelling, &[Status::Cancelled]),
    (Status::Completed, &[]),
    (Status::Failed, &[]),
    (Status::Cancelled, &[]),
];

fn is_legal(from: Status, to: Status) -> bool {
    SOURCE
        .iter()
        .any(|(state, next)| *state == from && next.contains(&to))
}

/// Remembers a source's states. Clones remember together.
#[derive(Clone, Default)]
pub struct Recorder {
    seen: Arc<Mutex<Vec<Status>>>,
}

impl Recorder {
    pub fn seen(&self) -> Vec<Status> {
        self.seen.lock().unwrap().clone()
    }

    /// Checks the whole sequence of a migration that is over.
    pub fn check(&self) {
        let seen = self.seen();
        let mut from = Status::None;
        for &to in &seen {
            assert!(is_legal(from, to), "{from} -> {to} in {seen:?}");
            from = to;
        }
        assert!(from.is_final(), "{seen:?} has no end");
    }
}

impl Observer for Recorder {
    fn status(&self, status: Status) {
        self.seen.lock().unwrap().push(status);
    }

    fn pass(&self, _: u64) {}
}
