//! The server: accepts clients and gives each two threads, one that reads and executes, one that writes.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmferry_socket::{Permissions, Problem, SocketError, SocketFile};

use crate::commands::Handler;
use crate::events::EventBus;
use crate::outbox::Outbox;
use crate::session::Session;

/// Clients that may stay as long as they like. Far more than anybody needs, and few enough for their threads and buffers
/// not to matter.
const LASTING_CLIENTS: usize = 32;

/// Clients beyond those. The one that has been silent for longest makes room for the next, so that somebody who wants to
/// look or to cancel gets in, whoever has forgotten to hang up.
const PASSING_CLIENTS: usize = 4;

/// How long a server that ends gives commands to finish and replies to be read, and then again threads to notice that
/// they are cut off.
const GRACE: Duration = Duration::from_secs(1);

/// Pause after a failed accept, which fails again at once while the process is out of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A QMP server on a unix socket. Dropping it ends it: the socket file goes first, commands being executed finish and
/// their replies are sent, then the clients are disconnected. That takes two seconds at most, even if clients or
/// handler hang.
pub struct QmpServer {
    path: PathBuf,
    file: Option<SocketFile>,
    listener: UnixStream,
    shared: Arc<Shared>,
}

struct Shared {
    handler: Arc<dyn Handler>,
    events: EventBus,
    stop: AtomicBool,
    clients: Mutex<HashMap<u64, Client>>,
    threads: Threads,
}

struct Client {
    outbox: Arc<Outbox>,
    stay: Stay,
    /// When it last said something.
    heard: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stay {
    Lasting,
    Passing,
}

/// Counts the server's threads. Joining them instead could not be bounded in time.
#[derive(Default)]
struct Threads {
    running: Mutex<usize>,
    ended: Condvar,
}

impl Threads {
    fn wait_for_end(&self, timeout: Duration) -> usize {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let (running, _) = self
            .ended
            .wait_timeout_while(running, timeout, |running| *running > 0)
            .unwrap_or_else(PoisonError::into_inner);
        *running
    }
}

/// Holds the count up for one thread.
struct Running(Arc<Shared>);

impl Running {
    fn new(shared: &Arc<Shared>) -> Self {
        *shared
            .threads
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner) += 1;
        Running(shared.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        *self
            .0
            .threads
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.threads.ended.notify_all();
    }
}

fn spawn(shared: &Arc<Shared>, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let running = Running::new(shared);
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let _running = running;
            work();
        })?;
    Ok(())
}

impl QmpServer {
    /// Listens on a socket at `path`. Commands go to `handler`; what is emitted on `events` goes to every client. A
    /// socket file that nobody listens on any more is replaced. Only the process's own user (and root) can connect: a
    /// monitor can run commands.
    ///
    /// # Errors
    /// [`SocketError`] if the path is too long, in use, no socket, or if the system refuses.
    pub fn bind(
        path: impl AsRef<Path>,
        handler: Arc<dyn Handler>,
        events: EventBus,
    ) -> Result<Self, SocketError> {
        let path = path.as_ref();
        let failed = |problem: Problem| problem.on("listen on", path);
        let (listener, file) = vmferry_socket::listen(path, Permissions::Owner).map_err(failed)?;
        // A second handle, for the shutdown call that the standard library has on streams only.
        let handle: OwnedFd = listener.try_clone().map_err(|e| failed(e.into()))?.into();
        let shared = Arc::new(Shared {
            handler,
            events,
            stop: AtomicBool::new(false),
            clients: Mutex::default(),
            threads: Threads::default(),
        });
        let for_thread = shared.clone();
        spawn(&shared, "qmp-accept", move || {
            accept(&listener, &for_thread)
        })
        .map_err(|e| failed(e.into()))?;
        Ok(QmpServer {
            path: path.to_owned(),
            file: Some(file),
            listener: handle.into(),
            shared,
        })
    }

    /// Where it listens, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Debug for QmpServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QmpServer")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Drop for QmpServer {
    fn drop(&mut self) {
        self.file.take();
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Err(error) = self.listener.shutdown(Shutdown::Both) {
            tracing::warn!(%error, "cannot wake the thread that accepts QMP clients");
        }
        self.shared.each_client(Outbox::hang_up);
        if self.shared.threads.wait_for_end(GRACE) == 0 {
            return;
        }
        self.shared.each_client(Outbox::break_off);
        let left = self.shared.threads.wait_for_end(GRACE);
        if left > 0 {
            tracing::warn!(
                left,
                "QMP threads are still busy: a command has not finished"
            );
        }
    }
}

impl Shared {
    fn each_client(&self, act: fn(&Outbox)) {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.values().for_each(|client| act(&client.outbox));
    }

    /// Takes note that a client has said something.
    fn heard(&self, number: u64) {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get_mut(&number) {
            client.heard = Instant::now();
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for number in 0.. {
        let accepted = listener.accept();
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        match accepted.and_then(|(stream, _)| serve(number, stream, shared)) {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot serve a QMP client");
                thread::sleep(ACCEPT_RETRY);
            }
        }
    }
}

/// Finds a place for one more client; another one may have to leave.
fn make_room(clients: &mut HashMap<u64, Client>) -> Stay {
    let (passing, lasting): (Vec<_>, Vec<_>) = clients
        .iter()
        .map(|(&number, client)| (number, client))
        .partition(|(_, client)| client.stay == Stay::Passing);
    if lasting.len() < LASTING_CLIENTS {
        return Stay::Lasting;
    }
    if passing.len() == PASSING_CLIENTS
        && let Some((number, silent)) = passing.iter().min_by_key(|(_, client)| client.heard)
    {
        tracing::warn!(
            clients = clients.len(),
            "too many QMP clients: one that has been silent is disconnected"
        );
        silent.outbox.break_off();
        let number = *number;
        clients.remove(&number);
    }
    Stay::Passing
}

fn serve(number: u64, stream: UnixStream, shared: &Arc<Shared>) -> io::Result<()> {
    let outbox = Arc::new(Outbox::new(stream.try_clone()?));
    {
        let mut clients = shared
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Looked at under the lock: a server that ends sets the flag before it goes through the clients.
        if shared.stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        let stay = make_room(&mut clients);
        let client = Client {
            outbox: outbox.clone(),
            stay,
            heard: Instant::now(),
        };
        clients.insert(number, client);
    }
    let session = Session::new(
        shared.handler.clone(),
        shared.events.clone(),
        outbox.clone(),
    );
    let (for_writer, for_reader) = (shared.clone(), shared.clone());
    let writing = spawn(shared, "qmp-write", move || {
        outbox.drain();
        let mut clients = for_writer
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        clients.remove(&number);
    });
    if let Err(error) = writing {
        let mut clients = shared
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        clients.remove(&number);
        return Err(error);
    }
    // If this fails the session is dropped, which ends the writer.
    spawn(shared, "qmp-read", move || {
        session.run(stream, &for_reader.stop, || for_reader.heard(number))
    })
}
