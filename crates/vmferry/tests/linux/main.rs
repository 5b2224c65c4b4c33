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

use std::io;
use std::time::Duration;

use vmferry_rig::kvm::{HostKvm, probe};
use vmferry_rig::{Debian, Rig, RigError, default_cache};

use common::command::VMFERRY;
use common::lab::Lab;
use common::say;
use host::{BALLOON_INITRD, DISK_INITRD, INITRD, KERNEL};

/// Bounds everything in here, where a test that hangs would otherwise hang all.
const TIMEOUT: Duration = Duration::from_secs(500);

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
    let initrd = linux::initrd(&debian, lab)?;
    let balloon = balloon::initrd(&debian, lab)?;
    let disk = disk::initrd(&debian, lab)?;
    let this = std::env::current_exe().expect("Linux tells");
    let this = this.to_str().expect("its path is UTF-8");
    let mut rig = Rig::new([this, "--test-threads=1"]);
    rig.with(this)
        .with(VMFERRY)
        .with(debian.kernel())
        .with(&initrd)
        .with(&balloon)
        .with(&disk)
        .env(KERNEL, &debian.kernel().display().to_string())
        .env(INITRD, &initrd.display().to_string())
        .env(BALLOON_INITRD, &balloon.display().to_string())
        .env(DISK_INITRD, &disk.display().to_string())
        .timeout(TIMEOUT);
    Ok(rig.run(&debian, io::stderr(), io::stderr())?.status)
}
