//! Announcements: how network interfaces tell where a guest is.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

/// Arguments of `announce-self`. The times and the number have the ranges that QEMU has for the parameters of
/// migrations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnnounceSelf {
    /// Milliseconds from the first announcement, which is made at once, to the second, up to 100,000.
    #[serde(deserialize_with = "initial")]
    pub initial: u64,
    /// The most milliseconds between two announcements, up to 100,000.
    #[serde(deserialize_with = "max")]
    pub max: u64,
    /// How many announcements there are, up to 1000.
    #[serde(deserialize_with = "rounds")]
    pub rounds: u64,
    /// Milliseconds by which each time between two is longer than the one before, up to 10,000.
    #[serde(deserialize_with = "step")]
    pub step: u64,
    /// The interfaces that announce themselves; all of them if there is no list.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub interfaces: Option<Vec<String>>,
    /// A name for the announcement, which QEMU's clients may give. An interface has one announcement at a time here, and
    /// a new one takes its place whatever its name is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
}

/// A number in a range that begins with 0, with QEMU's answer to all others.
fn up_to<'de, D: Deserializer<'de>>(
    deserializer: D,
    (name, most): (&str, u64),
) -> Result<u64, D::Error> {
    match u64::deserialize(deserializer)? {
        value if value <= most => Ok(value),
        _ => Err(D::Error::custom(format!(
            "Parameter 'announce_{name}' expects a value between 0 and {most}"
        ))),
    }
}

pub(super) fn initial<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    up_to(deserializer, ("initial", 100_000))
}

pub(super) fn max<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    up_to(deserializer, ("max", 100_000))
}

pub(super) fn rounds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    up_to(deserializer, ("rounds", 1000))
}

pub(super) fn step<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    up_to(deserializer, ("step", 10_000))
}
