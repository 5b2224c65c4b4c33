//! A VM of this program's own, whichever VMM runs it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use vmferry_control::schema::{MigrationInfo, MigrationStatus, SocketAddress};
use vmferry_control::{QmpClient, Timestamp};

use crate::case::Case;
use crate::felt::BEATS_BEFORE;
use crate::interrupt::Interrupt;
use crate::peer::{Peer, Role};
use crate::serial::{Beat, Serial};

/// How long a monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a VM may take to start, its guest to say something, a sweep over its memory, and so on.
const STEP: Duration = Duration::from_secs(120);

/// A running VM.
#[derive(Debug)]
pub struct Vm {
    process: Process,
    qmp: QmpClient,
    serial: Serial,
    interrupt: Interrupt,
}

impl Vm {
    /// Starts one. Its socket and its messages are kept in `dir`.
    ///
    /// # Errors
    /// It does not start, or its monitor does not answer.
    pub fn start(
        peer: &Peer,
        role: Role,
        case: &Case,
        elf: &Path,
        dir: &Path,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        let name = format!("{} as the {}", peer.name(), role.name());
        let socket = dir.join(format!("{}.qmp", role.name()));
        let messages = dir.join(format!("{}.messages", role.name()));
        let stderr = File::create(&messages).context("cannot create a file for messages")?;
        let mut child = peer
            .command(role, case, elf, &socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let stdout = child.stdout.take();
        let mut process = Process {
            child,
            name,
            messages,
        };
        let serial = Serial::read(stdout.context("there is no standard output")?)?;
        let qmp = interrupt.wait(STEP, || {
            process.check()?;
            // The socket is there a moment after the process.
            Ok(QmpClient::connect(&socket, PATIENCE).ok())
        })?;
        Ok(Vm {
            qmp: qmp.with_context(|| format!("the monitor of {} does not answer", process.name))?,
            process,
            serial,
            interrupt: interrupt.clone(),
        })
    }

    /// Waits until the guest has filled its memory and then lived long enough for a measurement.
    ///
    /// # Errors
    /// It has not in time.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        let serial = &self.serial;
        let ready = self.interrupt.wait(STEP, || {
            self.process.check()?;
            Ok(serial.contains("dirtier: ready").then_some(()))
        })?;
        ready.with_context(|| self.silent("filled its memory"))?;
        self.beats(|beats| beats.len() >= BEATS_BEFORE)?;
        Ok(())
    }

    /// Waits until the guest's heartbeats on this VM are as `wanted`; gives back all of them.
    ///
    /// # Errors
    /// They are not in time.
    pub fn beats(&mut self, wanted: impl Fn(&[Beat]) -> bool) -> anyhow::Result<Vec<Beat>> {
        let serial = &self.serial;
        let beats = self.interrupt.wait(STEP, || {
            self.process.check()?;
            let beats = serial.beats();
            Ok(wanted(&beats).then_some(beats))
        })?;
        beats.with_context(|| self.silent("said what was waited for"))
    }

    fn silent(&self, what: &str) -> String {
        let words = self.serial.last_words();
        let name = &self.process.name;
        format!("the guest on {name} has not {what} within {STEP:?}; its last words: {words}")
    }

    /// The address that a destination listens at.
    ///
    /// # Errors
    /// It does not listen in time.
    pub fn listening(&mut self) -> anyhow::Result<String> {
        let uri = self.interrupt.wait(STEP, || {
            self.process.check()?;
            let addresses = self.qmp.query_migrate()?.socket_address.unwrap_or_default();
            Ok(addresses.into_iter().find_map(|address| match address {
                SocketAddress::Inet { host, port } => Some(format!("tcp:{host}:{port}")),
                SocketAddress::Unix { .. } => None,
            }))
        })?;
        uri.with_context(|| format!("{} does not listen", self.process.name))
    }

    /// Sets parameters and moves the guest away.
    ///
    /// # Errors
    /// The guest has not moved in time.
    pub fn migrate(&mut self, uri: &str, parameters: Value) -> anyhow::Result<MigrationInfo> {
        self.qmp.execute("migrate-set-parameters", parameters)?;
        self.qmp.execute("migrate", json!({"uri": uri}))?;
        let info = self.interrupt.wait(STEP, || {
            self.process.check()?;
            let info = self.qmp.query_migrate()?;
            match info.status {
                Some(MigrationStatus::Completed) => Ok(Some(info)),
                Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                    let why = info.error_desc.as_deref().unwrap_or("no reason was given");
                    bail!("the migration from {} failed: {why}", self.process.name)
                }
                _ => Ok(None),
            }
        })?;
        info.with_context(|| format!("the migration did not end within {STEP:?}"))
    }

    /// Waits for the event; gives back when it happened, by the host's clock, since 1970.
    ///
    /// # Errors
    /// It has not happened in time.
    pub fn event(&mut self, name: &str) -> anyhow::Result<Duration> {
        let timestamp = self.interrupt.wait(STEP, || {
            self.process.check()?;
            while let Some(event) = self.qmp.next_event(Duration::from_millis(1))? {
                if event.event == name {
                    return Ok(Some(event.timestamp));
                }
            }
            Ok(None)
        })?;
        let Timestamp {
            seconds,
            microseconds,
        } = timestamp.with_context(|| format!("no {name} from {}", self.process.name))?;
        ensure!(
            seconds >= 0 && microseconds >= 0,
            "{} has no clock",
            self.process.name
        );
        Ok(Duration::from_secs(seconds as u64) + Duration::from_micros(microseconds as u64))
    }

    /// CPU time that the VMM and its guest have used.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        let path = format!("/proc/{}/stat", self.process.child.id());
        let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let ticks = cpu_ticks(&stat).with_context(|| format!("cannot understand {path}"))?;
        let per_second = rustix::param::clock_ticks_per_second();
        Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
    }

    /// Bytes of memory that the VMM and its guest have from the host.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn resident(&self) -> anyhow::Result<u64> {
        let path = format!("/proc/{}/status", self.process.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let kib = resident_kib(&status).with_context(|| format!("cannot understand {path}"))?;
        Ok(kib << 10)
    }
}

/// Resident memory of a process in KiB, from its `status` file.
fn resident_kib(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// User and system time of a process, from its `stat` file.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The second field, the program's name, is in parentheses and may contain anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// A VMM's process. Ended when dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    /// For error messages.
    name: String,
    /// The file that it writes its messages to.
    messages: PathBuf,
}

impl Process {
    /// An error if it has ended.
    fn check(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let messages = fs::read_to_string(&self.messages).unwrap_or_default();
        bail!("{} ended ({status}): {}", self.name, messages.trim())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 0 0 0 12 30 0 0 20 0 5 0 99 1000 10";
        assert_eq!(cpu_ticks(stat), Some(42));
        assert_eq!(cpu_ticks("7 (a"), None);
    }

    #[test]
    fn resident_memory_is_found() {
        assert_eq!(
            resident_kib("VmHWM:\t   9 kB\nVmRSS:\t    42 kB\n"),
            Some(42)
        );
        assert_eq!(resident_kib("VmRSS:\t"), None);
    }
}
