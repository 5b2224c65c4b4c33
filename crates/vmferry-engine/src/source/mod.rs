//! The source: copies a running guest away, and gives it up only when the other side has all of it.

mod bandwidth;
mod driver;
mod pace;
mod precopy;
mod return_path;
mod shared;
mod standstill;
mod switchover;
#[cfg(test)]
mod tests;
mod writer;

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::cancel::CancelToken;
use crate::error::MigrationError;
use crate::info::{Info, Observer};
use crate::params::Parameters;
use crate::seam::Guest;
use crate::status::Status;
use crate::transport::Uri;

use driver::Driver;
use shared::Shared;

pub use shared::SteerError;

/// An outgoing migration: started, running on its own thread, or over.
pub struct Source {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), MigrationError>>>,
}

impl Source {
    /// Starts migrating `guest` to `uri`. Returns at once; `observer` hears of every step.
    ///
    /// Fails only if the process has no resources left for it.
    pub fn start(
        guest: Arc<dyn Guest>,
        uri: Uri,
        parameters: Parameters,
        observer: Box<dyn Observer>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::new(CancelToken::new()?, parameters, observer));
        shared.enter(Status::Setup);
        let thread = Self::spawn(guest, uri, shared.clone())
            .inspect_err(|_| shared.enter(Status::Failed))?;
        Ok(Source {
            shared,
            thread: Some(thread),
        })
    }

    fn spawn(
        guest: Arc<dyn Guest>,
        uri: Uri,
        shared: Arc<Shared>,
    ) -> std::io::Result<JoinHandle<Result<(), MigrationError>>> {
        let wait_log = shared.waits.log("the migration")?;
        std::thread::Builder::new()
            .name("migration".to_owned())
            .spawn(move || {
                let _wait_log = wait_log;
                Driver::run(&guest, &uri, &shared)
            })
    }

    /// The figures so far.
    pub fn info(&self) -> Info {
        self.shared.info()
    }

    /// Changes the parameters that are live; the others are ignored.
    pub fn set_parameters(&self, parameters: Parameters) {
        self.shared.set_parameters(parameters);
    }

    /// Cancels. The guest goes on (or stays paused, if it was); the end is seen as [`Status::Cancelled`]. It is seen as
    /// [`Status::Failed`] if the guest cannot go on, or if a command has all of it: [`MigrationError::NotResumed`] and
    /// [`MigrationError::Undecided`] tell its user what to do.
    ///
    /// # Errors
    ///
    /// The hand-over has begun, and the guest may already run on the other side.
    pub fn cancel(&self) -> Result<(), SteerError> {
        self.shared.cancel()
    }

    /// Lets a migration go on that stopped before the switch-over.
    ///
    /// # Errors
    ///
    /// It has not stopped there.
    pub fn proceed(&self) -> Result<(), SteerError> {
        self.shared.proceed()
    }

    /// Waits for the end.
    ///
    /// # Errors
    ///
    /// The migration did not succeed.
    ///
    /// # Panics
    ///
    /// The migration thread panicked.
    pub fn wait(mut self) -> Result<(), MigrationError> {
        let thread = self
            .thread
            .take()
            .expect("wait takes self, and is the only taker but drop");
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Cancels, if that is still possible, and waits for the end.
impl Drop for Source {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.shared.cancel();
            let _ = thread.join();
        }
    }
}
