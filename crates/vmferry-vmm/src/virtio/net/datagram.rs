//! A Unix datagram socket that carries frames.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use vmferry_socket::SocketFile;

use super::HEADER;
use super::link::{Frame, Link, incoming, must_wait};
use crate::error::MachineError;
use crate::virtio::Watch;

/// The socket.
pub(super) struct Datagram {
    id: String,
    socket: UnixDatagram,
    remote: PathBuf,
    _local: Option<SocketFile>,
}

impl Datagram {
    /// Makes interface `id` send to `remote` and receive at `local`.
    pub fn open(remote: &Path, local: Option<&Path>, id: &str) -> Result<Self, MachineError> {
        let failed = |source| MachineError::Os {
            action: match local {
                Some(local) => format!(
                    "receive frames for the interface '{id}' at {}",
                    local.display()
                ),
                None => format!("make a socket for the interface '{id}'"),
            },
            source,
        };
        let (socket, file) = bind(local).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        Ok(Datagram {
            id: id.to_owned(),
            socket,
            remote: remote.to_owned(),
            _local: file,
        })
    }
}

fn bind(local: Option<&Path>) -> io::Result<(UnixDatagram, Option<SocketFile>)> {
    let Some(path) = local else {
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
        // The kernel chooses a name.
        rustix::net::bind(&socket, &SocketAddrUnix::new_unnamed())?;
        return Ok((socket.into(), None));
    };
    let (socket, file) = vmferry_socket::bind_datagram(path)?;
    Ok((socket, Some(file)))
}

impl Link for Datagram {
    fn receive(&mut self, frame: &mut Frame) -> bool {
        let received = frame.fill(|room| {
            let (header, room) = room.split_at_mut(HEADER);
            header.fill(0);
            self.socket.recv(room).map(|len| HEADER + len)
        });
        match received {
            Ok(()) => true,
            Err(error) => {
                if !must_wait(&error) {
                    tracing::debug!(id = self.id, %error, "no frame can be received");
                }
                false
            }
        }
    }

    fn send(&mut self, frame: &[u8]) {
        // Its owner may not be there yet, or read too slowly.
        if let Err(error) = self.socket.send_to(&frame[HEADER..], &self.remote) {
            tracing::debug!(id = self.id, %error, "a frame is lost");
        }
    }

    fn watches(&self, wanted: bool) -> Vec<Watch> {
        match wanted {
            true => vec![incoming(self.socket.as_raw_fd())],
            false => Vec::new(),
        }
    }
}
