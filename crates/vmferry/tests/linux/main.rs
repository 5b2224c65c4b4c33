//! Debian's Linux under vmferry.
//!
//! Where the CPU's virtualization is at work behind `/dev/kvm`, these tests run as they are. Elsewhere
//! [`in_the_rig`] boots the rig and runs this same program in it, where they do; called on their own they say so.

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

use std::io;
use std::time::Duration;

use vmferry_rig::kvm::{HostKvm, probe};
use vmferry_rig::{Debian, Rig, RigError, default_cache};

use common::command::VMFERRY;
use common::lab::Lab;
use common::say;
use host::{FULL, IMAGES, Images, tool};

/// Bounds everything in here, where a test that hangs would otherwise hang all.
const TIMEOUT: Duration = Duration::from_secs(540);
/// The same for the long version.
const FULL_TIMEOUT: Duration = Duration::from_secs(1200);

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
    match run(&lab) {
        Ok(status) => assert_eq!(status, 0, "the tests in the rig failed; see above"),
        Err(error) if error.is_missing_prerequisite() => {
            say(&format!(
                "SKIPPED: in_the_rig: all tests with Linux guests: {error}"
            ));
        }
        Err(error) => panic!("{error}"),
    }
}

fn run(lab: &Lab) -> Result<u8, RigError> {
    let debian = Debian::get(&default_cache())?;
    let images = Images::make(&debian, lab)?;
    let this = std::env::current_exe().expect("Linux tells");
    let this = this.to_str().expect("its path is UTF-8");
    let only = std::env::var(ONLY).unwrap_or_default();
    let words = [this, "--test-threads=1"]
        .into_iter()
        .chain(only.split_whitespace());
    let mut rig = Rig::new(words);
    rig.with(this)
        .with(VMFERRY)
        .with(images.dir())
        .env(IMAGES, &images.dir().display().to_string())
        .timeout(TIMEOUT);
    if host::full() {
        rig.env(FULL, "1").timeout(FULL_TIMEOUT);
    }
    for name in disk::TOOLS.into_iter().chain([network::IP]) {
        if let Some(path) = tool(name) {
            rig.with(path);
        }
    }
    Ok(rig.run(&debian, io::stderr(), io::stderr())?.status)
}
