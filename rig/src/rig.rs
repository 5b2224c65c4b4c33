//! One command in the first level, from boot to exit status.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::debian::Debian;
use crate::error::{Attempt, RigError};
use crate::initramfs::Initramfs;
use crate::outlet::copy_until_mark;
use crate::qemu::{Computer, Qemu};

const INIT: &str = include_str!("init.sh");

/// For the rig itself (virtio_pci, virtio_console), and for what runs in it: KVM, and network interfaces for guests
/// with a bridge between them.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_console", "kvm_amd", "tun", "bridge"];

/// How many bytes of the console are shown when something goes wrong.
const CONSOLE_SHOWN: usize = 2000;

/// How often is looked whether the command is over.
const POLL: Duration = Duration::from_millis(10);

/// How a command in the first level ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status, as a shell tells it: 128 and the signal's number for one that was killed.
    pub status: u8,
}

/// A first level, to be booted for one command.
///
/// ```no_run
/// # fn main() -> Result<(), vmferry_rig::RigError> {
/// let debian = vmferry_rig::Debian::get(&vmferry_rig::default_cache())?;
/// let mut rig = vmferry_rig::Rig::new(["ls", "-l", "/dev/kvm"]);
/// let ended = rig.run(&debian, std::io::stdout(), std::io::stderr())?;
/// assert_eq!(ended.status, 0);
/// # Ok(())
/// # }
/// ```
pub struct Rig {
    command: Vec<String>,
    environment: Vec<(String, String)>,
    with: Vec<(PathBuf, PathBuf)>,
    memory_mib: u32,
    cpus: u32,
    timeout: Duration,
    console: Console,
}

/// What is done with the console of the first level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Console {
    /// Its end is shown if something goes wrong.
    Kept,
    /// It goes to the standard error.
    Shown,
}

impl Rig {
    /// A first level for `command`, with 2 GiB of memory, one CPU and ten minutes of time.
    pub fn new<S: Into<String>>(command: impl IntoIterator<Item = S>) -> Self {
        Rig {
            command: command.into_iter().map(Into::into).collect(),
            environment: Vec::new(),
            with: Vec::new(),
            memory_mib: 2048,
            cpus: 1,
            timeout: Duration::from_secs(600),
            console: Console::Kept,
        }
    }

    /// Copies a file or a directory of the host to the same place in the first level; programs with their libraries.
    pub fn with(&mut self, path: impl Into<PathBuf>) -> &mut Self {
        let path = path.into();
        self.with_at(path.clone(), path)
    }

    /// Copies a file or a directory of the host to another place.
    pub fn with_at(&mut self, path: impl Into<PathBuf>, at: impl Into<PathBuf>) -> &mut Self {
        self.with.push((path.into(), at.into()));
        self
    }

    /// Sets an environment variable of the command.
    pub fn env(&mut self, name: &str, value: &str) -> &mut Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The first level's memory, which also holds its file system.
    pub fn memory_mib(&mut self, memory: u32) -> &mut Self {
        self.memory_mib = memory;
        self
    }

    /// The first level's CPUs. With more than one, QEMU's emulation is not reliable (see the README).
    pub fn cpus(&mut self, cpus: u32) -> &mut Self {
        self.cpus = cpus;
        self
    }

    /// How long it may take in all, from boot on.
    pub fn timeout(&mut self, timeout: Duration) -> &mut Self {
        self.timeout = timeout;
        self
    }

    /// Shows what the first level's kernel prints, on the standard error.
    pub fn show_console(&mut self) -> &mut Self {
        self.console = Console::Shown;
        self
    }

    /// Boots, runs the command, and passes on what it says, while it says it.
    pub fn run(
        &mut self,
        debian: &Debian,
        stdout: impl Write + Send,
        stderr: impl Write + Send,
    ) -> Result<Ended, RigError> {
        let mark = format!("\x01vmferry-rig:{:032x}:", fastrand::u128(..));
        let computer = Computer {
            kernel: debian.kernel(),
            initrd: self.initrd(debian, &mark)?.into(),
            memory_mib: self.memory_mib,
            cpus: self.cpus,
        };
        let mut qemu = Qemu::start(&computer)?;
        let console = Tail::default();
        let streams = [&qemu.console, &qemu.stdout, &qemu.stderr].map(|s| s.try_clone());
        let [its_console, its_stdout, its_stderr] = streams;
        let clone = || "use a socket twice".to_owned();
        let its_console = its_console.attempt(clone)?;
        let (its_stdout, its_stderr) = (its_stdout.attempt(clone)?, its_stderr.attempt(clone)?);
        let (results, ends) = mpsc::channel();
        let mark = mark.as_bytes();
        thread::scope(|scope| {
            scope.spawn(|| console.follow(its_console, self.console));
            let also = results.clone();
            // Nobody listens any more once one of them has failed.
            scope.spawn(move || results.send(copy_until_mark(its_stdout, stdout, mark)));
            scope.spawn(move || also.send(copy_until_mark(its_stderr, stderr, mark)));
            let ended = self.wait(&mut qemu, &console, &ends);
            // The readers come to their ends with QEMU's.
            qemu.end();
            ended
        })
    }

    /// Waits until both streams are over. Each ends with the command's exit status.
    fn wait(
        &self,
        qemu: &mut Qemu,
        console: &Tail,
        ends: &Receiver<io::Result<Option<String>>>,
    ) -> Result<Ended, RigError> {
        let deadline = Instant::now() + self.timeout;
        let mut streams = 2;
        loop {
            match ends.recv_timeout(POLL) {
                Ok(end) => {
                    let told = end.attempt(|| "pass on what the command says".into())?;
                    let status = told.and_then(|told| told.parse().ok());
                    let Some(status) = status else {
                        return Err(died(qemu, console));
                    };
                    streams -= 1;
                    if streams == 0 {
                        return Ok(Ended { status });
                    }
                }
                Err(_) if qemu.has_ended()? => return Err(died(qemu, console)),
                Err(_) if Instant::now() > deadline => {
                    return Err(RigError::TimedOut {
                        after: self.timeout,
                        console: console.text(),
                    });
                }
                Err(_) => {}
            }
        }
    }

    /// The initial RAM disk, in a file without a name.
    fn initrd(&self, debian: &Debian, mark: &str) -> Result<File, RigError> {
        let mut initramfs = Initramfs::new(debian, INIT)?;
        for module in MODULES {
            initramfs.module(module)?;
        }
        initramfs.file(Path::new("rig/mark"), 0o644, mark).file(
            Path::new("rig/command"),
            0o755,
            self.script(),
        );
        for (path, at) in &self.with {
            initramfs.host_path(path, at)?;
        }
        let file = memfd_create("initrd", MemfdFlags::CLOEXEC)
            .map_err(io::Error::from)
            .attempt(|| "create a file in memory".into())?;
        let file = File::from(file);
        initramfs.write(BufWriter::new(&file))?;
        Ok(file)
    }

    /// The command with its environment, for a shell.
    fn script(&self) -> String {
        let variables = self.environment.iter();
        let variables: String = variables
            .map(|(name, value)| format!("export {name}={}\n", quoted(value)))
            .collect();
        let words: Vec<_> = self.command.iter().map(|word| quoted(word)).collect();
        format!("cd /root\n{variables}exec {}\n", words.join(" "))
    }
}

/// The error of a first level that is no more, or speaks nonsense.
fn died(qemu: &mut Qemu, console: &Tail) -> RigError {
    let how = qemu.end();
    RigError::Died {
        qemu: format!("{how} {}", qemu.words()).trim().to_owned(),
        console: console.text(),
    }
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The end of what the console says.
#[derive(Default)]
struct Tail(Mutex<VecDeque<u8>>);

impl Tail {
    fn follow(&self, mut from: impl Read, to: Console) {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            let mut kept = self.0.lock().expect("no holder panics");
            kept.extend(&chunk[..count]);
            let excess = kept.len().saturating_sub(CONSOLE_SHOWN);
            kept.drain(..excess);
            drop(kept);
            if to == Console::Shown {
                // Nobody may be there to see it.
                let _ = io::stderr().write_all(&chunk[..count]);
            }
        }
    }

    fn text(&self) -> String {
        let kept: Vec<u8> = self
            .0
            .lock()
            .expect("no holder panics")
            .iter()
            .copied()
            .collect();
        String::from_utf8_lossy(&kept).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_command_stay_what_they_are() {
        let mut rig = Rig::new(["echo", "it's", "$HOME  *"]);
        rig.env("A", "b c");
        assert_eq!(
            rig.script(),
            "cd /root\nexport A='b c'\nexec 'echo' 'it'\\''s' '$HOME  *'\n"
        );
    }
}
