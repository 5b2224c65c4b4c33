//! The machine's dirty rate, as the monitor's user has it measured: at most one measurement at a time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use vmferry_control::QmpError;
use vmferry_control::schema::{
    CalcDirtyRate, DirtyRateInfo, DirtyRateStatus, DirtyRateVcpu, TimeUnit,
};
use vmferry_engine::DirtyRate;
use vmferry_engine::dirty_rate::{Method, Progress};
use vmferry_vmm::Machine;

use super::monitor::generic;

/// The current or the last measurement. Whether one may be started is for [`super::migrations`] to decide: a
/// migration uses the same log.
#[derive(Default)]
pub struct Measurement(Mutex<Option<Started>>);

struct Started {
    at: SystemTime,
    rate: DirtyRate,
}

impl Started {
    fn is_under_way(&self) -> bool {
        self.rate.progress() == Progress::Measuring
    }
}

impl Measurement {
    fn with<T>(&self, f: impl FnOnce(&mut Option<Started>) -> T) -> T {
        // No holder leaves the data half changed.
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Starts one, unless one is under way.
    pub fn start(&self, machine: Arc<Machine>, request: CalcDirtyRate) -> Result<(), QmpError> {
        self.with(|last| {
            if last.as_ref().is_some_and(Started::is_under_way) {
                let why = "The dirty rate is being measured already: wait until query-dirty-rate says 'measured'";
                return Err(QmpError::generic(why));
            }
            let rate =
                DirtyRate::start(machine, request.method, request.calc_time).map_err(generic)?;
            *last = Some(Started {
                at: SystemTime::now(),
                rate,
            });
            Ok(())
        })
    }

    /// Ends one that is under way and uses the guest's log: it is as though there had been none.
    pub fn leave_log(&self) {
        self.with(|last| {
            if last
                .as_ref()
                .is_some_and(|started| started.rate.method().uses_log() && started.is_under_way())
            {
                *last = None;
            }
        });
    }

    /// Ends it, whatever it is.
    pub fn end(&self) {
        self.with(Option::take);
    }

    /// What has come of it.
    pub fn info(&self, unit: TimeUnit) -> Result<DirtyRateInfo, QmpError> {
        self.with(|last| match last {
            None => Ok(DirtyRateInfo {
                calc_time_unit: unit,
                ..DirtyRateInfo::default()
            }),
            Some(started) => started.info(unit),
        })
    }
}

impl Started {
    fn info(&self, unit: TimeUnit) -> Result<DirtyRateInfo, QmpError> {
        let method = self.rate.method();
        let mut info = DirtyRateInfo {
            status: DirtyRateStatus::Measuring,
            start_time: self
                .at
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            calc_time: unit.count(self.rate.time()),
            calc_time_unit: unit,
            sample_pages: match method {
                Method::PageSampling { pages_per_gib } => pages_per_gib,
                Method::DirtyBitmap | Method::DirtyRing => 0,
            },
            mode: method.into(),
            ..DirtyRateInfo::default()
        };
        match self.rate.progress() {
            Progress::Measuring => {}
            Progress::Failed(why) => {
                return Err(generic(format!(
                    "The dirty rate could not be measured: {why}"
                )));
            }
            Progress::Measured(rate) => {
                info.status = DirtyRateStatus::Measured;
                info.dirty_rate = Some(mib(rate.pages_per_second));
                info.x_vmferry_dirty_pages_rate = Some(rate.pages_per_second);
                info.vcpu_dirty_rate = rate.per_vcpu.map(|rates| {
                    std::iter::zip(0.., rates)
                        .map(|(id, pages)| DirtyRateVcpu {
                            id,
                            dirty_rate: mib(pages),
                        })
                        .collect()
                });
            }
        }
        Ok(info)
    }
}

/// Whole MiB in so many pages.
fn mib(pages: u64) -> u64 {
    pages / 256
}
