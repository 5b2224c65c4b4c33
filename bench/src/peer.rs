//! The VMMs that are compared, and how each is started.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail, ensure};

use crate::case::Case;

/// How to come by QEMU.
const GET_QEMU: &str = "install QEMU 10: on Debian 13 `apt install qemu-system-x86`, on Debian 12 \
                        `apt install -t bookworm-backports qemu-system-x86`";

/// How to come by vmferry.
const GET_VMFERRY: &str =
    "build it with `cargo build --release -p vmferry`, or give --vmferry PATH";

/// Which VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// QEMU's `microvm`.
    Qemu,
    /// `vmferry run`.
    Vmferry,
}

/// What a VM is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Boots the guest.
    Source,
    /// Waits for it.
    Destination,
}

impl Role {
    /// What it is called in messages and files.
    pub fn name(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Destination => "destination",
        }
    }
}

/// A VMM that is there and can be started.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Which.
    pub kind: Kind,
    /// What it says it is.
    pub version: String,
    program: PathBuf,
}

impl Peer {
    /// Finds QEMU.
    ///
    /// # Errors
    /// It is not there, or too old.
    pub fn qemu() -> anyhow::Result<Self> {
        let program = PathBuf::from("qemu-system-x86_64");
        let version = version(&program, GET_QEMU)?;
        // "QEMU emulator version 10.0.2 (...)"
        let number = version.split_whitespace().nth(3).unwrap_or_default();
        let major = number
            .split('.')
            .next()
            .and_then(|major| major.parse().ok());
        ensure!(
            major.is_some_and(|major: u32| major >= 10),
            "this is {version}, which is too old to be compared with: {GET_QEMU}"
        );
        Ok(Peer {
            kind: Kind::Qemu,
            version,
            program,
        })
    }

    /// Finds vmferry: `program`, or else the one built beside this program.
    ///
    /// # Errors
    /// It is not there.
    pub fn vmferry(program: Option<&Path>) -> anyhow::Result<Self> {
        let program = match program {
            Some(program) => program.to_owned(),
            None if cfg!(debug_assertions) => bail!(
                "a debug build of vmferry would be measured: run this with `cargo run --release`, or \
                 give --vmferry PATH"
            ),
            None => std::env::current_exe()
                .context("cannot find this program")?
                .with_file_name("vmferry"),
        };
        let version = version(&program, GET_VMFERRY)?;
        Ok(Peer {
            kind: Kind::Vmferry,
            version,
            program,
        })
    }

    /// What it is called in tables.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Qemu => "QEMU",
            Kind::Vmferry => "vmferry",
        }
    }

    /// The command that starts a VM. Its serial port leads to standard output, its monitor to `socket`.
    pub fn command(&self, role: Role, case: &Case, elf: &Path, socket: &Path) -> Command {
        let mut command = Command::new(&self.program);
        let socket = format!("unix:{}", socket.display());
        let memory = case.memory_mib;
        match self.kind {
            Kind::Qemu => {
                command
                    .args(["-M", "microvm", "-accel", "kvm"])
                    .args(["-cpu", "max,-arch-capabilities"])
                    .args(["-m", &format!("{memory}M")])
                    .args(["-display", "none", "-monitor", "none", "-no-reboot"])
                    .args(["-serial", "stdio"])
                    .args(["-qmp", &format!("{socket},server=on,wait=off")])
                    // The destination wants them as well: they are part of the machine.
                    .arg("-kernel")
                    .arg(elf)
                    .args(["-append", case.cmdline]);
                if role == Role::Destination {
                    command.args(["-incoming", "tcp:127.0.0.1:0"]);
                }
            }
            Kind::Vmferry => {
                command
                    .args(["run", "--memory", &format!("{memory}MiB")])
                    .args(["--serial", "stdio", "--no-reboot", "--qmp", &socket]);
                match role {
                    Role::Source => command
                        .arg("--kernel")
                        .arg(elf)
                        .args(["--cmdline", case.cmdline]),
                    Role::Destination => command.args(["--incoming", "tcp:127.0.0.1:0"]),
                };
            }
        }
        command
    }
}

/// The first line that `program --version` prints. `get` says how to come by the program.
fn version(program: &Path, get: &str) -> anyhow::Result<String> {
    let shown = program.display();
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => anyhow!("there is no {shown}: {get}"),
            _ => anyhow!("cannot run {shown}: {error}"),
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default();
    ensure!(
        output.status.success() && !line.is_empty(),
        "{shown} does not tell its version"
    );
    Ok(line.to_owned())
}
