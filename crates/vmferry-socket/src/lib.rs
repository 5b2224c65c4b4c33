//! Unix sockets with names in the file system: making, reaching and removing them.
//!
//! A process that was killed leaves its socket's file behind, and the next one has to tell such a file from a socket
//! that somebody still listens on. [`listen`] and [`bind_datagram`] replace the former and refuse the latter, and the
//! [`SocketFile`] that they return removes the file in the end if it is still the same one.

use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// Bytes that the kernel has room for in a socket's path, without the terminating zero.
const MAX_PATH: usize = 107;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a socket cannot be made or reached: on which path, and what the user can do.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the socket {}: {problem}", path.display())]
pub struct SocketError {
    /// What was attempted, as a verb phrase ("listen on").
    pub action: &'static str,
    /// The path.
    pub path: PathBuf,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with a socket, for errors that name the path by themselves.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The kernel cannot take so long a path.
    #[error("its path is {0} bytes long and the system allows {MAX_PATH}: use a shorter path")]
    PathTooLong(usize),
    /// Another process listens there, or this one does.
    #[error("it is in use: another process listens on it; stop that one or choose another path")]
    InUse,
    /// The path belongs to something else.
    #[error("the path exists and is not a socket: remove it or choose another path")]
    NotASocket,
    /// The system refused.
    #[error(transparent)]
    System(#[from] io::Error),
}

impl From<Problem> for io::Error {
    fn from(problem: Problem) -> Self {
        match problem {
            Problem::System(error) => error,
            Problem::InUse => io::Error::new(io::ErrorKind::AddrInUse, problem),
            problem => io::Error::other(problem),
        }
    }
}

impl From<Errno> for Problem {
    fn from(errno: Errno) -> Self {
        Problem::System(errno.into())
    }
}

impl Problem {
    /// The error of an `action` on the socket at `path`.
    pub fn on(self, action: &'static str, path: &Path) -> SocketError {
        SocketError {
            action,
            path: path.to_owned(),
            problem: self,
        }
    }
}

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permissions {
    /// Its owner (and root), from the first moment on.
    Owner,
    /// Whoever the process's umask lets.
    Umask,
}

/// The address of the socket at `path`.
///
/// # Errors
/// The path is too long, or has a zero in it.
pub fn address(path: &Path) -> Result<SocketAddrUnix, Problem> {
    match path.as_os_str().as_bytes().len() {
        length if length > MAX_PATH => Err(Problem::PathTooLong(length)),
        _ => Ok(SocketAddrUnix::new(path)?),
    }
}

/// Connects, waiting at most `timeout` where the listener's queue is full. The standard library would wait for ever.
///
/// # Errors
/// The path is too long, nobody listens there, or the system refuses.
pub fn connect(path: &Path, timeout: Duration) -> Result<UnixStream, Problem> {
    let socket = socket(SocketType::STREAM)?;
    // The kernel takes zero for no timeout at all.
    let timeout = timeout.max(Duration::from_millis(1));
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))?;
    match rustix::net::connect(&socket, &address(path)?) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        Err(error) => return Err(error.into()),
    }
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
    Ok(socket.into())
}

/// Listens on `path`, in place of a socket that nobody listens on any more.
///
/// Two processes that do this at the same moment to the same abandoned socket may both succeed, and the later one has
/// it: the file system offers no way to replace a file only if it is still the one that was looked at.
///
/// # Errors
/// The path is too long, in use, or not a socket's, or the system refuses.
pub fn listen(
    path: &Path,
    permissions: Permissions,
) -> Result<(UnixListener, SocketFile), Problem> {
    let (socket, file) = bind(path, SocketType::STREAM, permissions)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok((socket.into(), file))
}

/// Receives datagrams at `path`, in place of a socket that nobody receives at any more.
///
/// # Errors
/// As for [`listen`].
pub fn bind_datagram(path: &Path) -> Result<(UnixDatagram, SocketFile), Problem> {
    let (socket, file) = bind(path, SocketType::DGRAM, Permissions::Umask)?;
    Ok((socket.into(), file))
}

fn socket(kind: SocketType) -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
}

fn bind(
    path: &Path,
    kind: SocketType,
    permissions: Permissions,
) -> Result<(OwnedFd, SocketFile), Problem> {
    let address = address(path)?;
    let socket = socket(kind)?;
    if permissions == Permissions::Owner {
        // Before it has a name: binding gives the file the mode of the socket, less the umask.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    }
    match rustix::net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_abandoned(path)?;
            rustix::net::bind(&socket, &address)?;
        }
        result => result?,
    }
    Ok((socket, SocketFile::new(path)?))
}

fn remove_abandoned(path: &Path) -> Result<(), Problem> {
    let metadata = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    if !metadata.file_type().is_socket() {
        return Err(Problem::NotASocket);
    }
    // A socket of a kind that nobody uses here cannot be connected to anything, and so disturbs nobody: the kernel says that
    // the kinds differ where the path leads to a socket, and that the connection is refused where it leads to none.
    match rustix::net::connect(&socket(SocketType::SEQPACKET)?, &address(path)?) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(()),
        Err(error @ (Errno::ACCESS | Errno::PERM)) => return Err(error.into()),
        _ => return Err(Problem::InUse),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// A socket's file. It is removed when this is dropped, unless the path belongs to another file by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        let metadata = path.symlink_metadata()?;
        Ok(SocketFile {
            // The process may change its directory before it ends.
            path: std::path::absolute(path)?,
            identity: (metadata.st_dev(), metadata.st_ino()),
        })
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
            tracing::warn!(path = %self.path.display(), %error, "a socket's file is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_live_socket_is_refused_and_not_disturbed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (listener, _file) = listen(&path, Permissions::Umask).unwrap();
        listener.set_nonblocking(true).unwrap();
        let again = listen(&path, Permissions::Umask);
        assert!(matches!(again, Err(Problem::InUse)), "{again:?}");
        let other_kind = bind_datagram(&path);
        assert!(matches!(other_kind, Err(Problem::InUse)), "{other_kind:?}");
        let nobody = listener.accept().unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock);
        connect(&path, Duration::from_secs(1)).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn an_abandoned_socket_is_replaced_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        drop(bind_datagram(&path).unwrap());
        assert!(!path.exists());
        drop(UnixDatagram::bind(&path).unwrap());
        drop(listen(&path, Permissions::Umask).unwrap());
        std::fs::write(&path, "precious").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for path in [&path, &link] {
            let refused = listen(path, Permissions::Umask);
            assert!(matches!(refused, Err(Problem::NotASocket)), "{refused:?}");
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn only_the_own_file_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (_listener, file) = listen(&path, Permissions::Umask).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn an_owners_socket_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (_listener, _file) = listen(&path, Permissions::Owner).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_path_that_is_too_long_is_measured() {
        let path = PathBuf::from(format!("/{}", "x".repeat(120)));
        let words = [
            listen(&path, Permissions::Umask).unwrap_err().to_string(),
            connect(&path, Duration::ZERO).unwrap_err().to_string(),
        ];
        for words in words {
            assert!(
                words.contains("121 bytes long and the system allows 107"),
                "{words}"
            );
        }
    }
}
