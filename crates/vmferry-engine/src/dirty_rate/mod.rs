//! How fast a guest dirties its memory: the figure that decides whether, and how well, it can be moved.
//!
//! Three methods, as in QEMU's `calc-dirty-rate`:
//!
//! | [`Method`] | looks at | counts | the guest pays with |
//! |---|---|---|---|
//! | `PageSampling` | the content of some pages, at the beginning and at the end | the share that changed | nothing |
//! | `DirtyBitmap` | the dirty log, at the end | pages written | a fault at the first write to a page |
//! | `DirtyRing` | the dirty log, ten times a second | pages written in each tenth, by each vCPU | such a fault each time |
//!
//! The first two count a page once, however often it is written meanwhile. So they never measure more than all RAM
//! divided by the time, and less over a long time than over a short one if the guest writes the same pages again
//! and again. Neither is wrong: a pre-copy pass sends a page once, too. Choose a time of about one pass.
//!
//! Page sampling is an estimate. With `n` pages looked at and a share of `p` of them changed, its standard error
//! is about `sqrt(p * (1 - p) / n)` of all RAM: 512 pages of 1 GiB of which a tenth changed give 102 MiB, give or
//! take 14. A page that is written with what it held already counts as clean.
//!
//! The log may name pages that were only read. KVM's does for a while after it was switched on: the first write to a
//! huge page splits it, and a page of the rest that is read next is mapped writable, and logged, at once. A migration
//! sends these pages, so they are no error.
//!
//! Unlike QEMU, which leaves out RAM blocks below 128 MiB when it samples, every block is sampled, with one page at
//! least: small guests move, too.

mod logged;
mod sampling;

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_dirty::LogError;

use crate::cancel::CancelToken;
use crate::seam::Guest;

/// How a dirty rate is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Pages chosen at random are compared with what they held before.
    PageSampling {
        /// How many, of each GiB of RAM. At least one page of each RAM block is looked at.
        pages_per_gib: u64,
    },
    /// The pages in the dirty log are counted at the end. Takes a log of any kind.
    DirtyBitmap,
    /// The dirty log is emptied again and again, and tells which vCPU wrote: a dirty ring does.
    DirtyRing,
}

impl Method {
    /// Pages of each GiB that are sampled if nobody says how many: QEMU's default.
    pub const DEFAULT_SAMPLE: u64 = 512;

    /// All of them.
    pub const ALL: [Method; 3] = [
        Method::PageSampling {
            pages_per_gib: Method::DEFAULT_SAMPLE,
        },
        Method::DirtyBitmap,
        Method::DirtyRing,
    ];

    /// The name in options and on the monitor: QEMU's.
    pub fn as_str(self) -> &'static str {
        match self {
            Method::PageSampling { .. } => "page-sampling",
            Method::DirtyBitmap => "dirty-bitmap",
            Method::DirtyRing => "dirty-ring",
        }
    }

    /// Whether it needs the guest's dirty log, which then nobody else may use.
    pub fn uses_log(self) -> bool {
        match self {
            Method::PageSampling { .. } => false,
            Method::DirtyBitmap | Method::DirtyRing => true,
        }
    }
}

impl Default for Method {
    fn default() -> Self {
        Method::PageSampling {
            pages_per_gib: Method::DEFAULT_SAMPLE,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A name that is no method's.
#[derive(Debug, thiserror::Error)]
#[error("unknown mode '{0}': use page-sampling, dirty-bitmap or dirty-ring")]
pub struct UnknownMethod(String);

impl FromStr for Method {
    type Err = UnknownMethod;

    /// Sampling takes [`Method::DEFAULT_SAMPLE`] pages.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Method::ALL
            .into_iter()
            .find(|method| method.as_str() == name)
            .ok_or_else(|| UnknownMethod(name.to_owned()))
    }
}

/// Why a dirty rate was not measured.
#[derive(Debug, thiserror::Error)]
pub enum DirtyRateError {
    /// The process has no resources left for it.
    #[error("cannot start measuring the dirty rate: {0}")]
    Resources(#[from] io::Error),
    /// [`Method::DirtyRing`] with another log.
    #[error(
        "mode dirty-ring needs a dirty log that tells which vCPU wrote: start the guest with '--dirty-log ring', or \
         use another mode"
    )]
    NoRing,
    /// The dirty log failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// It was given up.
    #[error("the measurement was cancelled")]
    Cancelled,
}

/// A dirty rate, as measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Pages dirtied a second.
    pub pages_per_second: u64,
    /// The same for each vCPU, vCPU 0 first; only [`Method::DirtyRing`] knows.
    pub per_vcpu: Option<Vec<u64>>,
}

/// What has become of a measurement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is under way.
    Measuring,
    /// It is done.
    Measured(Rate),
    /// It failed, for this reason.
    Failed(String),
}

/// A measurement: under way on a thread of its own, or over.
///
/// A [`Method`] that uses the log must have it for itself: no migration of the guest may be under way, and none may
/// be started before this value is dropped or its [`progress`](Self::progress) is no longer
/// [`Progress::Measuring`]. Dropping it ends the measurement at once, and the log is off then.
pub struct DirtyRate {
    method: Method,
    time: Duration,
    cancel: CancelToken,
    outcome: Arc<OnceLock<Result<Rate, DirtyRateError>>>,
    thread: Option<JoinHandle<()>>,
}

impl DirtyRate {
    /// Starts to watch `guest` for `time`. Returns at once.
    ///
    /// # Errors
    ///
    /// The guest's dirty log does not do what the method needs, or the process has no resources left.
    pub fn start(
        guest: Arc<dyn Guest>,
        method: Method,
        time: Duration,
    ) -> Result<Self, DirtyRateError> {
        if method == Method::DirtyRing && guest.dirty_log().written_per_vcpu().is_none() {
            return Err(DirtyRateError::NoRing);
        }
        let cancel = CancelToken::new()?;
        let outcome = Arc::new(OnceLock::new());
        let thread = {
            let (cancel, outcome) = (cancel.clone(), outcome.clone());
            std::thread::Builder::new()
                .name("dirty-rate".to_owned())
                .spawn(move || {
                    let measured = measure(&guest, method, time, &cancel);
                    outcome
                        .set(measured)
                        .expect("nobody else sets the measurement's outcome");
                })?
        };
        Ok(DirtyRate {
            method,
            time,
            cancel,
            outcome,
            thread: Some(thread),
        })
    }

    /// How it measures.
    pub fn method(&self) -> Method {
        self.method
    }

    /// For how long it was to measure.
    pub fn time(&self) -> Duration {
        self.time
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        // Asked first: a thread that has ended has left its outcome, unless it panicked.
        let over = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        match self.outcome.get() {
            Some(Ok(rate)) => Progress::Measured(rate.clone()),
            Some(Err(error)) => Progress::Failed(error.to_string()),
            None if over => Progress::Failed("the measuring thread panicked".to_owned()),
            None => Progress::Measuring,
        }
    }
}

/// Ends the measurement, if it is not over, and waits for its end.
impl Drop for DirtyRate {
    fn drop(&mut self) {
        self.cancel.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn measure(
    guest: &Arc<dyn Guest>,
    method: Method,
    time: Duration,
    cancel: &CancelToken,
) -> Result<Rate, DirtyRateError> {
    let started = Instant::now();
    let measured = match method {
        Method::PageSampling { pages_per_gib } => {
            let mut rng = fastrand::Rng::new();
            sampling::measure(guest.ram(), pages_per_gib, &mut rng, time, cancel)
        }
        Method::DirtyBitmap => logged::by_bitmap(guest, time, cancel),
        Method::DirtyRing => logged::by_ring(guest, time, cancel),
    };
    tracing::debug!(%method, ?time, took = ?started.elapsed(), ?measured, "dirty rate");
    measured
}

/// Waits for `time`, or fails if cancelled first.
fn wait(time: Duration, cancel: &CancelToken) -> Result<(), DirtyRateError> {
    match cancel.wait(time) {
        true => Err(DirtyRateError::Cancelled),
        false => Ok(()),
    }
}

fn check(cancel: &CancelToken) -> Result<(), DirtyRateError> {
    match cancel.is_cancelled() {
        true => Err(DirtyRateError::Cancelled),
        false => Ok(()),
    }
}

fn per_second(pages: f64, time: Duration) -> u64 {
    (pages / time.as_secs_f64().max(1e-6)).round() as u64
}
