//! Both kinds of sockets behind one interface: an open file descriptor.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

use super::Rate;

/// How often is looked whether the proxy is over.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// Waits until one of the sockets is ready for what is polled, or for so long.
pub(super) fn wait(sockets: &mut [PollFd<'_>], time: Duration) {
    let timeout = Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    };
    // A signal only ends the wait early.
    let _ = poll(sockets, Some(&timeout));
}

/// Bytes that the kernel should buffer at most for a link of this rate: what it carries in 10 ms. It cannot be much less
/// than the 64 KiB of a segment on the loopback interface.
fn buffer(rate: Rate) -> usize {
    (rate.bytes_per_second as usize / 100).clamp(256 << 10, 4 << 20)
}

fn parse(uri: &str) -> Result<&str, &Path> {
    if let Some(address) = uri.strip_prefix("tcp:") {
        return Ok(address);
    }
    let path = uri.strip_prefix("unix:");
    Err(Path::new(path.unwrap_or_else(|| {
        panic!("{uri} is neither tcp: nor unix:")
    })))
}

/// Connects to a destination. What is sent to it is buffered no more than the rate allows.
pub(super) fn connect(uri: &str, rate: Option<Rate>) -> io::Result<OwnedFd> {
    let socket: OwnedFd = match parse(uri) {
        Ok(address) => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.into()
        }
        Err(path) => UnixStream::connect(path)?.into(),
    };
    if let Some(rate) = rate {
        sockopt::set_socket_send_buffer_size(&socket, buffer(rate))?;
    }
    Ok(socket)
}

/// Where the proxy waits for its connection.
pub(super) struct Listener {
    pub uri: String,
    socket: OwnedFd,
    /// The file of a Unix socket, which is removed with it.
    path: Option<PathBuf>,
}

impl Listener {
    /// Listens at a socket of the same kind as the destination's.
    pub fn beside(uri: &str, rate: Option<Rate>) -> Self {
        let (uri, socket, path): (String, OwnedFd, _) = match parse(uri) {
            Ok(_) => {
                let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
                let address = listener.local_addr().expect("it has an address");
                (format!("tcp:{address}"), listener.into(), None)
            }
            Err(path) => {
                let path = PathBuf::from(format!("{}.proxy", path.display()));
                let listener = UnixListener::bind(&path).expect("the name is free");
                let uri = format!("unix:{}", path.display());
                (uri, listener.into(), Some(path))
            }
        };
        if let Some(rate) = rate {
            // Its connections inherit it. Later, it would no longer limit what TCP offers.
            sockopt::set_socket_recv_buffer_size(&socket, buffer(rate)).expect("a socket option");
        }
        Listener { uri, socket, path }
    }

    /// Waits for one connection; none if the proxy is over first.
    pub fn accept(self, is_over: impl Fn() -> bool) -> Option<OwnedFd> {
        while !is_over() {
            let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
            wait(&mut ready, TICK);
            if ready[0].revents().contains(PollFlags::IN) {
                let socket = rustix::net::accept(self.socket.as_fd()).ok()?;
                if self.path.is_none() {
                    let _ = sockopt::set_tcp_nodelay(&socket, true);
                }
                return Some(socket);
            }
        }
        None
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}
