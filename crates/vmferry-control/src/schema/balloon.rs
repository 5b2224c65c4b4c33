//! The balloon.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

/// Arguments of `balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Bytes of RAM that the guest is to make do with.
    #[serde(deserialize_with = "size")]
    pub value: u64,
}

/// Answer to `query-balloon`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonInfo {
    /// Bytes of RAM that the guest has left.
    pub actual: u64,
    /// What the guest told of its memory after the last query, by QEMU's names without their `stat-`: `free-memory`
    /// and so on. Sizes are in bytes.
    #[serde(
        rename = "x-vmferry-stats",
        skip_serializing_if = "BTreeMap::is_empty",
        default
    )]
    pub stats: BTreeMap<String, u64>,
}

/// Data of [`Event::BalloonChange`](super::Event::BalloonChange).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonChangeData {
    /// Bytes of RAM that the guest has left.
    pub actual: u64,
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    match i64::deserialize(deserializer)? {
        bytes @ 1.. => Ok(bytes.unsigned_abs()),
        _ => Err(D::Error::custom("Parameter 'target' expects a size")),
    }
}
