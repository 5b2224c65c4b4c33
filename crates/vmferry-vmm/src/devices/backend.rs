//! Where the serial port and the console lead. A thread of its own moves the bytes, so that the guest never waits: neither
//! for a client that does not read, nor for a terminal that was stopped.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmferry_socket::{Permissions, Problem, SocketFile};
use vmm_sys_util::eventfd::EventFd;

use super::terminal::{EscapeFilter, RawTerminal};
use crate::config::SerialConfig;
use crate::error::MachineError;

/// Output that may wait for the back end; what comes beyond is dropped.
const OUTBOX_BYTES: usize = 1 << 20;
/// Input of a terminal that may wait for the guest; what comes beyond is dropped. Others wait outside, but a terminal is
/// always read, for the keys that mean "quit".
const TYPED_AHEAD_BYTES: usize = 1 << 20;
/// Bytes moved by one system call; a pipe that polls as writable takes as many without blocking.
const CHUNK: usize = 4096;
/// How long a machine that ends waits for its last output to be taken.
const LAST_OUTPUT: Duration = Duration::from_millis(500);

/// Called when the user of the back end presses the keys that mean "quit".
pub(crate) type BackendEvents = Box<dyn Fn() + Send>;

/// Where input goes.
pub(crate) trait Input: Send {
    /// Bytes that could be added now.
    fn room(&self) -> usize;

    /// Adds what there is room for, and says how much that was.
    fn add(&self, bytes: &[u8]) -> usize;
}

/// Output on its way to the back end, and the bell that wakes the back end's thread.
pub(crate) struct Outbox {
    bytes: Mutex<VecDeque<u8>>,
    bell: EventFd,
    /// Whoever hands input over holds this meanwhile.
    accepts_input: Mutex<bool>,
    ended: AtomicBool,
}

impl Outbox {
    pub fn new() -> io::Result<Self> {
        Ok(Outbox {
            bytes: Mutex::new(VecDeque::new()),
            bell: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            accepts_input: Mutex::new(false),
            ended: AtomicBool::new(false),
        })
    }

    fn bytes(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.bytes.lock().expect("no holder of the outbox panics")
    }

    /// Wakes the back end's thread.
    pub fn wake(&self) {
        // It can only fail when the counter is full, and then the thread is awake.
        let _ = self.bell.write(1);
    }

    /// Lets input through, or stops it: none is on its way any more when this returns.
    pub fn accept_input(&self, accept: bool) {
        *self.accepts_input() = accept;
        self.wake();
    }

    fn accepts_input(&self) -> MutexGuard<'_, bool> {
        self.accepts_input
            .lock()
            .expect("no holder of the gate for input panics")
    }
}

/// The guest's end of an [`Outbox`].
pub(crate) struct GuestEnd(pub Arc<Outbox>);

impl Write for GuestEnd {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut bytes = self.0.bytes();
        let was_empty = bytes.is_empty();
        let room = OUTBOX_BYTES - bytes.len();
        bytes.extend(&data[..data.len().min(room)]);
        drop(bytes);
        if was_empty {
            self.0.wake();
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Target {
    Stdio {
        keys: EscapeFilter,
        // Restores the terminal when dropped.
        terminal: Option<RawTerminal>,
    },
    File(File),
    Unix {
        listener: UnixListener,
        client: Option<UnixStream>,
        _file: SocketFile,
    },
    Null,
}

impl Target {
    fn open(port: &str, config: &SerialConfig) -> Result<Self, MachineError> {
        let failed = |action: String| move |source| MachineError::Os { action, source };
        Ok(match config {
            SerialConfig::Stdio => Target::Stdio {
                keys: EscapeFilter::default(),
                terminal: RawTerminal::enter()
                    .map_err(failed("put the terminal into raw mode".into()))?,
            },
            SerialConfig::File(path) => {
                let what = format!("create the {port}'s output file {}", path.display());
                Target::File(create(path).map_err(failed(what))?)
            }
            SerialConfig::Unix(path) => {
                let what = format!("listen for the {port}'s clients on {}", path.display());
                let (listener, file) =
                    listen(path).map_err(|problem| failed(what)(problem.into()))?;
                Target::Unix {
                    listener,
                    client: None,
                    _file: file,
                }
            }
            SerialConfig::Null => Target::Null,
        })
    }

    /// Whether somebody types.
    fn is_terminal(&self) -> bool {
        matches!(
            self,
            Target::Stdio {
                terminal: Some(_),
                ..
            }
        )
    }

    fn input_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Target::Stdio { .. } => Some(borrow_stdin()),
            Target::Unix { client, .. } => client.as_ref().map(|c| c.as_fd()),
            Target::File(_) | Target::Null => None,
        }
    }

    fn output_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Target::Stdio { .. } => Some(borrow_stdout()),
            Target::File(file) => Some(file.as_fd()),
            Target::Unix { client, .. } => client.as_ref().map(|c| c.as_fd()),
            Target::Null => None,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Target::Stdio { .. } => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()?;
                Ok(bytes.len())
            }
            Target::File(file) => file.write(bytes),
            Target::Unix {
                client: Some(client),
                ..
            } => client.write(bytes),
            Target::Unix { client: None, .. } | Target::Null => Ok(bytes.len()),
        }
    }

    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            // Not by way of the standard library's buffer: what is in there is not seen by poll.
            Target::Stdio { .. } => Ok(rustix::io::read(borrow_stdin(), room)?),
            Target::Unix {
                client: Some(client),
                ..
            } => client.read(room),
            Target::Unix { client: None, .. } | Target::File(_) | Target::Null => Ok(0),
        }
    }

    fn hang_up(&mut self) {
        if let Target::Unix { client, .. } = self {
            *client = None;
        }
    }
}

fn borrow_stdin() -> BorrowedFd<'static> {
    // SAFETY: descriptor 0 stays open for the process's whole life; Rust's runtime opens it if it was closed.
    unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) }
}

fn borrow_stdout() -> BorrowedFd<'static> {
    // SAFETY: as for standard input.
    unsafe { BorrowedFd::borrow_raw(libc::STDOUT_FILENO) }
}

/// Creates or empties the file that a port's output goes to.
///
/// A link is not followed: in a directory that others may write to, they would say with it which file is emptied. Nothing waits
/// for a FIFO's reader: what is not read finds no room some time, and is dropped.
fn create(path: &Path) -> io::Result<File> {
    let refuse = |why| Err(io::Error::new(ErrorKind::InvalidInput, why));
    let mut options = OpenOptions::new();
    options.write(true);
    match path.symlink_metadata().map(|known| known.file_type()) {
        Ok(kind) if kind.is_symlink() => {
            return refuse("it is a symbolic link, which is not followed; name the file itself");
        }
        Ok(kind) if kind.is_dir() || kind.is_block_device() || kind.is_socket() => {
            return refuse("it is neither a file, a FIFO nor a character device");
        }
        // Open for reading as well, Linux does not wait for a reader, and writing goes on when one has left.
        Ok(kind) if kind.is_fifo() => options.read(true),
        _ => options.create(true).truncate(true),
    };
    options
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

fn listen(path: &Path) -> Result<(UnixListener, SocketFile), Problem> {
    let (listener, file) = vmferry_socket::listen(path, Permissions::Umask)?;
    listener.set_nonblocking(true)?;
    Ok((listener, file))
}

/// The back end's thread; it ends, and hands out the last output, when this is dropped.
pub(crate) struct Backend {
    outbox: Arc<Outbox>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// Starts the thread of `port` ("serial port").
    pub fn start(
        port: &'static str,
        config: &SerialConfig,
        outbox: Arc<Outbox>,
        input: Box<dyn Input>,
        events: BackendEvents,
    ) -> Result<Self, MachineError> {
        let target = Target::open(port, config)?;
        let mut worker = Worker {
            target,
            port,
            outbox: outbox.clone(),
            input,
            events,
            unread: VecDeque::new(),
            input_ended: false,
        };
        let thread = thread::Builder::new()
            .name(port.into())
            .spawn(move || worker.run())
            .map_err(|source| MachineError::Os {
                action: format!("start the {port}'s thread"),
                source,
            })?;
        Ok(Backend {
            outbox,
            thread: Some(thread),
        })
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.outbox.ended.store(true, Ordering::Release);
        self.outbox.wake();
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            tracing::error!("the thread behind a port has panicked");
        }
    }
}

struct Worker {
    port: &'static str,
    target: Target,
    outbox: Arc<Outbox>,
    input: Box<dyn Input>,
    events: BackendEvents,
    /// Input that has been read and not taken: what was typed ahead, or for which there is no room any more.
    unread: VecDeque<u8>,
    input_ended: bool,
}

impl Worker {
    fn run(&mut self) {
        let mut deadline = None;
        loop {
            if self.outbox.ended.load(Ordering::Acquire) {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + LAST_OUTPUT);
                if self.outbox.bytes().is_empty() || Instant::now() >= deadline {
                    return;
                }
            }
            let ready = self.wait(deadline);
            if ready.bell {
                // Never blocks; the counter's value means nothing.
                let _ = self.outbox.bell.read();
            }
            if ready.listener {
                self.accept();
            }
            if ready.output || self.target.output_fd().is_none() {
                self.move_output();
            }
            self.move_input(ready.input);
        }
    }

    fn wait(&self, deadline: Option<Instant>) -> Ready {
        // What cannot be given to the guest now stays outside: a guest that leaves has not lost it. But a terminal's user may
        // quit whatever the guest does.
        let wants_input = !self.input_ended
            && (self.target.is_terminal()
                || *self.outbox.accepts_input() && self.unread.is_empty() && self.input.room() > 0);
        let wants_output = !self.outbox.bytes().is_empty();
        let listener = match &self.target {
            Target::Unix {
                listener,
                client: None,
                ..
            } => Some(listener.as_raw_fd()),
            _ => None,
        };
        // poll ignores negative descriptors.
        let entry = |fd: Option<i32>, events| libc::pollfd {
            fd: fd.unwrap_or(-1),
            events,
            revents: 0,
        };
        let input = self.target.input_fd().filter(|_| wants_input);
        let output = self.target.output_fd().filter(|_| wants_output);
        let mut fds = [
            entry(Some(self.outbox.bell.as_raw_fd()), libc::POLLIN),
            entry(listener, libc::POLLIN),
            entry(input.map(|fd| fd.as_raw_fd()), libc::POLLIN),
            entry(output.map(|fd| fd.as_raw_fd()), libc::POLLOUT),
        ];
        let timeout = deadline.map_or(-1, |d| {
            d.saturating_duration_since(Instant::now()).as_millis() as i32
        });
        // SAFETY: `fds` is an array of that many entries, which poll fills in.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        // After an error (a signal) all revents are zero still, and the loop comes back here.
        let [bell, listener, input, output] = fds.map(|fd| fd.revents != 0);
        Ready {
            bell,
            listener,
            input,
            output,
        }
    }

    fn accept(&mut self) {
        if let Target::Unix {
            listener, client, ..
        } = &mut self.target
        {
            match listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => *client = Some(stream),
                Ok(_) => {}
                Err(error) => tracing::debug!(port = self.port, %error, "a client went away"),
            }
        }
    }

    fn move_output(&mut self) {
        let chunk: Vec<u8> = {
            let bytes = self.outbox.bytes();
            bytes.iter().take(CHUNK).copied().collect()
        };
        if chunk.is_empty() {
            return;
        }
        let done = match self.target.write(&chunk) {
            Ok(done) => done,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            Err(error) => {
                tracing::debug!(port = self.port, %error, "output cannot be written and is dropped");
                self.target.hang_up();
                chunk.len()
            }
        };
        self.outbox.bytes().drain(..done);
    }

    fn move_input(&mut self, ready: bool) {
        let outbox = self.outbox.clone();
        let accepts = outbox.accepts_input();
        let quit = ready && (*accepts || self.target.is_terminal()) && self.take_input();
        if *accepts && !self.unread.is_empty() {
            let taken = self.input.add(self.unread.make_contiguous());
            self.unread.drain(..taken);
        }
        // Whoever hears of it may stop the guest, and input.
        drop(accepts);
        if quit {
            (self.events)();
        }
    }

    /// Reads as much as the guest can take now, or all that a terminal has. Whether there were the keys that mean "quit".
    fn take_input(&mut self) -> bool {
        let mut room = [0; CHUNK];
        let len = match self.target.is_terminal() {
            true => CHUNK,
            false => self.input.room().min(CHUNK),
        };
        if len == 0 {
            return false;
        }
        match self.target.read(&mut room[..len]) {
            Ok(0) => match &mut self.target {
                Target::Unix { client, .. } => *client = None,
                _ => self.input_ended = true,
            },
            Ok(len) => match &mut self.target {
                Target::Stdio { keys, .. } => {
                    let quit = keys.filter(&room[..len], &mut self.unread);
                    self.unread.truncate(TYPED_AHEAD_BYTES);
                    return quit;
                }
                _ => self.unread.extend(&room[..len]),
            },
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => {
                tracing::debug!(port = self.port, %error, "input cannot be read");
                self.target.hang_up();
                self.input_ended = !matches!(self.target, Target::Unix { .. });
            }
        }
        false
    }
}

struct Ready {
    bell: bool,
    listener: bool,
    input: bool,
    output: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_file_is_emptied_and_a_link_to_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let error = create(&link).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), b"old");
        create(&file).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"");
    }

    /// Nobody reads it yet: opening it does not wait, and neither does writing more than it has room for.
    #[test]
    fn a_fifo_without_a_reader_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let mut fifo = create(&path).unwrap();
        let full = loop {
            if let Err(error) = fifo.write(&[0; CHUNK]) {
                break error;
            }
        };
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
    }
}
