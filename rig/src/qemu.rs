//! The emulated computer.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::error::{Attempt, RigError};
use crate::process::not_started;

const QEMU: &str = "qemu-system-x86_64";
const QEMU_HINT: &str =
    "install QEMU 8 or newer (Debian: qemu-system-x86), or let scripts/test.sh do it";

/// What the computer is made of.
pub(crate) struct Computer<'a> {
    pub kernel: &'a Path,
    /// A file without a name.
    pub initrd: OwnedFd,
    pub memory_mib: u32,
    pub cpus: u32,
}

/// QEMU at work. Nothing of it is left when this is dropped, nor when the rig is killed.
pub(crate) struct Qemu {
    child: Child,
    /// What the kernel prints.
    pub console: UnixStream,
    /// The port "stdout".
    pub stdout: UnixStream,
    /// The port "stderr".
    pub stderr: UnixStream,
}

impl Qemu {
    /// Switches the computer on.
    pub fn start(computer: &Computer<'_>) -> Result<Self, RigError> {
        let pair = || UnixStream::pair().attempt(|| "create a socket".into());
        let (console, its_console) = pair()?;
        let (stdout, its_stdout) = pair()?;
        let (stderr, its_stderr) = pair()?;
        let socket = |id: &str, socket: &UnixStream| {
            let fd = socket.as_raw_fd();
            ["-chardev".to_owned(), format!("socket,id={id},fd={fd}")]
        };
        let port = |id: &str| {
            let port = format!("virtserialport,chardev={id},name={id}");
            ["-device".to_owned(), port]
        };
        let inherited = [&its_console, &its_stdout, &its_stderr].map(AsRawFd::as_raw_fd);
        let initrd = computer.initrd.as_raw_fd();

        let mut command = Command::new(QEMU);
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-machine", "q35"])
            // Every CPU in a thread of its own; "max" has AMD's virtualization with nested paging. What is switched
            // off makes page walks longer, or serves a third level, and is the part of the emulation to trust least.
            .args([
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max,la57=off,pku=off,vgif=off,v-vmsave-vmload=off",
            ])
            .args(["-smp", &computer.cpus.to_string()])
            .args(["-m", &format!("{}M", computer.memory_mib)])
            .arg("-kernel")
            .arg(computer.kernel)
            .args(["-initrd", &format!("/dev/fd/{initrd}")])
            .args(["-append", "console=ttyS0 panic=-1 tsc=reliable"])
            .args(socket("console", &its_console))
            .args(["-serial", "chardev:console"])
            .args(["-device", "virtio-serial-pci"])
            .args(socket("stdout", &its_stdout))
            .args(port("stdout"))
            .args(socket("stderr", &its_stderr))
            .args(port("stderr"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let prepare = move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            for fd in inherited.into_iter().chain([initrd]) {
                inherit(fd)?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec only system calls are made, without allocation or locks.
        unsafe { command.pre_exec(prepare) };
        let child = command
            .spawn()
            .map_err(|e| not_started(&command, e, QEMU_HINT))?;
        Ok(Qemu {
            child,
            console,
            stdout,
            stderr,
        })
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> Result<bool, RigError> {
        let ended = self.child.try_wait();
        Ok(ended.attempt(|| format!("wait for {QEMU}"))?.is_some())
    }

    /// What it has complained about; after its end.
    pub fn words(&mut self) -> String {
        let mut words = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            // What can be read is better than nothing.
            let _ = io::Read::read_to_string(&mut stderr, &mut words);
        }
        words
    }

    /// Switches the computer off; how QEMU ended.
    pub fn end(&mut self) -> String {
        // It may have ended by itself.
        let _ = self.child.kill();
        match self.child.wait() {
            Ok(status) => format!("{QEMU}: {status}"),
            Err(error) => format!("{QEMU}: {error}"),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.end();
    }
}

/// Leaves a descriptor open over exec.
fn inherit(fd: RawFd) -> io::Result<()> {
    // SAFETY: the descriptor belongs to the caller, who keeps it open until QEMU has been started.
    let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) };
    Ok(fcntl_setfd(fd, FdFlags::empty())?)
}
