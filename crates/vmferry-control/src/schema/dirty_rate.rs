//! Measuring how fast a guest dirties its memory.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmferry_engine::dirty_rate::Method;

/// How long a measurement may take: QEMU's bounds.
pub const CALC_TIME_RANGE: RangeInclusive<Duration> =
    Duration::from_millis(50)..=Duration::from_secs(60);

/// Pages of each GiB that may be sampled: QEMU's bounds.
pub const SAMPLE_PAGES_RANGE: RangeInclusive<u64> = 128..=16384;

/// The unit of a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeUnit {
    /// Seconds.
    #[default]
    Second,
    /// Thousandths of a second.
    Millisecond,
}

impl TimeUnit {
    /// A time in this unit, whole ones only.
    pub fn count(self, time: Duration) -> u64 {
        let count = match self {
            TimeUnit::Second => time.as_secs().into(),
            TimeUnit::Millisecond => time.as_millis(),
        };
        u64::try_from(count).unwrap_or(u64::MAX)
    }

    /// So many of this unit.
    fn duration(self, count: u64) -> Duration {
        match self {
            TimeUnit::Second => Duration::from_secs(count),
            TimeUnit::Millisecond => Duration::from_millis(count),
        }
    }
}

/// How a dirty rate is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateMeasureMode {
    /// By the content of some pages, before and after.
    #[default]
    PageSampling,
    /// By the dirty log, fetched again and again, for each vCPU.
    DirtyRing,
    /// By the dirty log, fetched at the end.
    DirtyBitmap,
}

impl From<Method> for DirtyRateMeasureMode {
    fn from(method: Method) -> Self {
        match method {
            Method::PageSampling { .. } => DirtyRateMeasureMode::PageSampling,
            Method::DirtyRing => DirtyRateMeasureMode::DirtyRing,
            Method::DirtyBitmap => DirtyRateMeasureMode::DirtyBitmap,
        }
    }
}

/// Arguments of `calc-dirty-rate`: within their ranges, and such that they go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "CalcDirtyRateMembers")]
pub struct CalcDirtyRate {
    /// How long to measure, within [`CALC_TIME_RANGE`].
    pub calc_time: Duration,
    /// How.
    pub method: Method,
}

/// What QEMU calls them on the wire.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct CalcDirtyRateMembers {
    calc_time: i64,
    #[serde(default)]
    calc_time_unit: TimeUnit,
    sample_pages: Option<i64>,
    #[serde(default)]
    mode: DirtyRateMeasureMode,
}

impl TryFrom<CalcDirtyRateMembers> for CalcDirtyRate {
    type Error = String;

    fn try_from(members: CalcDirtyRateMembers) -> Result<Self, String> {
        let calc_time = u64::try_from(members.calc_time)
            .ok()
            .map(|count| members.calc_time_unit.duration(count))
            .filter(|time| CALC_TIME_RANGE.contains(time))
            .ok_or("Parameter 'calc-time' expects a time in the range of 50 ms to 60 s")?;
        let sample_pages = match members.sample_pages {
            None => Method::DEFAULT_SAMPLE,
            Some(_) if members.mode != DirtyRateMeasureMode::PageSampling => {
                return Err("Parameter 'sample-pages' is for mode page-sampling only".to_owned());
            }
            Some(pages) => u64::try_from(pages)
                .ok()
                .filter(|pages| SAMPLE_PAGES_RANGE.contains(pages))
                .ok_or(
                    "Parameter 'sample-pages' expects an integer in the range of 128 to 16384",
                )?,
        };
        let method = match members.mode {
            DirtyRateMeasureMode::PageSampling => Method::PageSampling {
                pages_per_gib: sample_pages,
            },
            DirtyRateMeasureMode::DirtyRing => Method::DirtyRing,
            DirtyRateMeasureMode::DirtyBitmap => Method::DirtyBitmap,
        };
        Ok(CalcDirtyRate { calc_time, method })
    }
}

/// Arguments of `query-dirty-rate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QueryDirtyRate {
    /// The unit that `calc-time` is wanted in.
    #[serde(default)]
    pub calc_time_unit: TimeUnit,
}

/// How far a measurement is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateStatus {
    /// There was none, or it was ended before it was done.
    #[default]
    Unstarted,
    /// It is under way.
    Measuring,
    /// It is done.
    Measured,
}

/// Answer to `query-dirty-rate`: the current or the last measurement.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRateInfo {
    /// MiB that the guest dirtied a second, once measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_rate: Option<u64>,
    /// How far it is.
    pub status: DirtyRateStatus,
    /// When it was started, in seconds since 1970; 0 if never.
    pub start_time: u64,
    /// How long it was to take, in the unit that was asked for; fractions of it are left out.
    pub calc_time: u64,
    /// That unit.
    pub calc_time_unit: TimeUnit,
    /// Pages sampled of each GiB; 0 in other modes.
    pub sample_pages: u64,
    /// How it was measured.
    pub mode: DirtyRateMeasureMode,
    /// The rate of each vCPU, once measured in mode dirty-ring.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu_dirty_rate: Option<Vec<DirtyRateVcpu>>,
    /// Pages that the guest dirtied a second, once measured: `dirty-rate`, more finely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_vmferry_dirty_pages_rate: Option<u64>,
}

/// How fast one vCPU dirties memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRateVcpu {
    /// Number of the vCPU, from 0.
    pub id: u64,
    /// MiB a second.
    pub dirty_rate: u64,
}
