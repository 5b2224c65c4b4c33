//! The destination: receives a guest, and runs it only when the source has given it up.

mod memory;
mod populate;
mod reader;
mod receiver;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::cancel::CancelToken;
use crate::error::MigrationError;
use crate::info::{Info, Observer};
use crate::seam::Guest;
use crate::status::Status;
use crate::transport::{Listener, TransportError, Uri};
use crate::wait::{Wait, WaitLog, Waits};

use populate::Waiting;
use receiver::Receiver;

/// How long a connected source may be silent on the network (not: on the stream) before the kernel gives
/// it up.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// An incoming migration: waiting for its source, running on its own thread, or over.
pub struct Destination {
    shared: Arc<Shared>,
    uri: Uri,
    thread: Option<JoinHandle<Result<(), MigrationError>>>,
}

/// What the receiving thread shares with those who watch it.
struct Shared {
    cancel: CancelToken,
    /// When the source connected.
    started: OnceLock<Instant>,
    waits: Waits,
    info: Mutex<Info>,
    observer: Box<dyn Observer>,
}

impl Shared {
    fn update(&self, change: impl FnOnce(&mut Info)) {
        change(&mut self.info.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Time since the source connected: that of the wait for it is none of the migration's.
    fn total_time(&self) -> Duration {
        self.started.get().map_or(Duration::ZERO, Instant::elapsed)
    }

    fn enter(&self, status: Status) {
        self.update(|info| {
            info.status = status;
            info.total_time = self.total_time();
        });
        tracing::info!(%status, "incoming migration");
        self.observer.status(status);
    }
}

impl Destination {
    /// Listens at `uri` for a source that migrates to `guest`, whose RAM is untouched. Returns when the
    /// address is bound; [`uri`](Self::uri) then tells the port that the kernel chose.
    ///
    /// # Errors
    ///
    /// The transport cannot be opened.
    pub fn start(
        guest: Arc<dyn Guest>,
        uri: &Uri,
        observer: Box<dyn Observer>,
    ) -> Result<Self, TransportError> {
        let resources = |source| TransportError {
            action: "prepare to listen at",
            uri: uri.clone(),
            source,
        };
        let listener = Listener::bind(uri)?;
        let bound = listener.uri().clone();
        let shared = Arc::new(Shared {
            cancel: CancelToken::new().map_err(resources)?,
            started: OnceLock::new(),
            waits: Waits::default(),
            info: Mutex::new(Info {
                listening: Some(bound.clone()),
                ..Info::default()
            }),
            observer,
        });
        let thread = {
            let shared = shared.clone();
            let wait_log = shared.waits.log("the destination").map_err(resources)?;
            std::thread::Builder::new()
                .name("incoming".to_owned())
                .spawn(move || serve(&*guest, listener, &shared, &wait_log))
                .map_err(resources)?
        };
        Ok(Destination {
            shared,
            uri: bound,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The figures so far.
    pub fn info(&self) -> Info {
        let mut info = self
            .shared
            .info
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if !info.status.is_final() {
            info.total_time = self.shared.total_time();
        }
        info.waiting = self.shared.waits.now();
        info
    }

    /// Waits for the end.
    ///
    /// # Errors
    ///
    /// The guest did not arrive; or [`MigrationError::Undecided`]: it is here, paused, and its user must say
    /// on which side it is to run.
    ///
    /// # Panics
    ///
    /// The receiving thread panicked.
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

/// Gives up, and waits for the end.
impl Drop for Destination {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shared.cancel.cancel();
            let _ = thread.join();
        }
    }
}

fn serve(
    guest: &dyn Guest,
    listener: Listener,
    shared: &Shared,
    _while_alive: &WaitLog,
) -> Result<(), MigrationError> {
    shared.enter(Status::Setup);
    let result = receive(guest, &listener, shared).map_err(|error| {
        match (error, shared.cancel.is_cancelled()) {
            (error @ MigrationError::Undecided { .. }, _) | (error, false) => error,
            (_, true) => MigrationError::Cancelled,
        }
    });
    match &result {
        Ok(()) => shared.enter(Status::Completed),
        Err(MigrationError::Cancelled) => shared.enter(Status::Cancelled),
        Err(error) => {
            tracing::warn!(uri = %listener.uri(), "incoming migration failed: {error}");
            shared.update(|info| info.error = Some(error.to_string()));
            shared.enter(Status::Failed);
        }
    }
    result
}

fn receive(guest: &dyn Guest, listener: &Listener, shared: &Shared) -> Result<(), MigrationError> {
    let population = populate::Shared::new(guest.ram());
    std::thread::scope(|scope| {
        let populating = Waiting::start(scope, &population).map_err(|source| TransportError {
            action: "prepare memory for",
            uri: listener.uri().clone(),
            source,
        })?;
        let waiting = shared.waits.begin(Wait::Source);
        let channel = listener.accept(KEEPALIVE, &shared.cancel)?;
        drop(waiting);
        shared.started.get_or_init(Instant::now);
        shared.enter(Status::Active);
        Receiver::new(guest, &channel, shared, populating.stream_begins())?.run()
    })
}
