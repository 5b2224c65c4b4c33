//! The machine that the figures are of.

use std::fmt;
use std::fs;

use serde::Serialize;

/// What a reader of the figures must know about the host.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// Processors that this program may use.
    pub cpus: usize,
    /// What they call themselves.
    pub model: String,
    /// The kernel's release.
    pub kernel: String,
}

impl Host {
    /// This machine.
    pub fn this() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, model)| model);
        let uname = rustix::system::uname();
        Host {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            model: model.to_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Host {
            cpus,
            model,
            kernel,
        } = self;
        write!(f, "{cpus} CPUs ({model}), Linux {kernel}")
    }
}
