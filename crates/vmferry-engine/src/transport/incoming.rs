//! The destination's end of a transport: listening, and the one connection that is taken.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use super::channel::Channel;
use super::outgoing::{RunningCommand, inherited};
use super::{TransportError, Uri, tcp};
use crate::cancel::CancelToken;

/// A destination that waits for its source.
pub struct Listener {
    uri: Uri,
    kind: Kind,
}

enum Kind {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        _socket_file: RemoveOnDrop,
    },
    /// Nothing to wait for.
    Open(OwnedFd),
    /// The command lives as long as the listener.
    Command {
        output: OwnedFd,
        _running: RunningCommand,
    },
}

struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Listens at `uri`. A TCP port of 0 is chosen by the kernel; [`uri`](Self::uri) tells which.
    pub fn bind(uri: &Uri) -> Result<Self, TransportError> {
        let action = match uri {
            Uri::Tcp { .. } | Uri::Unix(_) => "listen at",
            Uri::Fd(_) => "use",
            Uri::Exec(_) => "start",
            Uri::File(_) => "open",
        };
        Self::bind_io(uri).map_err(TransportError::on(action, uri))
    }

    fn bind_io(uri: &Uri) -> io::Result<Self> {
        let mut bound = uri.clone();
        let kind = match uri {
            Uri::Tcp { host, port } => {
                let listener = TcpListener::bind(&tcp::resolve(host, *port, "0.0.0.0")?[..])?;
                listener.set_nonblocking(true)?;
                let local = listener.local_addr()?;
                bound = Uri::Tcp {
                    host: local.ip().to_string(),
                    port: local.port(),
                };
                Kind::Tcp(listener)
            }
            Uri::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                Kind::Unix {
                    listener,
                    _socket_file: RemoveOnDrop(path.clone()),
                }
            }
            Uri::Fd(fd) => Kind::Open(inherited(*fd)?),
            Uri::Exec(command) => {
                let mut running = RunningCommand::start(command, Stdio::null(), Stdio::piped())?;
                Kind::Command {
                    output: running.take_output(),
                    _running: running,
                }
            }
            // Opening a directory succeeds; only reading it does not.
            Uri::File(path) if path.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Uri::File(path) => Kind::Open(File::open(path)?.into()),
        };
        Ok(Listener { uri: bound, kind })
    }

    /// Where it listens, with the port that the kernel chose.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Waits for a source, without end unless cancelled. `timeout` is how long a connected source may be
    /// silent on the network before the kernel gives it up.
    pub fn accept(
        &self,
        timeout: Duration,
        cancel: &CancelToken,
    ) -> Result<Channel, TransportError> {
        self.accept_io(timeout, cancel)
            .map_err(TransportError::on("accept a migration at", &self.uri))
    }

    fn accept_io(&self, timeout: Duration, cancel: &CancelToken) -> io::Result<Channel> {
        let fd = match &self.kind {
            Kind::Tcp(listener) => {
                let stream = wait_and_accept(listener.as_fd(), cancel, || listener.accept())?;
                let fd = OwnedFd::from(stream.0);
                tcp::tune(&fd, timeout)?;
                fd
            }
            Kind::Unix { listener, .. } => {
                wait_and_accept(listener.as_fd(), cancel, || listener.accept())?
                    .0
                    .into()
            }
            Kind::Open(fd) | Kind::Command { output: fd, .. } => fd.try_clone()?,
        };
        Channel::new(fd, cancel.clone())
    }
}

fn wait_and_accept<T>(
    listener: std::os::fd::BorrowedFd<'_>,
    cancel: &CancelToken,
    accept: impl Fn() -> io::Result<T>,
) -> io::Result<T> {
    let waiter = Channel::new(listener.try_clone_to_owned()?, cancel.clone())?;
    loop {
        waiter.wait_readable(None)?;
        match accept() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}
