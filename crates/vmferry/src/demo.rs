//! `vmferry demo`: a live migration to look at, with a guest that checks itself.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::json;
use vmferry_control::QmpClient;
use vmferry_control::schema::{MigrationInfo, SocketAddress};
use vmferry_control::units::{format_bandwidth, format_size};
use vmferry_guests::Heartbeat;

use crate::cli;
use crate::logging::note;
use crate::migrate::{quit, succeed};
use crate::output::print;
use crate::progress::{Audience, PATIENCE, POLL, follow};
use crate::report::{Table, micros, millis};

/// How long any step of the demo may take.
const STEP: Duration = Duration::from_secs(120);

/// Memory that the guest's program and its bookkeeping take, beside the pages that it fills: generous.
const GUEST_OVERHEAD: u64 = 64 << 20;

/// Runs the demo. An error if anything was lost.
pub fn demo(options: &cli::Demo) -> anyhow::Result<()> {
    let plan = Plan::new(options)?;
    let say = |text: String| {
        if !options.json {
            note(text);
        }
    };
    let dir = tempfile::tempdir().context("cannot create a directory for sockets")?;
    say(format!(
        "Starting a guest of {}: it rewrites {} at {}, and keeps {} that it only verifies.",
        format_size(options.memory),
        format_size(plan.working_set),
        match options.rate {
            0 => "full speed".to_owned(),
            rate => format!(
                "{rate} pages a second ({})",
                format_bandwidth(rate.saturating_mul(4096))
            ),
        },
        format_size(plan.cold),
    ));
    let mut source = Vm::start(dir.path(), "source", options.memory, &plan.kernel_args())?;
    let mut destination = Vm::start(
        dir.path(),
        "destination",
        options.memory,
        &["--incoming", "tcp:127.0.0.1:0"].map(str::to_owned),
    )?;
    let uri = destination.listening()?;
    let before = source.heartbeat(|beat| beat.t >= 3)?;
    say(format!("The guest is up. Moving it to {uri} ..."));

    source.qmp.execute("migrate", json!({"uri": uri}))?;
    let audience = match options.json {
        true => Audience::Nobody,
        false => Audience::Person,
    };
    let info = follow(&mut source.qmp, audience)?;
    succeed(&info)?;
    quit(&mut source.qmp)?;

    say("It runs on the other side. Waiting until it has verified all its memory there ...".into());
    let first = destination.heartbeat(|_| true)?;
    // The move falls into the second that the first heartbeat tells of, or, if that was being printed
    // during the move, into the next.
    let next = destination.heartbeat(|beat| beat.t > first.t)?;
    let felt = first.gap_us.max(next.gap_us);
    // A sweep that ended now may have begun on the source: the one after it has seen every page here.
    let verified = destination.heartbeat(|beat| beat.sweeps >= first.sweeps + 2)?;
    quit(&mut destination.qmp)?;
    report(options, &info, &before, felt, &verified)
}

/// What the guest is told to do with its memory.
struct Plan {
    working_set: u64,
    cold: u64,
    rate: u64,
}

impl Plan {
    fn new(options: &cli::Demo) -> anyhow::Result<Self> {
        let needed = options.working_set.saturating_add(GUEST_OVERHEAD);
        ensure!(
            options.memory >= needed,
            "a guest of {} is too small for a working set of {}: give it --memory {} or more",
            format_size(options.memory),
            format_size(options.working_set),
            format_size(needed)
        );
        Ok(Plan {
            working_set: options.working_set,
            // Half of what is left is filled and only verified; the rest stays untouched, as in most guests.
            cold: ((options.memory - needed) / 2) & !0xfff,
            rate: options.rate,
        })
    }

    fn kernel_args(&self) -> Vec<String> {
        /// How long the guest takes to look through all its memory. People wait for two such sweeps.
        const SWEEP_SECONDS: u64 = 4;
        let sweep = ((self.working_set + self.cold) >> 12) / SWEEP_SECONDS;
        let cmdline = format!(
            "ws={} rate={} pattern=random fill=random cold={} sweep={sweep} seed=1",
            self.working_set, self.rate, self.cold
        );
        ["--kernel", "guest:dirtier", "--cmdline", &cmdline]
            .map(str::to_owned)
            .to_vec()
    }
}

/// A `vmferry run` of our own. Ended when dropped.
struct Vm {
    child: Child,
    qmp: QmpClient,
    serial: PathBuf,
}

impl Vm {
    fn start(dir: &Path, name: &str, memory: u64, args: &[String]) -> anyhow::Result<Self> {
        let socket = dir.join(format!("{name}.qmp"));
        let serial = dir.join(format!("{name}.serial"));
        let vmferry = std::env::current_exe().context("cannot find the vmferry program")?;
        let mut command = Command::new(vmferry);
        command
            .args(["run", "--name", name])
            .args(["--memory", &memory.to_string()])
            .args(["--qmp", &format!("unix:{}", socket.display())])
            .args(["--serial", &format!("file:{}", serial.display())])
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        let end_with_us = || Ok(set_parent_process_death_signal(Some(Signal::TERM))?);
        // SAFETY: between fork and exec only a system call is made.
        unsafe { command.pre_exec(end_with_us) };
        let mut child = command.spawn().context("cannot start vmferry run")?;
        let end = Instant::now() + STEP;
        let qmp = loop {
            if child.try_wait()?.is_some() {
                let output = child.wait_with_output()?;
                bail!(
                    "the {name} did not start: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                );
            }
            match QmpClient::connect(&socket, PATIENCE) {
                Ok(qmp) => break qmp,
                Err(error) if Instant::now() > end => return Err(error.into()),
                Err(_) => std::thread::sleep(POLL),
            }
        };
        Ok(Vm { child, qmp, serial })
    }

    /// The address that an incoming VM listens at.
    fn listening(&mut self) -> anyhow::Result<String> {
        let end = Instant::now() + STEP;
        loop {
            let addresses = self.qmp.query_migrate()?.socket_address.unwrap_or_default();
            if let Some(SocketAddress::Inet { host, port, .. }) = addresses.first() {
                return Ok(format!("tcp:{host}:{port}"));
            }
            ensure!(Instant::now() < end, "the destination does not listen");
            std::thread::sleep(POLL);
        }
    }

    /// Waits for a line of the guest's that is as `wanted`.
    fn heartbeat(&mut self, wanted: impl Fn(&Heartbeat) -> bool) -> anyhow::Result<Heartbeat> {
        let end = Instant::now() + STEP;
        loop {
            let output = fs::read(&self.serial).unwrap_or_default();
            let output = String::from_utf8_lossy(&output);
            if let Some(line) = output.lines().find(|line| line.contains("CORRUPT")) {
                bail!("the guest found a corrupt page: {line}");
            }
            let beats = output.lines().filter_map(Heartbeat::parse);
            if let Some(beat) = beats.filter(&wanted).last() {
                return Ok(beat);
            }
            if self.child.try_wait()?.is_some() {
                bail!(
                    "the guest is gone; its last words: {}",
                    output.lines().last().unwrap_or("")
                );
            }
            ensure!(
                Instant::now() < end,
                "the guest is silent; its last words: {}",
                output.lines().last().unwrap_or("")
            );
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn report(
    options: &cli::Demo,
    info: &MigrationInfo,
    before: &Heartbeat,
    felt_us: u64,
    after: &Heartbeat,
) -> anyhow::Result<()> {
    let ram = info.ram.clone().unwrap_or_default();
    let downtime = info.x_vmferry_downtime_us.unwrap_or(0);
    if options.json {
        let guest = json!({
            "felt-downtime-us": felt_us,
            "longest-gap-before-us": before.maxgap_us,
            "pages-written": after.written,
            "pages-verified": after.verified,
            "pages-corrupt": after.corrupt,
        });
        print(format!("{}\n", json!({"migration": info, "guest": guest})))?;
    } else {
        let mut table = Table::default();
        table.row("total time", millis(info.total_time.unwrap_or(0)));
        table.row("downtime", micros(downtime));
        let felt = format!(
            "{} (longest gap before: {})",
            micros(felt_us),
            micros(before.maxgap_us)
        );
        table.row("felt by the guest", felt);
        let sent = format!(
            "{} of {} RAM, in {} passes",
            format_size(ram.transferred),
            format_size(ram.total),
            ram.dirty_sync_count
        );
        table.row("sent", sent);
        table.row(
            "pages all zero",
            format!("{} (not sent as data)", ram.duplicate),
        );
        table.row("guest wrote", format!("{} pages", after.written));
        table.row("guest verified", format!("{} pages", after.verified));
        table.row("corrupt", after.corrupt.to_string());
        print(format!(
            "The guest has moved, and verified all of its memory on the other side.\n{table}"
        ))?;
    }
    ensure!(after.corrupt == 0, "{} pages are corrupt", after.corrupt);
    Ok(())
}
