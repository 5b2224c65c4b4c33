//! What a machine is made of.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmferry_dirty::PAGE_SIZE;
use vmferry_dirty::log::RingSize;

use crate::error::MachineError;
use crate::layout::VIRTIO_MMIO_SLOTS;

mod net;

pub(crate) use net::Nic;
pub use net::{BadMacAddress, MacAddress, NetBackend, NetConfig};

/// The smallest RAM that a kernel, its command line and its tables fit into.
const MIN_MEMORY: u64 = 16 << 20;

/// Longest name of a machine, in bytes.
const MAX_NAME: usize = 255;

/// Longest name of a disk, in bytes: what virtio has room for.
const MAX_DISK_ID: usize = 20;

/// Where the bytes of a kernel image come from.
#[derive(Clone, Debug)]
pub enum KernelSource {
    /// The image itself.
    Bytes(Cow<'static, [u8]>),
    /// A file.
    Path(PathBuf),
}

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory, the fastest.
    #[default]
    Private,
    /// A memfd, which other processes can map.
    Memfd,
}

/// Which of KVM's dirty logs finds out what the guest writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyLogChoice {
    /// Whichever is known to serve better: the bitmaps.
    ///
    /// On a virtual host with 2 cores (KVM/PVM, Linux 6.18), a sync with the arming of 3,200 pages of a guest of
    /// 4 GiB took 0.41 ms with bitmaps and 0.57 ms with rings; of 174 pages of a guest of 64 GiB, 1.3 and 0.8 ms.
    /// Rings arm pages at the sync and not just before each is read, so a migration at 200 MiB/s of 512 MiB that the
    /// guest rewrote at 10,000 pages/s sent 9 % more with them. They pay with hundreds of GiB of which little is
    /// written.
    #[default]
    Auto,
    /// Bitmaps, one a memory slot.
    Log,
    /// Rings, one a vCPU, each of this size. They tell which vCPU writes. Building the machine fails where KVM has
    /// none.
    Ring(RingSize),
}

/// Where the guest's serial port leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialConfig {
    /// Standard input and output; a terminal is put into raw mode. `Ctrl-a x` asks to quit
    /// ([`crate::MachineEvent::QuitKey`]), `Ctrl-a Ctrl-a` sends one `Ctrl-a`.
    Stdio,
    /// Output goes to a file, which is created or emptied.
    File(PathBuf),
    /// A listening Unix socket serves one client after the other. What the guest writes while none is
    /// connected, or faster than the client reads, is dropped.
    Unix(PathBuf),
    /// Output is dropped.
    #[default]
    Null,
}

/// What a guest may do with a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Read and write it. Nobody else may use the image meanwhile.
    #[default]
    ReadWrite,
    /// Read it. Others may read the image, too.
    ReadOnly,
}

/// Whether the host caches what is on a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Caching {
    /// In its page cache.
    #[default]
    Cached,
    /// Not at all (`O_DIRECT`).
    Direct,
}

/// Whether an image is raw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageFormat {
    /// Nobody has said so: an image that looks like one of another format is refused.
    #[default]
    Unsaid,
    /// It is, whatever it looks like.
    Raw,
}

/// A disk: a raw image or a block device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Where it is.
    pub path: PathBuf,
    /// Its name; without one it is called after its place, `disk0` and so on. The guest sees it as the disk's serial
    /// number.
    pub id: Option<String>,
    /// What the guest may do with it.
    pub access: Access,
    /// Whether the host caches it.
    pub caching: Caching,
    /// Whether it is raw.
    pub format: ImageFormat,
}

/// A balloon: what its driver can use of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// The guest may take memory back before it has to kill one of its processes.
    pub deflate_on_oom: bool,
    /// The guest tells, while it is migrated, which of its pages are free. They are not sent.
    pub free_page_hint: bool,
    /// The guest tells at any time which of its pages are free. They are given back to the host.
    pub free_page_reporting: bool,
}

/// QEMU's, but for the hints.
impl Default for BalloonConfig {
    fn default() -> Self {
        BalloonConfig {
            deflate_on_oom: false,
            free_page_hint: true,
            free_page_reporting: false,
        }
    }
}

/// As on the command line.
impl fmt::Display for BalloonConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let switch = |on| if on { "on" } else { "off" };
        write!(
            f,
            "deflate-on-oom={},free-page-hint={},free-page-reporting={}",
            switch(self.deflate_on_oom),
            switch(self.free_page_hint),
            switch(self.free_page_reporting)
        )
    }
}

/// What happens when the guest resets itself (keyboard controller or triple fault).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnReset {
    /// It starts again from its kernel image.
    #[default]
    Reset,
    /// It stops for good, as with QEMU's `-no-reboot`.
    Shutdown,
}

/// A machine to build.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Its name, for its user.
    pub name: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// What the RAM is made of.
    pub backing: Backing,
    /// How writes to the RAM are logged while the guest migrates.
    pub dirty_log: DirtyLogChoice,
    /// What it boots. Only a machine with `incoming` can do without; the guest that arrives there cannot be
    /// reset then.
    pub kernel: Option<KernelSource>,
    /// The kernel's initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The serial port.
    pub serial: SerialConfig,
    /// Disks, as virtio block devices.
    pub disks: Vec<DiskConfig>,
    /// Network interfaces.
    pub nets: Vec<NetConfig>,
    /// A virtio console beside the serial port, and where it leads.
    pub console: Option<SerialConfig>,
    /// Whether there is a virtio device that gives random numbers.
    pub rng: bool,
    /// A virtio balloon.
    pub balloon: Option<BalloonConfig>,
    /// What a reset by the guest does.
    pub on_reset: OnReset,
    /// Whether the guest comes from elsewhere: nothing is loaded, and the machine waits for it.
    pub incoming: bool,
}

impl MachineConfig {
    /// The names of the disks, in their order.
    pub(crate) fn disk_ids(&self) -> impl Iterator<Item = String> {
        let name = |(place, disk): (usize, &DiskConfig)| {
            disk.id.clone().unwrap_or_else(|| format!("disk{place}"))
        };
        self.disks.iter().enumerate().map(name)
    }

    /// The network interfaces, each with its name and address, in their order.
    pub(crate) fn nics(&self) -> impl Iterator<Item = Nic<'_>> {
        self.nets.iter().enumerate().map(|(place, net)| Nic {
            id: net.id.clone().unwrap_or_else(|| format!("net{place}")),
            mac: net.mac.unwrap_or_else(|| MacAddress::default_of(place)),
            backend: &net.backend,
        })
    }

    /// Refuses what cannot be built. `max_cpus` is KVM's limit.
    pub(crate) fn validate(&self, max_cpus: usize) -> Result<(), MachineError> {
        let refuse = |why: String| Err(MachineError::Config(why));
        if self.name.len() > MAX_NAME {
            return refuse(format!(
                "the machine's name has {} bytes, at most {MAX_NAME} are possible",
                self.name.len()
            ));
        }
        if self.cpus == 0 || self.cpus as usize > max_cpus {
            return refuse(format!(
                "{} vCPUs are not possible: this host's KVM offers 1 to {max_cpus}",
                self.cpus
            ));
        }
        if !self.memory.is_multiple_of(PAGE_SIZE as u64) {
            return refuse(format!(
                "{} bytes of memory are not possible: it must be a multiple of {PAGE_SIZE} bytes",
                self.memory
            ));
        }
        if self.memory < MIN_MEMORY {
            return refuse(format!(
                "{} bytes of memory are too little: give the guest at least {} MiB",
                self.memory,
                MIN_MEMORY >> 20
            ));
        }
        if self.kernel.is_none() && !self.incoming {
            return refuse(
                "there is nothing to boot: name a kernel (a PVH ELF image or a bzImage)".into(),
            );
        }
        let on_terminal = |port: &SerialConfig| *port == SerialConfig::Stdio;
        if on_terminal(&self.serial) && self.console.as_ref().is_some_and(on_terminal) {
            return refuse(
                "the serial port and the virtio console cannot both be on the terminal: lead one of them elsewhere"
                    .into(),
            );
        }
        let others = [self.console.is_some(), self.rng, self.balloon.is_some()];
        let devices =
            self.disks.len() + self.nets.len() + others.iter().filter(|there| **there).count();
        if devices > VIRTIO_MMIO_SLOTS as usize {
            return refuse(format!(
                "{devices} virtio devices are not possible: there are {VIRTIO_MMIO_SLOTS} slots"
            ));
        }
        let nics: Vec<_> = self.nics().collect();
        for (place, nic) in nics.iter().enumerate() {
            let before = &nics[..place];
            if before.iter().any(|other| other.id == nic.id) {
                let id = &nic.id;
                return refuse(format!(
                    "two interfaces are called '{id}': give each its own id"
                ));
            }
            if before.iter().any(|other| other.mac == nic.mac) {
                let mac = nic.mac;
                return refuse(format!(
                    "two interfaces have the address {mac}: give each its own (mac=)"
                ));
            }
        }
        let ids: Vec<_> = self.disk_ids().collect();
        for (place, id) in ids.iter().enumerate() {
            if id.is_empty() || id.len() > MAX_DISK_ID || !id.is_ascii() {
                return refuse(format!(
                    "'{id}' cannot name a disk: use 1 to {MAX_DISK_ID} ASCII characters"
                ));
            }
            if ids[..place].contains(id) {
                return refuse(format!("two disks are called '{id}': give each its own id"));
            }
        }
        if self.kernel.is_none() && self.initrd.is_some() {
            return refuse("an initial RAM disk needs a kernel that uses it".into());
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn config() -> MachineConfig {
        MachineConfig {
            name: "test".into(),
            cpus: 2,
            memory: 64 << 20,
            backing: Backing::Private,
            dirty_log: DirtyLogChoice::Auto,
            kernel: Some(KernelSource::Bytes(Cow::Borrowed(b"kernel"))),
            initrd: None,
            cmdline: String::new(),
            serial: SerialConfig::Null,
            disks: Vec::new(),
            nets: Vec::new(),
            console: None,
            rng: false,
            balloon: None,
            on_reset: OnReset::Reset,
            incoming: false,
        }
    }

    fn refusal(change: impl FnOnce(&mut MachineConfig)) -> String {
        let mut config = config();
        change(&mut config);
        config.validate(4).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_built_is_refused_with_the_reason() {
        config().validate(4).unwrap();
        assert!(refusal(|c| c.cpus = 0).contains("1 to 4"));
        assert!(refusal(|c| c.cpus = 5).contains("1 to 4"));
        assert!(refusal(|c| c.memory += 1).contains("multiple of 4096"));
        assert!(refusal(|c| c.memory = 8 << 20).contains("at least 16 MiB"));
        assert!(refusal(|c| c.kernel = None).contains("name a kernel"));
        let disk = DiskConfig {
            path: "image".into(),
            id: None,
            access: Access::ReadWrite,
            caching: Caching::Cached,
            format: ImageFormat::Unsaid,
        };
        let disks = |number| vec![disk.clone(); number];
        assert!(refusal(|c| c.disks = disks(25)).contains("24 slots"));
        let twice = refusal(|c| {
            c.disks = disks(2);
            c.disks[1].id = Some("disk0".into());
        });
        assert!(twice.contains("called 'disk0'"), "{twice}");
        let long = refusal(|c| {
            c.disks = disks(1);
            c.disks[0].id = Some("123456789012345678901".into());
        });
        assert!(long.contains("1 to 20"), "{long}");
        let one_terminal = refusal(|c| {
            c.serial = SerialConfig::Stdio;
            c.console = Some(SerialConfig::Stdio);
        });
        assert!(one_terminal.contains("lead one"), "{one_terminal}");
        assert!(refusal(|c| c.name = "n".repeat(256)).contains("at most 255"));
    }
}
