//! Where a test with a Linux guest can run, and what it boots there.

use std::env;
use std::path::PathBuf;

use vmferry_rig::kvm::{HostKvm, probe};
use vmferry_rig::{Debian, RigError, default_cache};

use crate::common::lab::Lab;
use crate::common::say;
use crate::{balloon, disk, linux};

/// Names the guest's kernel in the rig.
pub const KERNEL: &str = "VMFERRY_TEST_KERNEL";
/// Names its initial RAM disk in the rig.
pub const INITRD: &str = "VMFERRY_TEST_INITRD";
/// Names that of a guest with a balloon.
pub const BALLOON_INITRD: &str = "VMFERRY_TEST_BALLOON_INITRD";
/// Names that of a guest with a disk.
pub const DISK_INITRD: &str = "VMFERRY_TEST_DISK_INITRD";

/// What a Linux guest boots from.
pub struct Images {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// The initial RAM disk of a guest with a balloon.
    pub balloon: PathBuf,
    /// That of a guest with a disk.
    pub disk: PathBuf,
}

/// A place for a test with a Linux guest. None, loudly, where it cannot run.
pub fn lab(test: &str) -> Option<(Lab, Images)> {
    if probe() != HostKvm::Hardware {
        say(&format!(
            "{test}: not on this host itself, whose KVM does not run Linux: in_the_rig runs it"
        ));
        return None;
    }
    let lab = Lab::new()?;
    match images(&lab) {
        Ok(images) => Some((lab, images)),
        Err(error) if error.is_missing_prerequisite() => {
            say(&format!("SKIPPED: {test}: {error}"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn images(lab: &Lab) -> Result<Images, RigError> {
    let names = [KERNEL, INITRD, BALLOON_INITRD, DISK_INITRD];
    if let [Some(kernel), Some(initrd), Some(balloon), Some(disk)] = names.map(env::var_os) {
        return Ok(Images {
            kernel: kernel.into(),
            initrd: initrd.into(),
            balloon: balloon.into(),
            disk: disk.into(),
        });
    }
    let debian = Debian::get(&default_cache())?;
    Ok(Images {
        kernel: debian.kernel().to_owned(),
        initrd: linux::initrd(&debian, lab)?,
        balloon: balloon::initrd(&debian, lab)?,
        disk: disk::initrd(&debian, lab)?,
    })
}
