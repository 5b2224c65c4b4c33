//! The figures of all runs, for people and for programs.

use std::fmt;

use serde_json::{Map, Value, json};

use crate::case::Case;
use crate::median::Median;
use crate::peer::Peer;
use crate::race::Run;

/// Something that is compared.
struct Metric {
    /// Its name in JSON.
    key: &'static str,
    /// Its name in tables, with its unit.
    name: &'static str,
    /// Digits after the point, in tables.
    digits: usize,
    of: fn(&Run) -> f64,
}

const MIB: f64 = (1 << 20) as f64;

#[rustfmt::skip]
const METRICS: &[Metric] = &[
    Metric { key: "whole-ms", name: "whole move, ms", digits: 0, of: |run| run.whole_ms },
    Metric { key: "total-ms", name: "total time as reported, ms", digits: 0, of: |run| run.total_ms },
    Metric { key: "felt-ms", name: "downtime felt by the guest, ms", digits: 1, of: |run| run.felt_ms },
    Metric { key: "clock-lost-ms", name: "  of that, its clock stood still", digits: 1, of: |run| run.clock_lost_ms },
    Metric { key: "before-ms", name: "  longest gap before the move", digits: 1, of: |run| run.before_ms },
    Metric { key: "stopped-ms", name: "from STOP to RESUME, ms", digits: 1, of: |run| run.stopped_ms },
    Metric { key: "downtime-ms", name: "downtime as reported, ms", digits: 0, of: |run| run.downtime_ms },
    Metric { key: "sent-mib", name: "sent, MiB", digits: 1, of: |run| run.bytes as f64 / MIB },
    Metric { key: "passes", name: "passes", digits: 0, of: |run| run.passes as f64 },
    Metric { key: "resident-mib", name: "destination has before, MiB", digits: 0, of: |run| run.resident as f64 / MIB },
    Metric { key: "source-cpu-ms", name: "CPU time of the source, ms", digits: 0, of: |run| run.source_cpu_ms },
    Metric { key: "destination-cpu-ms", name: "CPU time of the destination, ms", digits: 0, of: |run| run.destination_cpu_ms },
];

/// All runs of one VMM in one case.
#[derive(Clone, Debug)]
pub struct Series {
    /// The VMM.
    pub peer: Peer,
    /// The first run, in which the guest verified all its memory after the move. Its times do not count.
    pub warm_up: Option<Run>,
    /// The runs that count, in order.
    pub runs: Vec<Run>,
}

impl Series {
    /// The VMM's name in JSON.
    fn key(&self) -> String {
        self.peer.name().to_lowercase()
    }

    fn median(&self, metric: &Metric) -> Option<Median> {
        Median::of(self.runs.iter().map(metric.of))
    }

    /// Pages found corrupt, in any run.
    pub fn corrupt(&self) -> u64 {
        self.all().map(|run| run.corrupt).sum()
    }

    /// Pages verified after a move, in all runs.
    fn verified(&self) -> u64 {
        self.all().map(|run| run.verified).sum()
    }

    fn all(&self) -> impl Iterator<Item = &Run> {
        self.warm_up.iter().chain(&self.runs)
    }
}

/// One case, and all runs of it.
#[derive(Clone, Debug)]
pub struct CaseReport {
    /// The case.
    pub case: Case,
    /// What was compared: one VMM, or two.
    pub series: Vec<Series>,
}

impl CaseReport {
    /// The second by the first, if there are two and the first is not nothing.
    fn ratio(&self, metric: &Metric) -> Option<f64> {
        let [first, second] = &self.series[..] else {
            return None;
        };
        let (first, second) = (first.median(metric)?, second.median(metric)?);
        (first.median > 0.0).then(|| second.median / first.median)
    }

    /// For programs: the medians, and each run.
    pub fn json(&self) -> Value {
        let each = |of: &dyn Fn(&Series) -> Value| -> Map<String, Value> {
            let pair = |series| (Series::key(series), of(series));
            self.series.iter().map(pair).collect()
        };
        let metric = |metric: &Metric| {
            let mut medians = each(&|series| json!(series.median(metric)));
            medians.insert("ratio".to_owned(), json!(self.ratio(metric)));
            (metric.key.to_owned(), Value::Object(medians))
        };
        json!({
            "case": self.case,
            "medians": METRICS.iter().map(metric).collect::<Map<_, _>>(),
            "warm-up": each(&|series| json!(series.warm_up)),
            "runs": each(&|series| json!(series.runs)),
        })
    }
}

impl fmt::Display for CaseReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Case {
            name,
            about,
            cmdline,
            memory_mib: _,
        } = self.case;
        writeln!(f, "{name}: {about}\n  ({cmdline})")?;
        write!(f, "  {:34}", "")?;
        for series in &self.series {
            write!(f, "{:>26}", series.peer.name())?;
        }
        let compared = self.series.len() == 2;
        writeln!(f, "{}", if compared { "   ratio" } else { "" })?;
        for metric in METRICS {
            write!(f, "  {:34}", metric.name)?;
            for series in &self.series {
                let text = series.median(metric).map_or("-".to_owned(), |all| {
                    let digits = metric.digits;
                    let Median { median, min, max } = all;
                    format!("{median:.digits$} [{min:.digits$}, {max:.digits$}]")
                });
                write!(f, "{text:>26}")?;
            }
            match self.ratio(metric) {
                Some(ratio) => writeln!(f, "{ratio:>8.2}")?,
                None => writeln!(f)?,
            }
        }
        for (name, of) in [
            (
                "pages verified after the moves",
                Series::verified as fn(&Series) -> u64,
            ),
            ("pages corrupt", Series::corrupt),
        ] {
            write!(f, "  {name:34}")?;
            for series in &self.series {
                write!(f, "{:>26}", of(series))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
