//! Migration parameters: numbers and choices that steer a migration.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use vmferry_engine::Discipline;

use super::{announce, as_text};

/// The largest `downtime-limit`, in milliseconds: QEMU's.
pub const MAX_DOWNTIME_LIMIT_MS: u64 = 2_000_000;

/// The largest `x-vmferry-peer-timeout`, in milliseconds: one day.
pub const MAX_PEER_TIMEOUT_MS: u64 = 86_400_000;

/// The bounds of `x-vmferry-arming-chunk`, in bytes: what one word of a bitmap stands for, and what one KVM memory
/// slot can hold.
pub const ARMING_CHUNK_BYTES: std::ops::RangeInclusive<u64> = 256 << 10..=8 << 40;

/// Answer to `query-migrate-parameters`: all that can be set, with the values in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// Milliseconds from the first announcement of a guest that has arrived, which is made at once, to the second.
    pub announce_initial: u64,
    /// The most milliseconds between two announcements.
    pub announce_max: u64,
    /// How often a guest that has arrived is announced to its networks.
    pub announce_rounds: u64,
    /// Milliseconds by which each time between two announcements is longer than the one before.
    pub announce_step: u64,
    /// Milliseconds that the guest may stand still at the hand-over, up to [`MAX_DOWNTIME_LIMIT_MS`].
    pub downtime_limit: u64,
    /// Bytes per second that the migration may send while the guest runs; 0 for no limit.
    pub max_bandwidth: u64,
    /// The discipline that the next migration clears its dirty bitmap by.
    #[serde(with = "as_text")]
    pub x_vmferry_discipline: Discipline,
    /// Bytes of RAM for which the next migration arms its dirty log at a time: a power of two (others are rounded
    /// up) in [`ARMING_CHUNK_BYTES`].
    pub x_vmferry_arming_chunk: u64,
    /// Milliseconds of silence after which the peer counts as lost, 1 to [`MAX_PEER_TIMEOUT_MS`].
    pub x_vmferry_peer_timeout: u64,
}

impl MigrationParameters {
    /// Puts the given values in force and keeps the others.
    pub fn apply(&mut self, changes: MigrateSetParameters) {
        let MigrateSetParameters {
            announce_initial,
            announce_max,
            announce_rounds,
            announce_step,
            downtime_limit,
            max_bandwidth,
            x_vmferry_discipline,
            x_vmferry_arming_chunk,
            x_vmferry_peer_timeout,
        } = changes;
        self.announce_initial = announce_initial.unwrap_or(self.announce_initial);
        self.announce_max = announce_max.unwrap_or(self.announce_max);
        self.announce_rounds = announce_rounds.unwrap_or(self.announce_rounds);
        self.announce_step = announce_step.unwrap_or(self.announce_step);
        self.downtime_limit = downtime_limit.unwrap_or(self.downtime_limit);
        self.max_bandwidth = max_bandwidth.unwrap_or(self.max_bandwidth);
        self.x_vmferry_discipline = x_vmferry_discipline.unwrap_or(self.x_vmferry_discipline);
        self.x_vmferry_arming_chunk = x_vmferry_arming_chunk.unwrap_or(self.x_vmferry_arming_chunk);
        self.x_vmferry_peer_timeout = x_vmferry_peer_timeout.unwrap_or(self.x_vmferry_peer_timeout);
    }
}

/// Arguments of `migrate-set-parameters`: the values to change, each as in [`MigrationParameters`]. Values that
/// come off the wire are within their ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct MigrateSetParameters {
    /// Milliseconds, up to 100,000.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "announce_initial"
    )]
    pub announce_initial: Option<u64>,
    /// Milliseconds, up to 100,000.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "announce_max"
    )]
    pub announce_max: Option<u64>,
    /// A number, up to 1000.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "announce_rounds"
    )]
    pub announce_rounds: Option<u64>,
    /// Milliseconds, up to 10,000.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "announce_step"
    )]
    pub announce_step: Option<u64>,
    /// Milliseconds.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "downtime_limit"
    )]
    pub downtime_limit: Option<u64>,
    /// Bytes per second, 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// A discipline.
    #[serde(with = "as_text::option", skip_serializing_if = "Option::is_none")]
    pub x_vmferry_discipline: Option<Discipline>,
    /// Bytes.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "arming_chunk"
    )]
    pub x_vmferry_arming_chunk: Option<u64>,
    /// Milliseconds.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "peer_timeout"
    )]
    pub x_vmferry_peer_timeout: Option<u64>,
}

fn announce_initial<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    announce::initial(deserializer).map(Some)
}

fn announce_max<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    announce::max(deserializer).map(Some)
}

fn announce_rounds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    announce::rounds(deserializer).map(Some)
}

fn announce_step<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    announce::step(deserializer).map(Some)
}

fn downtime_limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let limit = Option::deserialize(deserializer)?;
    if limit.is_some_and(|limit| limit > MAX_DOWNTIME_LIMIT_MS) {
        return Err(D::Error::custom(
            "Parameter 'downtime-limit' expects an integer in the range of 0 to (2000 * 1000) ms",
        ));
    }
    Ok(limit)
}

fn arming_chunk<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let bytes = Option::deserialize(deserializer)?;
    if bytes.is_some_and(|bytes| !ARMING_CHUNK_BYTES.contains(&bytes)) {
        return Err(D::Error::custom(format!(
            "Parameter 'x-vmferry-arming-chunk' expects an integer in the range of {} to {} bytes",
            ARMING_CHUNK_BYTES.start(),
            ARMING_CHUNK_BYTES.end()
        )));
    }
    Ok(bytes)
}

fn peer_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let timeout = Option::deserialize(deserializer)?;
    if timeout.is_some_and(|timeout| !(1..=MAX_PEER_TIMEOUT_MS).contains(&timeout)) {
        return Err(D::Error::custom(format!(
            "Parameter 'x-vmferry-peer-timeout' expects an integer in the range of 1 to {MAX_PEER_TIMEOUT_MS} ms"
        )));
    }
    Ok(timeout)
}
