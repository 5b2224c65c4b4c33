//! Locks that keep two machines from using one image: *open file description* locks, which the kernel drops when the
//! file is closed, however its process ends, and which NFS and cluster file systems carry to other hosts.
//!
//! A lock is on the whole file: exclusive for a disk that is written, shared for one that is only read. QEMU's locks
//! are of the same kind, so the two see each other.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::config::Access;

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The lock is ours, or could be.
    Free,
    /// Somebody else has a lock that forbids it.
    Taken,
}

fn request(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        // To the end, wherever it is.
        l_len: 0,
        // The kernel wants zero here.
        l_pid: 0,
    }
}

fn kind(access: Access) -> i32 {
    match access {
        Access::ReadWrite => libc::F_WRLCK,
        Access::ReadOnly => libc::F_RDLCK,
    }
}

fn fcntl(file: &File, command: i32, request: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the commands used here read and write one `flock`, which `request` is.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Takes the lock, or changes nothing. Taking a lock that one has is no error.
pub(super) fn take(file: &File, access: Access) -> io::Result<Answer> {
    match fcntl(file, libc::F_OFD_SETLK, &mut request(kind(access))) {
        Ok(()) => Ok(Answer::Free),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(Answer::Taken)
        }
        Err(e) => Err(e),
    }
}

/// Gives the lock up.
pub(super) fn release(file: &File) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut request(libc::F_UNLCK))
}

/// Whether the lock could be taken now.
pub(super) fn probe(file: &File, access: Access) -> io::Result<Answer> {
    let mut request = request(kind(access));
    fcntl(file, libc::F_OFD_GETLK, &mut request)?;
    Ok(match i32::from(request.l_type) {
        libc::F_UNLCK => Answer::Free,
        _ => Answer::Taken,
    })
}
