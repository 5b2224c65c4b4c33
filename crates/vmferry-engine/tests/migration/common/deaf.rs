//! Addresses that exist and never accept: their queue of connections is full.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    socket_with,
};
use vmferry_engine::Uri;

/// The address stays deaf as long as the two other values live.
pub fn deaf_tcp() -> (Uri, OwnedFd, Vec<TcpStream>) {
    let listener = socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    bind(&listener, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    let address = SocketAddr::try_from(getsockname(&listener).unwrap()).unwrap();
    let mut connections = Vec::new();
    while let Ok(one) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
        connections.push(one);
    }
    let uri = format!("tcp:{address}").parse().unwrap();
    (uri, listener, connections)
}

/// The same for a Unix socket in `dir`.
pub fn deaf_unix(dir: &Path) -> (Uri, OwnedFd, Vec<OwnedFd>) {
    let path = dir.join("deaf");
    let address = SocketAddrUnix::new(&path).unwrap();
    let stream = |flags| socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let listener = stream(SocketFlags::CLOEXEC);
    bind(&listener, &address).unwrap();
    listen(&listener, 0).unwrap();
    let mut connections = Vec::new();
    loop {
        let one = stream(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        if connect(&one, &address).is_err() {
            return (Uri::Unix(path), listener, connections);
        }
        connections.push(one);
    }
}
