//! Unix sockets with names in the file system: making, reaching and removing them.

use std::io;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// Bytes that the kernel has room for in a socket's path, without the terminating zero.
const MAX_PATH: usize = 107;

/// How long a socket that is already there gets to accept a connection before it counts as somebody's.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The kernel cannot take so long a path.
    #[error(
        "socket path {path} is {length} bytes long and the system allows {MAX_PATH}: use a shorter path"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Another process listens there.
    #[error(
        "socket {path} is in use: another VM listens on it; stop that one or choose another path"
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The path belongs to something else.
    #[error("{path} exists and is not a socket: remove it or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot listen on socket {path}: {source}")]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Refuses a path that the kernel would refuse, with the reason.
pub(crate) fn check_path(path: &Path) -> Result<(), SocketError> {
    match path.as_os_str().as_bytes().len() {
        length if length > MAX_PATH => Err(SocketError::PathTooLong {
            path: path.to_owned(),
            length,
        }),
        _ => Ok(()),
    }
}

/// Connects, waiting at most `timeout` where the listener's queue is full. The standard library would wait for ever.
pub(crate) fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The kernel takes zero for no timeout at all.
    let timeout = timeout.max(Duration::from_millis(1));
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => {}
        Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
        Err(error) => return Err(error.into()),
    }
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
    Ok(socket.into())
}

/// A listening socket's file, removed when this is dropped.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode: by the time of removal somebody else's socket may have the path.
    identity: (u64, u64),
}

/// Listens on `path`, in place of a socket that nobody listens on any more.
///
/// Two processes that do this at the same moment to the same abandoned socket may both succeed, and the later one has
/// it: the file system offers no way to replace a file only if it is still the one that was looked at.
pub(crate) fn listen(path: &Path) -> Result<(UnixListener, SocketFile), SocketError> {
    check_path(path)?;
    let failed = |source| SocketError::Listen {
        path: path.to_owned(),
        source,
    };
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_abandoned(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
    .map_err(failed)?;
    let metadata = path.symlink_metadata().map_err(failed)?;
    let file = SocketFile {
        // The process may change its directory before it ends.
        path: std::path::absolute(path).map_err(failed)?,
        identity: (metadata.st_dev(), metadata.st_ino()),
    };
    Ok((listener, file))
}

fn remove_abandoned(path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Listen {
        path: path.to_owned(),
        source,
    };
    let metadata = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result.map_err(failed)?,
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket {
            path: path.to_owned(),
        });
    }
    match connect(path, PROBE_TIMEOUT) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // A listener that is too busy to accept is a listener.
        Err(error) if error.kind() != io::ErrorKind::TimedOut => return Err(failed(error)),
        _ => {
            return Err(SocketError::InUse {
                path: path.to_owned(),
            });
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let Ok(metadata) = self.path.symlink_metadata() else {
            return;
        };
        if (metadata.st_dev(), metadata.st_ino()) != self.identity {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket file is left behind");
        }
    }
}
