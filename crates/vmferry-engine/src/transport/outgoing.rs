//! The source's end of a transport, and what it takes to finish there.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group, setsid};
use tempfile::NamedTempFile;

use super::channel::{Channel, cancelled};
use super::{TransportError, Uri, tcp, unix};
use crate::cancel::CancelToken;
use crate::wait::{Wait, Waits};

/// An outgoing transport: open for writing until [`finish`](Self::finish)ed or dropped.
pub struct Outgoing {
    uri: Uri,
    channel: Channel,
    finish: Finish,
    cancel: CancelToken,
}

/// What is left to do when the stream is written.
enum Finish {
    Nothing,
    /// Put the complete snapshot in the place of whatever has its name; dropping it removes it.
    Persist(NamedTempFile, PathBuf),
    /// Close the command's input and wait for it to succeed.
    Wait(RunningCommand),
}

/// A command that is ended when it is not needed any more, with all that it has started, if it still runs.
pub(super) struct RunningCommand(Child);

impl RunningCommand {
    /// Starts `command` in a shell, in a session of its own: all of its processes can be ended together. So they have no
    /// terminal either, and fail where they would ask there.
    pub(super) fn start(command: &str, stdin: Stdio, stdout: Stdio) -> io::Result<Self> {
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command).stdin(stdin).stdout(stdout);
        // SAFETY: between fork and exec only a system call is made.
        unsafe { shell.pre_exec(|| Ok(setsid().map(drop)?)) };
        Ok(RunningCommand(shell.spawn()?))
    }

    /// The end of the pipe that is the command's output.
    pub(super) fn take_output(&mut self) -> OwnedFd {
        self.0.stdout.take().expect("the output is a pipe").into()
    }

    /// Waits for the command to succeed, unless cancelled.
    fn wait(&mut self, cancel: &CancelToken) -> io::Result<()> {
        // Polled, because a wait that cancellation can end exists only for children of no other thread. It
        // has no time limit: a compressor may have a lot to write.
        let mut pause = Duration::from_micros(100);
        loop {
            if let Some(status) = self.0.try_wait()? {
                return match status.success() {
                    true => Ok(()),
                    false => Err(io::Error::other(format!("the command ended with {status}"))),
                };
            }
            if cancel.is_cancelled() {
                return Err(cancelled());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let group = Pid::from_child(&self.0);
            // It fails if all of them are ending.
            let _ = kill_process_group(group, Signal::KILL);
            let _ = self.0.wait();
        }
    }
}

impl Outgoing {
    /// Opens the transport. `timeout` bounds connecting.
    pub fn open(
        uri: &Uri,
        timeout: Duration,
        cancel: &CancelToken,
        waits: &Waits,
    ) -> Result<Self, TransportError> {
        let action = match uri {
            Uri::Tcp { .. } | Uri::Unix(_) => "connect to",
            Uri::Fd(_) => "use",
            Uri::Exec(_) => "start",
            Uri::File(_) => "create",
        };
        let (channel, finish) =
            Self::open_io(uri, timeout, cancel, waits).map_err(TransportError::on(action, uri))?;
        Ok(Outgoing {
            uri: uri.clone(),
            channel,
            finish,
            cancel: cancel.clone(),
        })
    }

    fn open_io(
        uri: &Uri,
        timeout: Duration,
        cancel: &CancelToken,
        waits: &Waits,
    ) -> io::Result<(Channel, Finish)> {
        let plain = |fd: OwnedFd| Ok((Channel::new(fd, cancel.clone())?, Finish::Nothing));
        match uri {
            Uri::Tcp { host, port } => {
                let resolving = waits.begin(Wait::NameResolution);
                let addresses = tcp::resolve(host, *port, "localhost")?;
                drop(resolving);
                let _connecting = waits.begin(Wait::Connection);
                Ok((tcp::connect(&addresses, timeout, cancel)?, Finish::Nothing))
            }
            Uri::Unix(path) => {
                let _connecting = waits.begin(Wait::Connection);
                plain(unix::connect(path, timeout, cancel)?)
            }
            Uri::Fd(fd) => plain(inherited(*fd)?),
            Uri::Exec(command) => {
                let mut child = RunningCommand::start(command, Stdio::piped(), Stdio::inherit())?;
                let input = child.0.stdin.take().expect("the input is a pipe");
                let channel = Channel::new(input.into(), cancel.clone())?;
                Ok((channel, Finish::Wait(child)))
            }
            Uri::File(path) => {
                let _opening = waits.begin(Wait::Open);
                open_file(path, cancel)
            }
        }
    }

    /// Where to write.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Closes the transport after the whole stream was written: a file is on the disk, under its name, and a
    /// command has succeeded.
    ///
    /// A command's success is its word that the guest is safe; when it fails, the guest goes on here, so a
    /// command that starts the guest elsewhere must not fail afterwards. When the user cancels, a command is ended, and
    /// what it had done with the guest by then is not known.
    pub fn finish(self, waits: &Waits) -> Result<(), TransportError> {
        let uri = self.uri.clone();
        self.finish_io(waits)
            .map_err(TransportError::on("complete", &uri))
    }

    fn finish_io(self, waits: &Waits) -> io::Result<()> {
        let syncing = waits.begin(Wait::Storage);
        self.channel.sync()?;
        drop(syncing);
        // A command ends when its input does, and this is the only descriptor of it.
        drop(self.channel);
        match self.finish {
            Finish::Nothing => Ok(()),
            Finish::Persist(..) if self.cancel.is_cancelled() => Err(cancelled()),
            Finish::Persist(file, path) => {
                let _syncing = waits.begin(Wait::Storage);
                file.persist(&path)?;
                File::open(parent(&path))?.sync_all()
            }
            Finish::Wait(mut command) => {
                let _waiting = waits.begin(Wait::Command);
                command.wait(&self.cancel)
            }
        }
    }
}

/// A snapshot is written beside its place and moved there when it is complete, so that a failure leaves
/// what was there. A path that names something else than a file (a device, a FIFO) is written to directly.
fn open_file(path: &Path, cancel: &CancelToken) -> io::Result<(Channel, Finish)> {
    match path.metadata() {
        Ok(meta) if meta.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        Ok(meta) if !meta.is_file() => {
            let file = OpenOptions::new().write(true).open(path)?;
            Ok((Channel::new(file.into(), cancel.clone())?, Finish::Nothing))
        }
        _ => {
            let file = NamedTempFile::with_prefix_in(".vmferry-snapshot-", parent(path))?;
            let fd = file.as_file().try_clone()?.into();
            let channel = Channel::new(fd, cancel.clone())?;
            Ok((channel, Finish::Persist(file, path.to_owned())))
        }
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    }
}

/// A copy of a descriptor that this process was given, so that closing it leaves the original alone.
pub(super) fn inherited(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: dup takes any number, and says so if it is no descriptor.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn write_all(channel: &Channel, bytes: &[u8]) {
        let piece = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: the piece is a live slice.
        let written = unsafe { channel.write_pieces(&[piece]) };
        assert_eq!(written.unwrap(), bytes.len());
    }

    #[test]
    fn an_unfinished_snapshot_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        std::fs::write(&path, "old").unwrap();
        let cancel = CancelToken::new().unwrap();
        let open = || {
            let uri = Uri::File(path.clone());
            Outgoing::open(&uri, Duration::from_secs(1), &cancel, &Waits::default())
        };
        let out = open().unwrap();
        write_all(out.channel(), b"half");
        drop(out);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(dir.path().read_dir().unwrap().count(), 1);
        let out = open().unwrap();
        write_all(out.channel(), b"new");
        out.finish(&Waits::default()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_failing_command_is_an_error_and_a_cancelled_one_is_ended() {
        let cancel = CancelToken::new().unwrap();
        let open = |command: &str| {
            let uri = Uri::Exec(command.into());
            Outgoing::open(&uri, Duration::from_secs(1), &cancel, &Waits::default()).unwrap()
        };
        let finish = |out: Outgoing| out.finish(&Waits::default());
        finish(open("cat > /dev/null")).unwrap();
        let error = finish(open("exit 3")).unwrap_err().to_string();
        assert!(
            error.contains("exec:exit 3") && error.contains("exit status: 3"),
            "{error}"
        );
        let start = Instant::now();
        let slow = open("exec sleep 60");
        cancel.cancel();
        assert!(finish(slow).is_err());
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
