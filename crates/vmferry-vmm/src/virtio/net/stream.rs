//! A Unix stream socket that carries frames, each behind its length (32 bits in network order).

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::announce::Timer;
use super::link::{Frame, Link, MOST_FRAME, incoming, must_wait, outgoing};
use super::{HEADER, TRANSMIT};
use crate::error::MachineError;
use crate::virtio::Watch;

/// Bytes of a length.
const LENGTH: usize = 4;
/// From one attempt to connect to the next.
const RETRY: Duration = Duration::from_secs(1);

/// The socket, connected or waiting to be.
pub(super) struct Stream {
    id: String,
    path: PathBuf,
    connection: Option<Connection>,
    retry: Timer,
}

struct Connection {
    socket: UnixStream,
    /// What has come and was not given to the guest.
    received: Received,
    /// The rest of a frame of which a part is sent.
    unsent: Vec<u8>,
}

/// Bytes that have come, up to the first that has not.
struct Received {
    room: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Received {
    fn new() -> Self {
        Received {
            room: vec![0; LENGTH + MOST_FRAME].into(),
            start: 0,
            end: 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.room[self.start..self.end]
    }

    /// Takes the first frame, if all of it is there.
    fn take(&mut self, frame: &mut Frame) -> io::Result<bool> {
        let Some((length, rest)) = self.bytes().split_first_chunk() else {
            return Ok(false);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length == 0 || length > MOST_FRAME {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                format!(
                    "a frame of {length} bytes cannot be: the other end speaks another protocol"
                ),
            ));
        }
        let Some(bytes) = rest.get(..length) else {
            return Ok(false);
        };
        frame.set(bytes);
        self.start += LENGTH + length;
        Ok(true)
    }

    /// Gets more, if there is more.
    fn read(&mut self, socket: &mut UnixStream) -> io::Result<()> {
        self.room.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        // There is room: whoever calls has found no whole frame.
        match socket.read(&mut self.room[self.end..])? {
            0 => Err(ErrorKind::ConnectionReset.into()),
            read => {
                self.end += read;
                Ok(())
            }
        }
    }
}

impl Stream {
    /// Connects interface `id` to who listens on `path`.
    pub fn connect(path: &Path, id: &str) -> Result<Self, MachineError> {
        let failed = |source| MachineError::Os {
            action: format!("connect the interface '{id}' to {}", path.display()),
            source,
        };
        Ok(Stream {
            id: id.to_owned(),
            path: path.to_owned(),
            connection: Some(Connection::open(path).map_err(failed)?),
            retry: Timer::new().map_err(failed)?,
        })
    }

    /// Does something with the connection, if there is one; a failure ends it.
    fn with<T>(&mut self, act: impl FnOnce(&mut Connection) -> io::Result<T>) -> Option<T> {
        match act(self.connection.as_mut()?) {
            Ok(result) => Some(result),
            Err(error) if must_wait(&error) => None,
            Err(error) => {
                let (id, path) = (&self.id, self.path.display());
                tracing::warn!(id, %path, %error, "an interface has lost its connection and tries to get it back");
                self.connection = None;
                self.retry.set(RETRY);
                None
            }
        }
    }

    fn reconnect(&mut self) {
        match Connection::open(&self.path) {
            Ok(connection) => {
                tracing::info!(id = self.id, "an interface is connected again");
                self.connection = Some(connection);
            }
            Err(error) => {
                tracing::debug!(id = self.id, %error, "an interface cannot be connected yet");
                self.retry.set(RETRY);
            }
        }
    }
}

impl Connection {
    fn open(path: &Path) -> io::Result<Self> {
        // It does not wait even to be connected: who listens may have stopped to accept.
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &vmferry_socket::address(path)?).map_err(
            |error| match error {
                Errno::AGAIN => {
                    io::Error::other("whoever listens there accepts no connections now")
                }
                error => error.into(),
            },
        )?;
        Ok(Connection {
            socket: socket.into(),
            received: Received::new(),
            unsent: Vec::new(),
        })
    }

    fn receive(&mut self, frame: &mut Frame) -> io::Result<()> {
        while !self.received.take(frame)? {
            self.received.read(&mut self.socket)?;
        }
        Ok(())
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let length = (frame.len() as u32).to_be_bytes();
        let sent = match self
            .socket
            .write_vectored(&[IoSlice::new(&length), IoSlice::new(frame)])
        {
            Ok(sent) => sent,
            // Nothing of it has left: it is lost, and the stream is still whole.
            Err(error) if must_wait(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        let rest = length.iter().chain(frame).skip(sent);
        self.unsent.extend(rest);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let sent = self.socket.write(&self.unsent)?;
            self.unsent.drain(..sent);
        }
        Ok(())
    }
}

impl Link for Stream {
    fn receive(&mut self, frame: &mut Frame) -> bool {
        self.with(|connection| connection.receive(frame)).is_some()
    }

    fn can_send(&mut self) -> bool {
        if self.connection.is_none() && self.retry.expired() {
            self.reconnect();
        }
        self.with(Connection::flush);
        // Without a connection frames are lost, as from an unplugged cable.
        self.connection
            .as_ref()
            .is_none_or(|connection| connection.unsent.is_empty())
    }

    fn send(&mut self, frame: &[u8]) {
        self.with(|connection| connection.send(&frame[HEADER..]));
    }

    fn watches(&self, wanted: bool) -> Vec<Watch> {
        let Some(connection) = &self.connection else {
            return vec![Watch {
                fd: self.retry.fd(),
                events: libc::POLLIN,
                queue: TRANSMIT,
            }];
        };
        let socket = connection.socket.as_raw_fd();
        let (frames, room) = (wanted, !connection.unsent.is_empty());
        let watches = [(frames, incoming(socket)), (room, outgoing(socket))];
        watches
            .into_iter()
            .filter_map(|(wanted, watch)| wanted.then_some(watch))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_cut_out_of_the_stream_wherever_it_is_cut() {
        let frames: Vec<Vec<u8>> = [60, 1, MOST_FRAME, 1514]
            .iter()
            .map(|len| (0..*len).map(|byte| byte as u8).collect())
            .collect();
        let mut wire = Vec::new();
        for frame in &frames {
            wire.extend((frame.len() as u32).to_be_bytes());
            wire.extend(frame);
        }
        for piece in [1, 3, 1000, wire.len()] {
            let (mut here, mut there) = UnixStream::pair().unwrap();
            here.set_nonblocking(true).unwrap();
            let mut received = Received::new();
            let (mut frame, mut arrived) = (Frame::empty(), Vec::new());
            for piece in wire.chunks(piece) {
                there.write_all(piece).unwrap();
                // A piece may be more than there is room for.
                while received.read(&mut here).is_ok() {
                    while received.take(&mut frame).unwrap() {
                        arrived.push(frame.bytes()[HEADER..].to_vec());
                    }
                }
            }
            assert_eq!(arrived, frames, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        for length in [0, MOST_FRAME as u32 + 1, u32::MAX] {
            let mut received = Received::new();
            received.room[..LENGTH].copy_from_slice(&length.to_be_bytes());
            received.end = LENGTH;
            let refused = received.take(&mut Frame::empty()).unwrap_err();
            assert!(refused.to_string().contains("another protocol"), "{length}");
        }
    }
}
