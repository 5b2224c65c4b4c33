//! A Linux guest that checks itself, wherever it is.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_control::schema::{MigrationInfo, RunState};

use crate::LOST;
use crate::common::eventually;
use crate::common::lab::Lab;
use crate::common::vm::Vm;
use crate::disk::Disk;
use crate::host::{BUSY, Images};
use crate::network::{GUEST, Network};

const MEMORY: &str = "160M";

/// How long nothing may come between two lines of the guest, in seconds, without the downtime of a migration. One
/// takes a fraction of a second; a migration in the rig, on a host that is busy, makes it several.
const SILENCE: f64 = 20.0;

/// How long a complaint of the kernel may take to be printed.
const REST: Duration = Duration::from_secs(5);

/// What the kernel may say while it works: it notices that it stood still. That is no complaint.
const NOTICES: [&str; 2] = [
    "clocksource: Long readout interval, skipping watchdog check",
    "hrtimer: interrupt took",
];

/// A sign of life.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beat {
    pub beat: u64,
    /// Seconds since boot, by the guest's monotonic clock.
    pub up: f64,
    /// How often it has verified all of its files.
    pub sweeps: u64,
    /// How many files it has written to the disk.
    pub disk: u64,
    pub corrupt: u64,
}

impl Beat {
    fn parse(line: &str) -> Option<Self> {
        let words = line.strip_prefix("linux: beat=")?;
        let (beat, words) = words.split_once(" up=")?;
        let (up, words) = words.split_once(" sweeps=")?;
        let (sweeps, words) = words.split_once(" disk=")?;
        let (disk, corrupt) = words.split_once(" corrupt=")?;
        Some(Beat {
            beat: beat.parse().ok()?,
            up: up.parse().ok()?,
            sweeps: sweeps.parse().ok()?,
            disk: disk.parse().ok()?,
            corrupt: corrupt.parse().ok()?,
        })
    }
}

/// Starts a machine for the guest: `what` to boot, or whom to wait for.
fn start(lab: &Lab, cpus: &str, disk: &Disk<'_>, port: Option<String>, what: &[String]) -> Vm {
    let disk = disk.option();
    let mut options = vec!["--cpus", cpus, "--memory", MEMORY, "--disk", &disk];
    if let Some(port) = &port {
        options.extend(["--net", port]);
    }
    options.extend(what.iter().map(String::as_str));
    Vm::start(lab, &options)
}

fn is_notice(line: &str) -> bool {
    NOTICES.iter().any(|notice| line.contains(notice))
}

/// A guest and its history.
pub struct Linux<'a> {
    lab: &'a Lab,
    pub vm: Vm,
    cpus: String,
    disk: &'a Disk<'a>,
    network: Option<&'a Network>,
    /// Its output here and on all hosts before.
    parts: Vec<PathBuf>,
}

impl<'a> Linux<'a> {
    /// Boots a guest with so many vCPUs and waits until it is at work.
    pub fn boot(
        lab: &'a Lab,
        images: &Images,
        cpus: &str,
        disk: &'a Disk<'a>,
        network: Option<&'a Network>,
    ) -> Self {
        let what = images.options(BUSY, &format!("address={GUEST}"));
        let vm = start(lab, cpus, disk, network.map(|n| n.option(0)), &what);
        let guest = Linux {
            lab,
            parts: vec![vm.serial.clone()],
            vm,
            cpus: cpus.to_owned(),
            disk,
            network,
        };
        let text = eventually("Linux to boot", || {
            let text = guest.text();
            let (_, ready) = text.split_once("linux: ready ")?;
            ready.contains('\n').then(|| text.clone())
        });
        assert!(text.contains(&format!(" cpus={cpus} ")), "{text}");
        guest
    }

    /// Moves the guest to a new process.
    #[track_caller]
    pub fn hop(&mut self) -> MigrationInfo {
        let incoming = ["--incoming", "tcp:127.0.0.1:0"].map(str::to_owned);
        let port = self.network.map(|n| n.option(self.parts.len()));
        let mut destination = start(self.lab, &self.cpus, self.disk, port, &incoming);
        // In the rig the guest and its disk take their time to come to a stand.
        self.vm.set_parameters(json!({"downtime-limit": 2000}));
        let info = self.vm.migrate(&destination.uri());
        destination.wait_for_state(RunState::Running);
        let source = std::mem::replace(&mut self.vm, destination);
        let status = source.quit();
        assert!(status.success(), "the source ends with {status}");
        self.parts.push(self.vm.serial.clone());
        info
    }

    /// Presses the power button, and waits until the guest has ended its work and its machine with it.
    #[track_caller]
    pub fn power_off(&mut self) {
        self.vm.execute("system_powerdown", Value::Null);
        let status = self.vm.ends();
        assert!(status.success(), "the guest's last host ends with {status}");
    }

    /// All that it has said, on all hosts.
    pub fn text(&self) -> String {
        let mut bytes = Vec::new();
        for part in &self.parts {
            bytes.extend(std::fs::read(part).unwrap_or_default());
        }
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Its signs of life.
    ///
    /// # Panics
    ///
    /// The guest or its kernel has complained about something.
    #[track_caller]
    pub fn beats(&self) -> Vec<Beat> {
        let text = self.text();
        let (boot, work) = text.split_once("linux: ready ").unwrap_or((&text, ""));
        assert!(!boot.contains("linux: boot="), "Linux says: {boot}");
        // The last line may still be being written.
        let complete = work.rfind('\n').map_or("", |end| &work[..end]);
        let mut beats = Vec::new();
        for line in complete.lines().skip(1) {
            let notice = || line.starts_with("linux: kernel=") && is_notice(line);
            let end = || line.ends_with("reboot: Power down");
            match Beat::parse(line) {
                Some(beat) => {
                    assert_eq!(beat.corrupt, 0, "{LOST}{line}\n{}", self.text());
                    beats.push(beat);
                }
                None if notice() || end() => {}
                None => {
                    // The rest of what it has to say.
                    std::thread::sleep(REST);
                    let lost = if line.starts_with("linux: corrupt") {
                        LOST
                    } else {
                        ""
                    };
                    panic!("{lost}Linux says: {line}\n{}", self.text());
                }
            }
        }
        beats
    }

    /// Its last sign of life.
    #[track_caller]
    pub fn last(&self) -> Beat {
        eventually("a sign of life", || self.beats().pop())
    }

    /// Waits until the guest has said, where it is now, that it works and that its disk does.
    #[track_caller]
    pub fn works(&self) {
        let before = self.last();
        eventually("more signs of life", || {
            let last = self.last();
            // The one after next has begun here.
            (last.beat >= before.beat + 2 && last.disk >= before.disk + 2).then_some(())
        });
    }

    /// Waits until all of its files have been verified, starting from now.
    #[track_caller]
    pub fn verifies_all(&self) {
        let before = self.last().sweeps;
        eventually("Linux to verify its files", || {
            // One sweep is under way.
            (self.last().sweeps >= before + 2).then_some(())
        });
    }

    /// Nothing is missing in its life, its clock never went back, and nothing was corrupt. `downtime` is that of its
    /// longest migration, in seconds.
    #[track_caller]
    pub fn check(&self, downtime: f64) {
        let beats = self.beats();
        for pair in beats.windows(2) {
            let [before, after] = pair else {
                unreachable!()
            };
            assert_eq!(after.beat, before.beat + 1, "{LOST}{before:?} {after:?}");
            let pause = after.up - before.up;
            assert!(pause >= 0.0, "{LOST}its clock: {before:?} {after:?}");
            assert!(
                pause < SILENCE + downtime,
                "{pause} s between {before:?} and {after:?}"
            );
        }
        let last = beats.last().expect("it has spoken");
        assert_eq!(last.corrupt, 0, "{LOST}{last:?}");
    }
}
