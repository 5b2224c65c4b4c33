//! Measuring with the dirty log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_dirty::{ArmingChunk, Cursor, DirtyTracker, Discipline};

use super::{DirtyRateError, Rate, check, per_second, wait};
use crate::cancel::CancelToken;
use crate::seam::{Guest, GuestLog};

/// How often a ring is emptied: often enough that it rarely runs full, and that pages written again count again.
const HARVEST_INTERVAL: Duration = Duration::from_millis(100);

/// Counts the pages that the guest writes in `time`.
pub(super) fn by_bitmap(
    guest: &Arc<dyn Guest>,
    time: Duration,
    cancel: &CancelToken,
) -> Result<Rate, DirtyRateError> {
    let tracking = Tracking::start(guest, cancel)?;
    let start = Instant::now();
    wait(time, cancel)?;
    let elapsed = start.elapsed();
    let pages = tracking.tracker.sync()?;
    Ok(Rate {
        pages_per_second: per_second(pages as f64, elapsed),
        per_vcpu: None,
    })
}

/// Counts the pages that each vCPU writes in `time`, again for each time that the ring was emptied.
pub(super) fn by_ring(
    guest: &Arc<dyn Guest>,
    time: Duration,
    cancel: &CancelToken,
) -> Result<Rate, DirtyRateError> {
    let logged = || {
        let logged = guest.dirty_log().written_per_vcpu();
        logged.ok_or(DirtyRateError::NoRing)
    };
    let tracking = Tracking::start(guest, cancel)?;
    let (start, before) = (Instant::now(), logged()?);
    let (mut elapsed, mut pages) = (Duration::ZERO, 0);
    while elapsed < time {
        wait(HARVEST_INTERVAL.min(time - elapsed), cancel)?;
        elapsed = start.elapsed();
        pages += tracking.collect()?;
    }
    let logged: Vec<u64> = std::iter::zip(logged()?, before)
        .map(|(after, before)| after.saturating_sub(before))
        .collect();
    // KVM may log a page more than once before the ring is emptied, so what a vCPU has logged only tells its share.
    let all = logged.iter().sum::<u64>().max(1) as f64;
    let per_vcpu: Vec<u64> = logged
        .into_iter()
        .map(|share| per_second(pages as f64 * share as f64 / all, elapsed))
        .collect();
    Ok(Rate {
        pages_per_second: per_vcpu.iter().sum(),
        per_vcpu: Some(per_vcpu),
    })
}

/// The guest's log, on, and off when dropped.
struct Tracking<'g> {
    tracker: DirtyTracker,
    cancel: &'g CancelToken,
}

impl<'g> Tracking<'g> {
    /// Switches the log on, with every page armed.
    fn start(guest: &Arc<dyn Guest>, cancel: &'g CancelToken) -> Result<Self, DirtyRateError> {
        let sizes: Vec<usize> = guest.ram().iter().map(|block| block.pages()).collect();
        let tracker = DirtyTracker::start(
            Arc::new(GuestLog::new(guest.clone())),
            &sizes,
            Discipline::default(),
            ArmingChunk::default(),
        )?;
        let tracking = Tracking { tracker, cancel };
        tracking.arm()?;
        // Arming all of a large guest takes a while. What it wrote meanwhile is no part of the measurement.
        tracking.collect()?;
        Ok(tracking)
    }

    /// Fetches what was written, and arms it again; how many pages.
    fn collect(&self) -> Result<u64, DirtyRateError> {
        let pages = self.tracker.sync()?;
        self.arm()?;
        Ok(pages)
    }

    /// Arms every page that was fetched. The tracker does that for pages that it hands out.
    fn arm(&self) -> Result<(), DirtyRateError> {
        let mut cursor = Cursor::default();
        let mut slice = self.tracker.slice(&mut cursor);
        while slice.next_run(ArmingChunk::default().pages())?.is_some() {
            check(self.cancel)?;
        }
        Ok(())
    }
}
