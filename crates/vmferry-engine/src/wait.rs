//! The names of what a migration waits for, so that whoever watches it need not guess.
//!
//! The migration's thread says what it waits for with a [`WaitGuard`], for as long as the guard lives. [`Info`] shows
//! it, and a thread of its own writes a line to the log when it lasts longer than a second: the migration's own thread
//! could not, while it waits.
//!
//! [`Info`]: crate::Info

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a migration can wait for, on either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wait {
    /// Source: the addresses of the destination's host.
    NameResolution,
    /// Source: the destination to accept the connection.
    Connection,
    /// Either side: a file to be opened. A FIFO opens when somebody opens its other end.
    Open,
    /// Source: the channel to take more of the stream.
    Transmission,
    /// Source: the user's bandwidth limit to allow more.
    BandwidthLimit,
    /// Source: the destination's word that it has taken in all that was sent in a pass.
    Receipt,
    /// Source: [`Guest::prepare_pause`](crate::seam::Guest::prepare_pause).
    PausePreparation,
    /// Source: the guest to come to a stand ([`Guest::pause`](crate::seam::Guest::pause)).
    Standstill,
    /// Source: the time that a guest gets to itself after an attempt to pause it that failed.
    NextAttempt,
    /// Source: the user's word to go on (`migrate-continue`).
    Continue,
    /// Source: the state of the guest's devices ([`Guest::save_devices`](crate::seam::Guest::save_devices)).
    DeviceState,
    /// Source: the destination's word that it has loaded the guest.
    Loaded,
    /// Source: the destination's word that the guest runs there.
    Confirmation,
    /// Source: a snapshot to be safe on its disk.
    Storage,
    /// Source: the command that takes the stream to end.
    Command,
    /// Destination: a source to connect.
    Source,
    /// Destination: the source to send more of the stream.
    Stream,
    /// Destination: the source to give up its guest, which is loaded here.
    Decision,
    /// Destination: this machine to take the state of the guest's devices, or to let the guest go on.
    Machine,
}

impl Wait {
    /// A short name for programs, which does not change.
    pub fn as_str(self) -> &'static str {
        match self {
            Wait::NameResolution => "name-resolution",
            Wait::Connection => "connection",
            Wait::Open => "open",
            Wait::Transmission => "transmission",
            Wait::BandwidthLimit => "bandwidth-limit",
            Wait::Receipt => "receipt",
            Wait::PausePreparation => "pause-preparation",
            Wait::Standstill => "standstill",
            Wait::NextAttempt => "next-attempt",
            Wait::Continue => "migrate-continue",
            Wait::DeviceState => "device-state",
            Wait::Loaded => "loaded",
            Wait::Confirmation => "confirmation",
            Wait::Storage => "storage",
            Wait::Command => "command",
            Wait::Source => "source",
            Wait::Stream => "stream",
            Wait::Decision => "decision",
            Wait::Machine => "machine",
        }
    }

    /// Whether a long wait is nothing unusual: it is for the user, or for something that the user has started.
    fn is_usual(self) -> bool {
        matches!(
            self,
            Wait::BandwidthLimit | Wait::Continue | Wait::Command | Wait::Source
        )
    }
}

/// Completes "the migration waits for ...".
impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wait::NameResolution => "the destination's name to be resolved",
            Wait::Connection => "the destination to accept the connection",
            Wait::Open => "the file to be opened (a FIFO needs somebody at its other end)",
            Wait::Transmission => "the destination to take more of the stream",
            Wait::BandwidthLimit => "the bandwidth limit",
            Wait::Receipt => "the destination to take in what was sent",
            Wait::PausePreparation => "the guest's disks to be flushed before the pause",
            Wait::Standstill => "the guest to stand still",
            Wait::NextAttempt => "the next attempt to pause the guest",
            Wait::Continue => "'migrate-continue'",
            Wait::DeviceState => "the state of the guest's devices to be saved",
            Wait::Loaded => "the destination to load the guest",
            Wait::Confirmation => "the destination to confirm that the guest runs there",
            Wait::Storage => "the snapshot to be safe on its disk",
            Wait::Command => "the command to end",
            Wait::Source => "a source to connect",
            Wait::Stream => "the source to send more of the stream",
            Wait::Decision => "the source to give up its guest",
            Wait::Machine => "this machine to take the guest",
        })
    }
}

/// A wait that is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// For what.
    pub wait: Wait,
    /// Since when.
    pub since: Instant,
}

/// What one migration waits for at the moment. Clones are of the same migration.
#[derive(Clone, Default)]
pub(crate) struct Waits(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    over: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Option<Waiting>,
    is_over: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nobody can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waits {
    /// What the migration waits for now.
    pub(crate) fn now(&self) -> Option<Waiting> {
        self.0.lock().waiting
    }

    /// The migration waits for this from now on, until the guard is dropped. A wait that begins within another one is a
    /// part of it, and not shown.
    pub(crate) fn begin(&self, wait: Wait) -> WaitGuard<'_> {
        self.go_on(wait, Instant::now())
    }

    /// The migration goes on waiting for something that it has waited for, with interruptions, since `since`.
    pub(crate) fn go_on(&self, wait: Wait, since: Instant) -> WaitGuard<'_> {
        let mut state = self.0.lock();
        let outer = state.waiting;
        state.waiting = outer.or(Some(Waiting { wait, since }));
        WaitGuard { waits: self, outer }
    }

    /// Starts to write a line to the log for each wait that lasts longer than a second. `whose` is the subject of the
    /// line: "the migration".
    pub(crate) fn log(&self, whose: &'static str) -> std::io::Result<WaitLog> {
        let shared = self.0.clone();
        std::thread::Builder::new()
            .name("waits".to_owned())
            .spawn(move || log_long_waits(&shared, whose))?;
        Ok(WaitLog(self.0.clone()))
    }
}

/// A wait that goes on as long as this lives.
pub(crate) struct WaitGuard<'a> {
    waits: &'a Waits,
    /// The wait that this one is a part of.
    outer: Option<Waiting>,
}

impl Drop for WaitGuard<'_> {
    fn drop(&mut self) {
        self.waits.0.lock().waiting = self.outer;
    }
}

/// Long waits are written to the log as long as this lives.
pub(crate) struct WaitLog(Arc<Shared>);

impl Drop for WaitLog {
    fn drop(&mut self) {
        self.0.lock().is_over = true;
        self.0.over.notify_all();
    }
}

fn log_long_waits(shared: &Shared, whose: &str) {
    const LONG: Duration = Duration::from_secs(1);
    /// How often is looked.
    const LOOK: Duration = Duration::from_millis(200);
    let mut logged = None;
    let mut state = shared.lock();
    while !state.is_over {
        state = shared
            .over
            .wait_timeout(state, LOOK)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        let Some(waiting) = state.waiting else {
            continue;
        };
        let time = waiting.since.elapsed();
        if time < LONG || logged == Some(waiting) {
            continue;
        }
        logged = Some(waiting);
        // Nobody waits for a log that is slow.
        drop(state);
        let (wait, name) = (waiting.wait, waiting.wait.as_str());
        if wait.is_usual() {
            tracing::info!(wait = name, ?time, "{whose} waits for {wait}");
        } else {
            tracing::warn!(wait = name, ?time, "{whose} waits for {wait}");
        }
        state = shared.lock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_shown_as_long_as_it_lasts() {
        let waits = Waits::default();
        let now = || waits.now().map(|waiting| waiting.wait);
        assert_eq!(now(), None);
        {
            let _outer = waits.begin(Wait::Standstill);
            assert_eq!(now(), Some(Wait::Standstill));
            {
                let _part = waits.begin(Wait::Storage);
                assert_eq!(now(), Some(Wait::Standstill));
            }
            assert_eq!(now(), Some(Wait::Standstill));
        }
        assert_eq!(now(), None);
    }

    #[test]
    fn a_wait_with_interruptions_keeps_its_beginning() {
        let waits = Waits::default();
        let since = Instant::now();
        for _ in 0..3 {
            let _guard = waits.go_on(Wait::Transmission, since);
            assert_eq!(waits.now().unwrap().since, since);
        }
    }
}
