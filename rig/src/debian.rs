//! Kernel and userland, from Debian's packages.
//!
//! The packages are downloaded with the host's own apt, which verifies them, and unpacked without being installed, each
//! into a directory named for its version.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Attempt, RigError};
use crate::process::{output, raw_output};

/// Depends on the newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";

const APT_HINT: &str = "the rig takes its kernel from Debian's packages";
const DPKG_HINT: &str = "install the package dpkg";

/// Unpacked packages.
#[derive(Clone, Debug)]
pub struct Debian {
    kernel: PathBuf,
    release: String,
    modules: PathBuf,
    busybox: PathBuf,
}

impl Debian {
    /// The packages in `cache`, downloaded and unpacked if their present versions are not there.
    pub fn get(cache: &Path) -> Result<Self, RigError> {
        fs::create_dir_all(cache).attempt(|| format!("create {}", cache.display()))?;
        // Several tests may come at once. The lock goes with the file.
        let lock = cache.join("lock");
        let lock = File::create(&lock).attempt(|| format!("create {}", lock.display()))?;
        lock.lock()
            .attempt(|| format!("lock {}", cache.display()))?;

        let kernel = unpack(cache, &newest_kernel()?)?;
        let busybox = unpack(cache, BUSYBOX)?;
        let boot = kernel.join("boot");
        let (image, release) = find_kernel(&boot)?;
        // Debian 13 has moved /lib into /usr.
        let places = ["lib/modules", "usr/lib/modules"].map(|dir| kernel.join(dir).join(&release));
        let modules = places.into_iter().find(|dir| dir.is_dir());
        let programs = ["bin/busybox", "usr/bin/busybox"].map(|path| busybox.join(path));
        let program = programs.into_iter().find(|path| path.is_file());
        Ok(Debian {
            kernel: image,
            modules: modules.ok_or_else(|| not_in("modules", &kernel))?,
            busybox: program.ok_or_else(|| not_in("busybox", &busybox))?,
            release,
        })
    }

    /// The kernel, a bzImage.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// Its release, as `uname -r` says it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The directory with its modules.
    pub(crate) fn modules(&self) -> &Path {
        &self.modules
    }

    /// A statically linked busybox.
    pub(crate) fn busybox(&self) -> &Path {
        &self.busybox
    }
}

fn not_in(what: &str, dir: &Path) -> RigError {
    RigError::NotInPackage {
        what: what.to_owned(),
        dir: dir.to_owned(),
    }
}

fn find_kernel(boot: &Path) -> Result<(PathBuf, String), RigError> {
    let files = fs::read_dir(boot).attempt(|| format!("read {}", boot.display()))?;
    files
        .filter_map(Result::ok)
        .find_map(|file| {
            let name = file.file_name().into_string().ok()?;
            let release = name.strip_prefix("vmlinuz-")?;
            Some((file.path(), release.to_owned()))
        })
        .ok_or_else(|| not_in("kernel image", boot))
}

/// The package that the meta-package stands for.
fn newest_kernel() -> Result<String, RigError> {
    let mut apt = Command::new("apt-cache");
    let done = raw_output(apt.args(["depends", KERNEL]), APT_HINT)?;
    let text = String::from_utf8_lossy(&done.stdout);
    text.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .ok_or_else(|| RigError::NoPackage {
            what: KERNEL.to_owned(),
        })
}

/// The directory with a package's content.
fn unpack(cache: &Path, package: &str) -> Result<PathBuf, RigError> {
    let file = file_name(package)?;
    let dir = cache.join(file.trim_end_matches(".deb"));
    if dir.is_dir() {
        return Ok(dir);
    }
    // What is half done is not found under the final name, and goes away by itself.
    let work = tempfile::Builder::new()
        .prefix("unpacking-")
        .tempdir_in(cache)
        .attempt(|| format!("create a directory in {}", cache.display()))?;
    let mut apt = Command::new("apt-get");
    apt.args(["download", "-q", package])
        .current_dir(work.path());
    output(&mut apt, APT_HINT).map_err(|error| match error {
        RigError::Program { words, .. } => RigError::NoDownload {
            package: package.to_owned(),
            words,
        },
        other => other,
    })?;
    let content = work.path().join("content");
    let mut dpkg = Command::new("dpkg-deb");
    output(
        dpkg.arg("-x").arg(work.path().join(&file)).arg(&content),
        DPKG_HINT,
    )?;
    fs::rename(&content, &dir).attempt(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

/// The name of the file that `apt-get download` will make; the version is part of it.
fn file_name(package: &str) -> Result<String, RigError> {
    let mut apt = Command::new("apt-get");
    let done = raw_output(
        apt.args(["download", "-q", "--print-uris", package]),
        APT_HINT,
    )?;
    let text = String::from_utf8_lossy(&done.stdout);
    text.split_whitespace()
        .find(|word| word.ends_with(".deb"))
        .map(str::to_owned)
        .ok_or_else(|| RigError::NoPackage {
            what: package.to_owned(),
        })
}
