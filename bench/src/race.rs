//! One migration with one VMM, measured.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::Serialize;
use serde_json::json;

use crate::case::Case;
use crate::felt::{BEATS_AFTER, Felt};
use crate::interrupt::Interrupt;
use crate::peer::{Peer, Role};
use crate::serial::Beat;
use crate::vm::Vm;

/// How long to watch the guest after its move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// A few seconds.
    Shortly,
    /// Until it has verified all its memory where it is now.
    FullSweep,
}

/// What was measured. Times are in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Run {
    /// From before the destination's process is started to its `RESUME`: all that a move takes.
    pub whole_ms: f64,
    /// `total-time` of the source's `query-migrate`.
    pub total_ms: f64,
    /// For how long the guest did not run, as it felt it: see [`crate::felt`].
    pub felt_ms: f64,
    /// Of that, how far the guest's clock fell behind.
    pub clock_lost_ms: f64,
    /// The longest time for which the guest did not run in any second before the move.
    pub before_ms: f64,
    /// From the source's `STOP` to the destination's `RESUME`, by their timestamps.
    pub stopped_ms: f64,
    /// `downtime` of the source's `query-migrate`, for what each takes that to be.
    pub downtime_ms: f64,
    /// Bytes sent.
    pub bytes: u64,
    /// Passes over the guest's memory: fetches of the dirty log.
    pub passes: u64,
    /// Bytes of memory that the destination had already when the command was given.
    pub resident: u64,
    /// CPU time of the source and its guest, from the destination's start to the arrival.
    pub source_cpu_ms: f64,
    /// CPU time of the destination and its guest, likewise: all that it has used.
    pub destination_cpu_ms: f64,
    /// Pages that the guest verified after the move.
    pub verified: u64,
    /// Pages that the guest found corrupt, before the move or after.
    pub corrupt: u64,
}

/// Boots a guest on a source, moves it to a destination, and watches it there.
///
/// # Errors
/// Any of it failed. Corrupt pages are no error here.
pub fn run(
    peer: &Peer,
    case: &Case,
    elf: &Path,
    watch: Watch,
    interrupt: &Interrupt,
) -> anyhow::Result<Run> {
    let dir = tempfile::tempdir().context("cannot create a directory for sockets")?;
    let start = |role| Vm::start(peer, role, case, elf, dir.path(), interrupt);
    let mut source = start(Role::Source)?;
    source.settle()?;

    // Not before it is needed, and what it does before the command counts: a destination may get its
    // memory ready while it waits, and given long enough no figure of the migration itself would show it.
    let source_cpu_before = source.cpu_time()?;
    let began = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let mut destination = start(Role::Destination)?;
    let uri = destination.listening()?;
    let resident = destination.resident()?;
    // QEMU's default would keep it at 128 MiB/s.
    let no_limit = json!({"max-bandwidth": 0});
    let info = source.migrate(&uri, no_limit)?;
    let resumed = destination.event("RESUME")?;
    let source_cpu = source.cpu_time()?.saturating_sub(source_cpu_before);
    let destination_cpu = destination.cpu_time()?;
    let stopped = resumed.saturating_sub(source.event("STOP")?);

    let before = source.beats(|_| true)?;
    // The source stays until then: giving its memory back to the host would disturb the guest.
    let after = destination.beats(|beats| beats.len() >= BEATS_AFTER)?;
    drop(source);
    let felt =
        Felt::new(&before, &after, stopped).context("the guest was not heard often enough")?;

    let arrived = after[0].heartbeat;
    let sweeps = match watch {
        Watch::Shortly => arrived.sweeps,
        // A sweep that ends now may have begun on the source: the one after it is all of this side.
        Watch::FullSweep => arrived.sweeps + 2,
    };
    let swept = |beat: &Beat| beat.heartbeat.sweeps >= sweeps;
    let beats = destination.beats(|beats| beats.last().is_some_and(swept))?;
    let last = beats[beats.len() - 1].heartbeat;

    let ram = info.ram.unwrap_or_default();
    Ok(Run {
        whole_ms: millis(resumed.saturating_sub(began)),
        total_ms: info.total_time.unwrap_or(0) as f64,
        felt_ms: millis(felt.downtime()),
        clock_lost_ms: millis(felt.clock_lost),
        before_ms: millis(felt.before),
        stopped_ms: millis(stopped),
        downtime_ms: info.downtime.unwrap_or(0) as f64,
        bytes: ram.transferred,
        passes: ram.dirty_sync_count,
        resident,
        source_cpu_ms: millis(source_cpu),
        destination_cpu_ms: millis(destination_cpu),
        verified: last.verified.saturating_sub(arrived.verified),
        corrupt: last.corrupt,
    })
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
