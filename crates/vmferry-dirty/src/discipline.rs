//! The three ways to keep bitmap and count right while several threads clear bits.

use std::fmt;
use std::str::FromStr;

/// How the threads that clear dirty bits keep out of each other's way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Discipline {
    /// A mutex taken for every single bit that is cleared: the baseline, kept for measurement.
    PerBitLock,
    /// A mutex taken once for a slice of the migration thread's work, which the 50 ms rule bounds. A hint may
    /// have to wait that long.
    SliceLock,
    /// No lock: words of the bitmap are taken atomically, counts are kept locally and published now and then.
    #[default]
    LockFree,
}

impl Discipline {
    /// All of them, in order of age.
    pub const ALL: [Discipline; 3] = [
        Discipline::PerBitLock,
        Discipline::SliceLock,
        Discipline::LockFree,
    ];

    /// The name in options and on the monitor.
    pub fn as_str(self) -> &'static str {
        match self {
            Discipline::PerBitLock => "per-bit-lock",
            Discipline::SliceLock => "slice-lock",
            Discipline::LockFree => "lock-free",
        }
    }
}

impl fmt::Display for Discipline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A name that is no discipline's.
#[derive(Debug, thiserror::Error)]
#[error("unknown discipline '{0}': use lock-free, slice-lock or per-bit-lock")]
pub struct UnknownDiscipline(String);

impl FromStr for Discipline {
    type Err = UnknownDiscipline;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Discipline::ALL
            .into_iter()
            .find(|d| d.as_str() == name)
            .ok_or_else(|| UnknownDiscipline(name.to_owned()))
    }
}
