//! Debian's Linux under vmferry.
//!
//! Where the CPU's virtualization is at work behind `/dev/kvm`, these tests run as they are. Elsewhere
//! [`in_the_rig`] boots the rig for each of them and runs this same program in it, where they do; called on their own they
//! say so.

// What the command's other tests share; not all of it is used here.
#[allow(dead_code)]
#[path = "../it/common/mod.rs"]
mod common;

mod balloon;
mod disk;
mod host;
mod linux;
mod migration;
mod network;
mod power;

use std::io::{self, Write};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmferry_rig::kvm::{HostKvm, probe};
use vmferry_rig::{Debian, Rig, RigError, default_cache};

use common::command::VMFERRY;
use common::lab::Lab;
use common::say;
use host::{IMAGES, Images, tool};

/// Bounds each test in here, where one that hangs would otherwise hang all. On a quiet host the longest takes half of it.
const TIMEOUT: Duration = Duration::from_secs(330);

/// How often a test may fail in the rig before it has failed. QEMU's emulation of SVM fails now and then, and takes a guest or
/// the whole first level with it (rig/README.md). Every failure is shown. One that begins with [`LOST`] is the last.
const ATTEMPTS: u32 = 3;

/// Begins what a test says when something was lost or damaged, which has no excuse.
const LOST: &str = "LOST: ";

/// Names the tests to run in the rig, by parts of their names. All, if there is none.
const ONLY: &str = "VMFERRY_RIG_TESTS";

/// Runs all tests of this program in the rig, on a host where they cannot run natively.
#[test]
fn in_the_rig() {
    if probe() == HostKvm::Hardware {
        say("in_the_rig: not needed: this host's KVM runs Linux");
        return;
    }
    let lab = Lab::without_kvm();
    match prepare(&lab) {
        Ok((debian, images)) => {
            for test in tests() {
                attempt(&test, &debian, &images);
            }
        }
        Err(error) if error.is_missing_prerequisite() => skip(&error),
        Err(error) => panic!("{error}"),
    }
}

fn skip(error: &RigError) {
    say(&format!(
        "SKIPPED: in_the_rig: tests with Linux guests: {error}"
    ));
}

fn prepare(lab: &Lab) -> Result<(Debian, Images), RigError> {
    let debian = Debian::get(&default_cache())?;
    let images = Images::make(&debian, lab)?;
    Ok((debian, images))
}

/// This program.
fn this() -> String {
    let this = std::env::current_exe().expect("Linux tells");
    this.to_str().expect("its path is UTF-8").to_owned()
}

/// The tests that run in the rig.
fn tests() -> Vec<String> {
    let list = Command::new(this()).arg("--list").output();
    let list = String::from_utf8(list.expect("it runs").stdout).expect("names are UTF-8");
    let only = std::env::var(ONLY).unwrap_or_default();
    let is_wanted = |test: &str| {
        let mut parts = only.split_whitespace().peekable();
        test != "in_the_rig" && (parts.peek().is_none() || parts.any(|part| test.contains(part)))
    };
    list.lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .filter(|test| is_wanted(test))
        .map(str::to_owned)
        .collect()
}

/// Runs a test in a rig of its own, again if need be.
///
/// # Panics
///
/// It fails every time, or loses something once.
fn attempt(test: &str, debian: &Debian, images: &Images) {
    for number in 1..=ATTEMPTS {
        let lost = Arc::new(AtomicBool::new(false));
        let why = match run(test, debian, images, &lost) {
            Ok(0) => return,
            _ if lost.load(Ordering::Relaxed) => panic!("{test} has lost something; see above"),
            Ok(status) => format!("it ended with status {status}; see above"),
            Err(error) if error.is_missing_prerequisite() => return skip(&error),
            Err(error) => error.to_string(),
        };
        say(&format!(
            "in_the_rig: FAILED, attempt {number} of {ATTEMPTS}: {test}: {why}"
        ));
    }
    panic!("{test} failed {ATTEMPTS} times in the rig; see above");
}

/// Standard error, with an eye on what goes there.
struct Watched {
    lost: Arc<AtomicBool>,
    /// The line so far.
    line: Vec<u8>,
}

impl Watched {
    fn new(lost: &Arc<AtomicBool>) -> Self {
        Watched {
            lost: lost.clone(),
            line: Vec::new(),
        }
    }
}

impl Write for Watched {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            match byte {
                b'\n' => self.line.clear(),
                byte => self.line.push(*byte),
            }
            if self.line.ends_with(LOST.as_bytes()) {
                self.lost.store(true, Ordering::Relaxed);
            }
        }
        io::stderr().write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn run(
    test: &str,
    debian: &Debian,
    images: &Images,
    lost: &Arc<AtomicBool>,
) -> Result<u8, RigError> {
    let this = this();
    let mut rig = Rig::new([&this, "--exact", test, "--nocapture"]);
    rig.with(&this)
        .with(VMFERRY)
        .with(images.dir())
        .env(IMAGES, &images.dir().display().to_string())
        .timeout(TIMEOUT);
    for name in disk::TOOLS.into_iter().chain([network::IP]) {
        if let Some(path) = tool(name) {
            rig.with(path);
        }
    }
    let ended = rig.run(debian, Watched::new(lost), Watched::new(lost))?;
    Ok(ended.status)
}
