//! TCP: connecting within a time limit, and noticing a peer that has vanished.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::channel::{Channel, Waited};
use crate::cancel::CancelToken;

/// All addresses of a host; `default` stands for an empty name.
pub(super) fn resolve(host: &str, port: u16, default: &str) -> io::Result<Vec<SocketAddr>> {
    let host = if host.is_empty() { default } else { host };
    let addresses: Vec<_> = (host, port).to_socket_addrs()?.collect();
    if addresses.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the name has no address",
        ));
    }
    Ok(addresses)
}

/// Connects to the first of the addresses that answers, each within `timeout`.
pub(super) fn connect(
    addresses: &[SocketAddr],
    timeout: Duration,
    cancel: &CancelToken,
) -> io::Result<Channel> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        match connect_one(address, timeout, cancel) {
            Ok(channel) => return Ok(channel),
            Err(e) if cancel.is_cancelled() => return Err(e),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn connect_one(
    address: &SocketAddr,
    timeout: Duration,
    cancel: &CancelToken,
) -> io::Result<Channel> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&fd, address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(e) => return Err(e.into()),
    }
    let for_errors = fd.try_clone()?;
    tune(&fd, timeout)?;
    let channel = Channel::new(fd, cancel.clone())?;
    if channel.wait_writable(timeout)? == Waited::TimedOut {
        return Err(io::ErrorKind::TimedOut.into());
    }
    sockopt::socket_error(&for_errors)??;
    Ok(channel)
}

/// Sends small messages at once, and lets the kernel find out within about `timeout` that the peer's host
/// is gone.
pub(super) fn tune(fd: &OwnedFd, timeout: Duration) -> io::Result<()> {
    /// The kernel takes at most 32767 s, and a peer that is gone for an hour is gone.
    const BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
    let idle = (timeout / 2).clamp(BOUNDS.0, BOUNDS.1);
    let step = (timeout / 8).clamp(BOUNDS.0, BOUNDS.1);
    sockopt::set_tcp_nodelay(fd, true)?;
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, idle)?;
    sockopt::set_tcp_keepintvl(fd, step)?;
    sockopt::set_tcp_keepcnt(fd, 4)?;
    Ok(())
}
