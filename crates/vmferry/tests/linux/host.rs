//! Where a test with a Linux guest can run, and what it boots there.

use std::env;
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use vmferry_rig::kvm::{HostKvm, probe};
use vmferry_rig::{Debian, Initramfs, RigError, default_cache};

use crate::common::lab::Lab;
use crate::common::say;

/// Names the directory of the images in the rig.
pub const IMAGES: &str = "VMFERRY_TEST_IMAGES";

/// How every guest begins.
const START: &str = include_str!("start.sh");

/// A kind of guest.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    name: &'static str,
    /// What it does, for a shell.
    script: &'static str,
    modules: &'static [&'static str],
}

/// Works with memory, a disk and a network.
pub const BUSY: Guest = Guest {
    name: "busy",
    script: include_str!("busy.sh"),
    modules: &["virtio_mmio", "virtio_blk", "virtio_net", "button", "evdev"],
};
/// Has filled and freed its memory.
pub const ROOMY: Guest = Guest {
    name: "roomy",
    script: include_str!("roomy.sh"),
    modules: &["virtio_mmio", "virtio_balloon"],
};
/// Lives three times.
pub const RISEN: Guest = Guest {
    name: "risen",
    script: include_str!("risen.sh"),
    modules: &["virtio_mmio", "virtio_blk", "button", "evdev"],
};

/// A directory with what Linux guests boot from.
pub struct Images(PathBuf);

impl Images {
    /// Makes the images of all guests in a directory of the test.
    pub fn make(debian: &Debian, lab: &Lab) -> Result<Self, RigError> {
        let dir = lab.path("images");
        fs::create_dir(&dir).expect("the test's directory is writable");
        let images = Images(dir);
        symlink(debian.kernel(), images.kernel()).expect("the directory is writable");
        for guest in [BUSY, ROOMY, RISEN] {
            let script = [START, guest.script].concat();
            let mut initramfs = Initramfs::new(debian, &script)?;
            for module in guest.modules {
                initramfs.module(module)?;
            }
            let file = File::create(images.initrd(guest)).expect("the directory is writable");
            initramfs.write(BufWriter::new(file))?;
        }
        Ok(images)
    }

    pub fn dir(&self) -> &Path {
        &self.0
    }

    fn kernel(&self) -> PathBuf {
        self.0.join("kernel")
    }

    fn initrd(&self, guest: Guest) -> PathBuf {
        self.0.join(guest.name)
    }

    /// The options that boot a guest. What `more` has for the kernel gets to the guest's script as variables.
    pub fn options(&self, guest: Guest, more: &str) -> Vec<String> {
        let kernel = self.kernel().display().to_string();
        let initrd = self.initrd(guest).display().to_string();
        let cmdline = format!("console=ttyS0 panic=-1 quiet {more}");
        let options = ["--kernel", &kernel, "--initrd", &initrd];
        [&options[..], &["--cmdline", cmdline.trim()]]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect()
    }
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
    if let Some(dir) = env::var_os(IMAGES) {
        return Some((lab, Images(dir.into())));
    }
    match Debian::get(&default_cache()).and_then(|debian| Images::make(&debian, &lab)) {
        Ok(images) => Some((lab, images)),
        Err(error) if error.is_missing_prerequisite() => {
            say(&format!("SKIPPED: {test}: {error}"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A program of the system's administrator, whose directory may not be on the path of others. Not the busybox of the
/// rig, which has programs of the same names in /bin.
pub fn tool(name: &str) -> Option<PathBuf> {
    ["/usr/sbin", "/sbin", "/usr/bin"]
        .into_iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
}
