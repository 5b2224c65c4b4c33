//! Unix sockets: connecting within a time limit.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::channel::cancelled;
use crate::cancel::CancelToken;

/// Connects to the socket at `path`.
pub(super) fn connect(path: &Path, timeout: Duration, cancel: &CancelToken) -> io::Result<OwnedFd> {
    /// A full queue of connections cannot be waited for, only be tried again.
    const RETRY: Duration = Duration::from_millis(10);
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let start = Instant::now();
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::AGAIN) => {}
            Err(e) => return Err(e.into()),
        }
        if cancel.is_cancelled() {
            return Err(cancelled());
        }
        if start.elapsed() >= timeout {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(RETRY);
    }
}
