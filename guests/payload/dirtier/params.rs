//! The parameters on the command line.

use core::fmt;

use super::pacer::Rate;
use super::page::{BYTES, Fill};
use super::rt::cmdline;

/// In which order the working set is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// One page after the other.
    Sequential,
    /// Any page.
    Random,
    /// Nine writes of ten go to the first tenth of the pages, the others anywhere.
    Hot,
}

/// What a vCPU does when nothing is due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Idle {
    /// Sleeps until the next tick of its timer, a millisecond at most.
    Halt,
    /// Spins, and so uses a whole host CPU.
    Spin,
}

/// Whether pages of the working set are freed and allocated, and the balloon told which are free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hints {
    /// All pages are always in use.
    Off,
    /// The machine needs a balloon that takes free-page hints.
    On,
}

/// All parameters; see the table in the crate's README.
#[derive(PartialEq, Eq, Debug)]
pub struct Params {
    /// Pages in the working set.
    pub ws: u64,
    /// Pages that are written once.
    pub cold: u64,
    /// Pages written a second, by all vCPUs together.
    pub rate: Rate,
    /// Order of the writes.
    pub pattern: Pattern,
    /// Content of the working set.
    pub fill: Fill,
    /// Content of the cold pages.
    pub cold_fill: Fill,
    /// Makes one run's content differ from another's.
    pub seed: u64,
    /// vCPUs to use.
    pub vcpus: u64,
    /// Pages that each vCPU verifies a second, besides those it writes. `None`: all it owns in 20 s.
    pub sweep: Option<u64>,
    /// How long to run. `None`: for ever.
    pub seconds: Option<u64>,
    /// What to do when nothing is due.
    pub idle: Idle,
    /// Whether pages are freed.
    pub hints: Hints,
}

/// A parameter that cannot be used.
#[derive(PartialEq, Eq, Debug)]
pub enum Error<'a> {
    /// There is no such parameter.
    Unknown(&'a str),
    /// Its value is not one of those described.
    Value {
        /// The parameter.
        key: &'a str,
        /// The value given.
        value: &'a str,
        /// What it must be.
        must: &'static str,
    },
}

impl fmt::Display for Error<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Unknown(key) => write!(
                f,
                "unknown parameter {key:?}; there are: ws rate pattern fill cold cold_fill seed vcpus \
                 sweep seconds sleep hints"
            ),
            Self::Value { key, value, must } => write!(f, "{key}={value:?}: must be {must}"),
        }
    }
}

const SIZE: &str = "a number of bytes, like 4096, 512K, 64M or 2G";
const NUMBER: &str = "a number";
const FILLS: &str = "zero, text or random";

impl Params {
    /// What holds when the command line says nothing.
    pub const DEFAULT: Self = Self {
        ws: (64 << 20) / BYTES as u64,
        cold: 0,
        rate: Rate::PerSecond(10_000),
        pattern: Pattern::Sequential,
        fill: Fill::Random,
        cold_fill: Fill::Random,
        seed: 1,
        vcpus: 1,
        sweep: None,
        seconds: None,
        idle: Idle::Halt,
        hints: Hints::Off,
    };

    /// Reads a command line. A parameter given twice counts as given last.
    pub fn parse(line: &str) -> Result<Self, Error<'_>> {
        let mut params = Self::DEFAULT;
        for (key, value) in cmdline::words(line) {
            let bad = |must| Error::Value { key, value, must };
            let bytes = || cmdline::bytes(value).ok_or(bad(SIZE));
            let pages = || bytes().map(|bytes| bytes.div_ceil(BYTES as u64));
            let number = || cmdline::number(value).ok_or(bad(NUMBER));
            match key {
                "ws" => params.ws = pages()?,
                "cold" => params.cold = pages()?,
                "rate" => {
                    params.rate = match number()? {
                        0 => Rate::Unlimited,
                        pages => Rate::PerSecond(pages),
                    }
                }
                "pattern" => {
                    params.pattern = match value {
                        "seq" => Pattern::Sequential,
                        "random" => Pattern::Random,
                        "hot" => Pattern::Hot,
                        _ => return Err(bad("seq, random or hot")),
                    }
                }
                "fill" => params.fill = fill(value).ok_or(bad(FILLS))?,
                "cold_fill" => params.cold_fill = fill(value).ok_or(bad(FILLS))?,
                "seed" => params.seed = number()?,
                "vcpus" => {
                    params.vcpus = match number()? {
                        0 => return Err(bad("at least 1")),
                        vcpus => vcpus,
                    }
                }
                "sweep" => params.sweep = Some(number()?),
                "seconds" => params.seconds = Some(number()?).filter(|&seconds| seconds != 0),
                "sleep" => {
                    params.idle = match value {
                        "hlt" => Idle::Halt,
                        "spin" => Idle::Spin,
                        _ => return Err(bad("hlt or spin")),
                    }
                }
                "hints" => {
                    params.hints = match value {
                        "off" => Hints::Off,
                        "on" => Hints::On,
                        _ => return Err(bad("off or on")),
                    }
                }
                _ => return Err(Error::Unknown(key)),
            }
        }
        Ok(params)
    }
}

fn fill(value: &str) -> Option<Fill> {
    match value {
        "zero" => Some(Fill::Zero),
        "text" => Some(Fill::Text),
        "random" => Some(Fill::Random),
        _ => None,
    }
}

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Zero => "zero",
            Self::Text => "text",
            Self::Random => "random",
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Sequential => "seq",
            Self::Random => "random",
            Self::Hot => "hot",
        })
    }
}

impl fmt::Display for Idle {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Halt => "hlt",
            Self::Spin => "spin",
        })
    }
}

impl fmt::Display for Hints {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::On => "on",
        })
    }
}

impl fmt::Display for Rate {
    /// As on the command line: 0 is unlimited.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Unlimited => f.write_str("0"),
            Self::PerSecond(pages) => pages.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_the_default() {
        assert_eq!(Params::parse(""), Ok(Params::DEFAULT));
    }

    #[test]
    fn everything() {
        let line = "ws=1G rate=50000 pattern=hot fill=zero cold=10K cold_fill=text seed=9 vcpus=4 \
                    sweep=0 seconds=30 sleep=spin hints=on";
        let all = Params {
            ws: 262_144,
            cold: 3,
            rate: Rate::PerSecond(50_000),
            pattern: Pattern::Hot,
            fill: Fill::Zero,
            cold_fill: Fill::Text,
            seed: 9,
            vcpus: 4,
            sweep: Some(0),
            seconds: Some(30),
            idle: Idle::Spin,
            hints: Hints::On,
        };
        assert_eq!(Params::parse(line), Ok(all));
    }

    #[test]
    fn zero_rate_is_unlimited_and_zero_seconds_for_ever() {
        let params = Params::parse("rate=0 seconds=0").unwrap();
        assert_eq!((params.rate, params.seconds), (Rate::Unlimited, None));
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(Params::parse("quiet"), Err(Error::Unknown("quiet")));
        for bad in [
            "ws=",
            "ws=1T",
            "rate=x",
            "pattern=hott",
            "fill=",
            "vcpus=0",
            "sleep=1",
            "hints=yes",
        ] {
            let (key, value) = bad.split_once('=').unwrap();
            let error = Params::parse(bad).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("{key}={value:?}: must be ")),
                "{error}"
            );
        }
    }
}
