//! Ctrl-C: waits end early, so that what was started is ended and what was written is removed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Whether somebody wants this program to end.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Catches the signals that ask a program to end.
    ///
    /// # Errors
    /// The system refuses.
    pub fn catch() -> anyhow::Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, flag.clone())
                .context("cannot watch for signals")?;
        }
        Ok(Interrupt(flag))
    }

    /// Waits until `condition` gives something; none if it has not within `limit`.
    ///
    /// # Errors
    /// The condition's own, or a signal came.
    pub fn wait<T>(
        &self,
        limit: Duration,
        mut condition: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<Option<T>> {
        let end = Instant::now() + limit;
        loop {
            if self.0.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            let found = condition()?;
            if found.is_some() || Instant::now() > end {
                return Ok(found);
            }
            std::thread::sleep(POLL);
        }
    }
}
