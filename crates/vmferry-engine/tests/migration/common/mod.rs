//! What the tests share.

mod arming_log;
mod recorder;
mod slow_link;
mod watched;

use std::sync::Arc;
use std::time::Duration;

use vmferry_dirty::Discipline;
use vmferry_engine::{Destination, MigrationError, Parameters, Source, Uri};

pub use arming_log::ArmingLog;
pub use recorder::Recorder;
pub use slow_link::{Pace, SlowLink};
pub use vmferry_testing::backlog::FullBacklog;
pub use vmferry_testing::proxy::{Effect, Proxy, Way, When};
pub use vmferry_testing::random::Random;
pub use vmferry_testing::wait::wait_until;
pub use watched::{Runners, Watched};

use crate::toy::Quiet;

/// Short enough to wait for in a test.
pub const PEER_TIMEOUT: Duration = Duration::from_millis(500);

/// Nothing in these tests takes longer.
const LONGEST: Duration = Duration::from_secs(30);

/// Length of `Shut`, which follows the word that the guest is loaded on the return path.
pub const SHUT_LEN: u64 = 8;

/// How the two ends of a migration ended.
#[derive(Debug)]
pub struct Outcome {
    pub source: Result<(), MigrationError>,
    pub destination: Result<(), MigrationError>,
}

/// With more patience than a busy machine needs.
pub fn parameters() -> Parameters {
    Parameters {
        peer_timeout: LONGEST,
        ..Parameters::default()
    }
}

/// For migrations whose peer is silent, or is when it matters.
pub fn impatient() -> Parameters {
    Parameters {
        peer_timeout: PEER_TIMEOUT,
        ..parameters()
    }
}

pub fn with_discipline(discipline: Discipline) -> Parameters {
    Parameters {
        discipline,
        ..parameters()
    }
}

pub fn any_port() -> Uri {
    "tcp:127.0.0.1:0".parse().unwrap()
}

pub fn listen(guest: &Arc<Watched>, uri: &Uri) -> Destination {
    Destination::start(guest.clone(), uri, Box::new(Quiet)).unwrap()
}

pub fn send(guest: &Arc<Watched>, uri: &Uri, parameters: Parameters) -> Source {
    Source::start(guest.clone(), uri.clone(), parameters, Box::new(Quiet)).unwrap()
}

/// Migrates from `here` to a new guest, which is returned when all of it has arrived.
pub fn move_on(here: &Arc<Watched>, parameters: Parameters) -> Arc<Watched> {
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let outgoing = send(here, incoming.uri(), parameters);
    outgoing.wait().expect("the guest has left");
    incoming.wait().expect("the guest has arrived");
    there.verify_arrival();
    there
}

/// A guest that has written to all of its memory and goes on doing so.
pub fn running_guest() -> Arc<Watched> {
    let guest = Watched::new(&Runners::none());
    guest.run();
    guest.run_some();
    guest
}
