//! A connection to the other side: bounded waits, and an end to them from outside.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cancel::CancelToken;

/// What kind of thing a channel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelKind {
    /// A stream socket: two-way, so that the guest is handed over by agreement.
    Socket,
    /// A pipe or another one-way stream that can block.
    Pipe,
    /// A file on a disk: never blocks, and an end of file is the end of the stream.
    File,
}

/// One end of a migration channel. Sockets and pipes are in non-blocking mode; waits go through `poll`, end
/// when the [`CancelToken`] is cancelled, and never take longer than they are told.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
    kind: ChannelKind,
    cancel: CancelToken,
}

/// What a wait ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The channel can be read, or written, or has failed: trying tells.
    Ready,
    /// The time is over.
    TimedOut,
}

/// The error of everything that a cancelled token ends. Not [`io::ErrorKind::Interrupted`]: that one makes
/// readers try again.
pub fn cancelled() -> io::Error {
    io::Error::other("cancelled")
}

impl Channel {
    /// Takes `fd` over. Finds out what it is.
    pub fn new(fd: OwnedFd, cancel: CancelToken) -> io::Result<Self> {
        let kind = match rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            rustix::fs::FileType::Socket => ChannelKind::Socket,
            rustix::fs::FileType::RegularFile | rustix::fs::FileType::BlockDevice => {
                ChannelKind::File
            }
            _ => ChannelKind::Pipe,
        };
        if kind != ChannelKind::File {
            let flags = rustix::fs::fcntl_getfl(&fd)?;
            rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        }
        Ok(Channel { fd, kind, cancel })
    }

    /// What the channel is.
    pub fn kind(&self) -> ChannelKind {
        self.kind
    }

    /// A second handle on the same connection, for the return path.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Channel {
            fd: self.fd.try_clone()?,
            kind: self.kind,
            cancel: self.cancel.clone(),
        })
    }

    /// Writes from several pieces of memory as much as the channel takes at once; 0 if it takes nothing now.
    ///
    /// # Safety
    ///
    /// Each piece must be mapped and readable. Its content may change meanwhile (guest memory does); then
    /// what is written is some mixture of old and new bytes.
    pub unsafe fn write_pieces(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        loop {
            // SAFETY: the pointers are good for reading by this function's contract, and `pieces` is a
            // valid array of the length given.
            let n = unsafe {
                libc::writev(
                    self.fd.as_raw_fd(),
                    pieces.as_ptr(),
                    pieces.len() as libc::c_int,
                )
            };
            if n >= 0 {
                return Ok(n as usize);
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Ok(0),
                _ => return Err(error),
            }
        }
    }

    /// Reads what there is, without waiting: 0 at the end of the stream, `None` if there is nothing now.
    pub fn read_some(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.fd, &mut *buf) {
                Ok(n) => return Ok(Some(n)),
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Waits until the channel can be written.
    pub fn wait_writable(&self, timeout: Duration) -> io::Result<Waited> {
        self.wait(PollFlags::OUT, Some(timeout))
    }

    /// Waits until the channel can be read, without end if there is no `timeout`.
    pub fn wait_readable(&self, timeout: Option<Duration>) -> io::Result<Waited> {
        self.wait(PollFlags::IN, timeout)
    }

    fn wait(&self, flags: PollFlags, timeout: Option<Duration>) -> io::Result<Waited> {
        let end = timeout.map(|t| Instant::now() + t);
        loop {
            if self.cancel.is_cancelled() {
                return Err(cancelled());
            }
            let left = end.map(|e| e.saturating_duration_since(Instant::now()));
            let left = left.map(|t| Timespec {
                tv_sec: t.as_secs() as i64,
                tv_nsec: t.subsec_nanos().into(),
            });
            let cancel = self.cancel.as_fd();
            let mut fds = [
                PollFd::new(&self.fd, flags),
                PollFd::from_borrowed_fd(cancel, PollFlags::IN),
            ];
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Ok(Waited::TimedOut),
                Ok(_) if !fds[0].revents().is_empty() => return Ok(Waited::Ready),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Bytes that were written to a socket but have not reached the peer's host; 0 for anything else.
    pub fn unsent(&self) -> usize {
        let mut bytes: libc::c_int = 0;
        // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ) writes one int, and fails on what is no socket.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
        match result {
            0 => usize::try_from(bytes).unwrap_or(0),
            _ => 0,
        }
    }

    /// Makes sure that what was written is on the disk, if the channel is a file.
    pub fn sync(&self) -> io::Result<()> {
        match self.kind {
            ChannelKind::File => Ok(rustix::fs::fsync(&self.fd)?),
            ChannelKind::Socket | ChannelKind::Pipe => Ok(()),
        }
    }

    /// Ends both directions of a socket: every reader and writer, here and there, is told.
    pub fn shutdown(&self) {
        if self.kind == ChannelKind::Socket {
            // Fails only if the peer was faster.
            let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
        }
    }

    /// Tells the peer of a socket that nothing more will be sent, and throws away what it still sends, for at
    /// most `timeout`: closing a socket with unread bytes would destroy our own last words.
    pub fn close_after_last_words(&self, timeout: Duration) {
        if self.kind != ChannelKind::Socket {
            return;
        }
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
        let end = Instant::now() + timeout;
        let mut sink = vec![0; 1 << 16];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.wait_readable(Some(left)) {
                Ok(Waited::Ready) => match rustix::io::read(&self.fd, &mut sink) {
                    Ok(0) => return,
                    Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                    Err(_) => return,
                },
                Ok(Waited::TimedOut) | Err(_) => return,
            }
        }
    }
}

/// Reads wait without end, until bytes, the end of the stream, an error, or cancellation.
impl Read for &Channel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.read_some(buf)? {
                Some(n) => return Ok(n),
                None => self.wait_readable(None)?,
            };
        }
    }
}
