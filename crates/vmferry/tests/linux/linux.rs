//! A Linux guest that checks itself, wherever it is.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use vmferry_control::schema::{MigrationInfo, RunState};
use vmferry_rig::{Debian, Initramfs, RigError};

use crate::common::eventually;
use crate::common::lab::Lab;
use crate::common::vm::Vm;
use crate::host::Images;

const MEMORY: &str = "256M";

/// How long nothing may come between two lines of the guest, in seconds, without the downtime of a migration. One
/// takes a fraction of a second; a migration in the rig, on a host that is busy, makes it several.
const SILENCE: f64 = 20.0;

/// What the kernel may say while it works: it notices that it stood still. That is no complaint.
const NOTICES: [&str; 2] = [
    "clocksource: Long readout interval, skipping watchdog check",
    "hrtimer: interrupt took",
];

/// The guest's initial RAM disk.
pub fn initrd(debian: &Debian, lab: &Lab) -> Result<PathBuf, RigError> {
    let path = lab.path("guest.cpio");
    let mut initramfs = Initramfs::new(debian, include_str!("guest.sh"))?;
    let file = File::create(&path).expect("the test's directory is writable");
    initramfs.write(BufWriter::new(file))?;
    Ok(path)
}

/// A sign of life.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beat {
    pub beat: u64,
    /// Seconds since boot, by the guest's monotonic clock.
    pub up: f64,
    /// How often it has verified all of its files.
    pub sweeps: u64,
    pub corrupt: u64,
}

impl Beat {
    fn parse(line: &str) -> Option<Self> {
        let words = line.strip_prefix("linux: beat=")?;
        let (beat, words) = words.split_once(" up=")?;
        let (up, words) = words.split_once(" sweeps=")?;
        let (sweeps, corrupt) = words.split_once(" corrupt=")?;
        Some(Beat {
            beat: beat.parse().ok()?,
            up: up.parse().ok()?,
            sweeps: sweeps.parse().ok()?,
            corrupt: corrupt.parse().ok()?,
        })
    }
}

fn is_notice(line: &str) -> bool {
    NOTICES.iter().any(|notice| line.contains(notice))
}

/// A guest and its history.
pub struct Linux<'a> {
    lab: &'a Lab,
    pub vm: Vm,
    cpus: String,
    /// Its output here and on all hosts before.
    parts: Vec<PathBuf>,
}

impl<'a> Linux<'a> {
    /// Boots a guest with so many vCPUs and waits until it is at work.
    pub fn boot(lab: &'a Lab, images: &Images, cpus: &str) -> Self {
        let machine = ["--cpus", cpus, "--memory", MEMORY];
        let kernel = images.kernel.display().to_string();
        let initrd = images.initrd.display().to_string();
        let cmdline = "console=ttyS0 panic=-1 quiet";
        let what = [
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--cmdline",
            cmdline,
            "--no-reboot",
        ];
        let vm = Vm::start(lab, &[&machine[..], &what].concat());
        let guest = Linux {
            lab,
            parts: vec![vm.serial.clone()],
            vm,
            cpus: cpus.to_owned(),
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
        let machine = ["--cpus", &self.cpus, "--memory", MEMORY];
        let incoming = ["--incoming", "tcp:127.0.0.1:0"];
        let mut destination = Vm::start(self.lab, &[&machine[..], &incoming].concat());
        let info = self.vm.migrate(&destination.uri());
        destination.wait_for_state(RunState::Running);
        let source = std::mem::replace(&mut self.vm, destination);
        let status = source.quit();
        assert!(status.success(), "the source ends with {status}");
        self.parts.push(self.vm.serial.clone());
        info
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
            match Beat::parse(line) {
                Some(beat) => beats.push(beat),
                None if notice() => {}
                None => panic!("Linux says: {line}\n{work}"),
            }
        }
        beats
    }

    /// Its last sign of life.
    #[track_caller]
    pub fn last(&self) -> Beat {
        eventually("a sign of life", || self.beats().pop())
    }

    /// Waits until the guest has said, where it is now, that it works.
    #[track_caller]
    pub fn works(&self) {
        let before = self.last().beat;
        eventually("more signs of life", || {
            // The one after next has begun here.
            (self.last().beat >= before + 2).then_some(())
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
            assert_eq!(after.beat, before.beat + 1, "{before:?} {after:?}");
            let pause = after.up - before.up;
            assert!(
                (0.0..SILENCE + downtime).contains(&pause),
                "{pause} s between {before:?} and {after:?}"
            );
        }
        let last = beats.last().expect("it has spoken");
        assert_eq!(last.corrupt, 0, "{last:?}");
    }
}
