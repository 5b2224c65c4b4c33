//! What the tests share.

mod arming_log;
mod deaf;
mod proxy;
mod random;
mod recorder;
mod watched;

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_dirty::Discipline;
use vmferry_engine::{Destination, MigrationError, Parameters, Source, Uri};

pub use arming_log::ArmingLog;
pub use deaf::{deaf_tcp, deaf_unix};
pub use proxy::{Effect, Fault, Proxy, Way, When};
pub use random::Random;
pub use recorder::Recorder;
pub use watched::{Runners, Watched};

use crate::toy::Quiet;

/// Short enough to wait for in a test.
pub const PEER_TIMEOUT: Duration = Duration::from_millis(500);

/// Nothing in these tests takes longer.
const LONGEST: Duration = Duration::from_secs(30);

/// Length of `HandoverLoaded` on the return path; `Shut` follows it.
pub const HANDOVER_LOADED_LEN: u64 = 4;
/// Length of `Shut`.
pub const SHUT_LEN: u64 = 8;

/// So many bytes of the return path after its `HandoverLoaded` begins.
pub fn from_handover_loaded(bytes: u64) -> When {
    When::From(Way::Back, b"\x76\x01\0\0", bytes)
}

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

/// Waits until `condition` holds; `what` says what does not, if it never does.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LONGEST, "still not: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
