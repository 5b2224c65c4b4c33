//! Addresses that exist, but accept no connection: the queue of connections that wait to be accepted is full.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    socket_with,
};

/// A socket whose queue is full as long as this value lives.
#[derive(Debug)]
pub struct FullBacklog {
    /// The address, as a URI to migrate to.
    pub uri: String,
    _listener: OwnedFd,
    _waiting: Vec<OwnedFd>,
}

impl FullBacklog {
    /// Makes one at a free TCP port of the loopback interface.
    ///
    /// # Panics
    ///
    /// The system gives no sockets.
    pub fn tcp() -> Self {
        let listener = socket_with(
            AddressFamily::INET,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("a socket");
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        bind(&listener, &any_port).expect("a free port");
        listen(&listener, 0).expect("it can be listened at");
        let address = getsockname(&listener).expect("it has an address");
        let address = SocketAddr::try_from(address).expect("it is an internet address");
        let mut waiting = Vec::new();
        while let Ok(one) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            waiting.push(one.into());
        }
        FullBacklog {
            uri: format!("tcp:{address}"),
            _listener: listener,
            _waiting: waiting,
        }
    }

    /// Makes one at a Unix socket in `directory`.
    ///
    /// # Panics
    ///
    /// The system gives no sockets, or there is one of this name already.
    pub fn unix(directory: &Path) -> Self {
        let path = directory.join("full-backlog");
        let address = SocketAddrUnix::new(&path).expect("the path is short");
        let stream = |flags| {
            socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket")
        };
        let listener = stream(SocketFlags::CLOEXEC);
        bind(&listener, &address).expect("the name is free");
        listen(&listener, 0).expect("it can be listened at");
        let mut waiting = Vec::new();
        loop {
            let one = stream(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
            if connect(&one, &address).is_err() {
                break;
            }
            waiting.push(one);
        }
        FullBacklog {
            uri: format!("unix:{}", path.display()),
            _listener: listener,
            _waiting: waiting,
        }
    }
}
