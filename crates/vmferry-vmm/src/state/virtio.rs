//! Virtio devices: what a destination must have of them, and the sections of their state.
//!
//! The section's instance is the number of the device's slot.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::SectionKind;
use super::machine::size;
use crate::config::{Access, BalloonConfig, MacAddress};
use crate::error::MachineError;
use crate::virtio::Kind;

/// The section of a device of this kind.
pub(crate) fn section(kind: Kind) -> SectionKind {
    let name = match kind {
        Kind::Block => "vmferry/virtio-blk",
        Kind::Network => "vmferry/virtio-net",
        Kind::Console => "vmferry/virtio-console",
        Kind::Rng => "vmferry/virtio-rng",
        Kind::Balloon => "vmferry/virtio-balloon",
    };
    let version = match kind {
        Kind::Block => 2,
        Kind::Network | Kind::Console | Kind::Rng | Kind::Balloon => 1,
    };
    SectionKind { name, version }
}

/// A device, as far as its guest can tell. Their order is that of the slots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DeviceDescription {
    Block {
        id: String,
        sectors: u64,
        /// Bytes of what the guest reads and writes at least.
        block_size: u64,
        access: Access,
    },
    Network {
        mac: MacAddress,
        /// Whether the driver may leave checksums and segments to the host.
        offloads: bool,
    },
    Console,
    Rng,
    Balloon(BalloonConfig),
}

impl fmt::Display for DeviceDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceDescription::Block { id, .. } => write!(f, "disk '{}'", id.escape_debug()),
            DeviceDescription::Network { mac, offloads } => {
                let with = if *offloads { "with" } else { "without" };
                write!(f, "interface {mac} ({with} offloads)")
            }
            DeviceDescription::Console => f.write_str("a virtio console"),
            DeviceDescription::Rng => f.write_str("a virtio random number generator"),
            DeviceDescription::Balloon(config) => write!(f, "a balloon ({config})"),
        }
    }
}

impl DeviceDescription {
    /// The command-line option that makes a machine have it.
    fn option(&self) -> String {
        match self {
            DeviceDescription::Block { id, access, .. } => {
                let ro = match access {
                    Access::ReadWrite => "",
                    Access::ReadOnly => ",ro=on",
                };
                format!("--disk path=IMAGE,id={}{ro}", id.escape_debug())
            }
            DeviceDescription::Network { mac, offloads } => {
                let backend = match offloads {
                    true => "tap=NAME",
                    false => "unix=PATH",
                };
                format!("--net {backend},mac={mac}")
            }
            DeviceDescription::Console => "--console WHERE".to_owned(),
            DeviceDescription::Rng => "--rng".to_owned(),
            DeviceDescription::Balloon(config) => format!("--balloon {config}"),
        }
    }

    /// Whether the two look the same but for a disk's sizes.
    fn is_like(&self, other: &DeviceDescription) -> bool {
        let without_sizes = |device: &DeviceDescription| match device.clone() {
            DeviceDescription::Block { id, access, .. } => DeviceDescription::Block {
                id,
                access,
                sectors: 0,
                block_size: 0,
            },
            other => other,
        };
        without_sizes(self) == without_sizes(other)
    }
}

/// Whether a guest that has the devices `source` can go on with the devices `here`.
pub(crate) fn accepts(
    here: &[DeviceDescription],
    source: &[DeviceDescription],
) -> Result<(), MachineError> {
    let alike = here.len() == source.len() && here.iter().zip(source).all(|(h, s)| h.is_like(s));
    if !alike {
        let options: Vec<_> = source.iter().map(DeviceDescription::option).collect();
        return Err(MachineError::Misfit(format!(
            "the source has {}, this machine has {}: start it {}",
            list(source),
            list(here),
            match options.is_empty() {
                true => "without --disk, --net, --console, --rng and --balloon".to_owned(),
                false => format!("with {}", options.join(" ")),
            }
        )));
    }
    here.iter()
        .zip(source)
        .try_for_each(|(here, source)| check_sizes(here, source))
}

/// Whether the disk `here`, which looks like that of the source, is large enough for its guest, and has blocks of the same
/// size.
fn check_sizes(here: &DeviceDescription, source: &DeviceDescription) -> Result<(), MachineError> {
    let (
        DeviceDescription::Block {
            id,
            sectors,
            block_size,
            ..
        },
        DeviceDescription::Block {
            sectors: their_sectors,
            block_size: their_block_size,
            ..
        },
    ) = (here, source)
    else {
        return Ok(());
    };
    // An image may have grown; the guest goes on with the size that it knows.
    if sectors < their_sectors {
        let bytes = |sectors: &u64| size(sectors.saturating_mul(512));
        return Err(MachineError::Misfit(format!(
            "the source's disk '{id}' has {}, this machine's has only {}: give both the same image",
            bytes(their_sectors),
            bytes(sectors)
        )));
    }
    if block_size != their_block_size {
        return Err(MachineError::Misfit(format!(
            "the source's disk '{id}' has blocks of {their_block_size} bytes, this machine's of {block_size}: use \
             direct=off for both, or direct=on and storage of the same block size"
        )));
    }
    Ok(())
}

fn list(devices: &[DeviceDescription]) -> String {
    match devices {
        [] => "no virtio devices".to_owned(),
        _ => devices
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id: &str, sectors: u64) -> DeviceDescription {
        DeviceDescription::Block {
            id: id.to_owned(),
            sectors,
            block_size: 512,
            access: Access::ReadWrite,
        }
    }

    fn refusal(here: &[DeviceDescription], source: &[DeviceDescription]) -> String {
        match accepts(here, source) {
            Ok(()) => String::new(),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn a_misfit_says_how_to_start_the_destination() {
        let source = [disk("root", 1 << 21), DeviceDescription::Rng];
        assert_eq!(refusal(&source, &source), "");
        assert_eq!(
            refusal(&[], &source),
            "the source has disk 'root', a virtio random number generator, this machine has no virtio devices: start \
             it with --disk path=IMAGE,id=root --rng"
        );
        assert_eq!(
            refusal(&source, &[]),
            "the source has no virtio devices, this machine has disk 'root', a virtio random number generator: start \
             it without --disk, --net, --console, --rng and --balloon"
        );
        let smaller = [disk("root", 1 << 20), DeviceDescription::Rng];
        assert_eq!(
            refusal(&smaller, &source),
            "the source's disk 'root' has 1GiB, this machine's has only 512MiB: give both the same image"
        );
        // One that has grown since serves the guest as it was.
        assert_eq!(refusal(&source, &smaller), "");
        let mut blocks = source.clone();
        if let DeviceDescription::Block { block_size, .. } = &mut blocks[0] {
            *block_size = 4096;
        }
        let words = refusal(&source, &blocks);
        assert!(
            words.contains("blocks of 4096 bytes, this machine's of 512"),
            "{words}"
        );
        let read_only = [DeviceDescription::Block {
            id: "a".into(),
            sectors: 8,
            block_size: 512,
            access: Access::ReadOnly,
        }];
        assert!(refusal(&[disk("a", 8)], &read_only).contains("id=a,ro=on"));
        let balloon = |free_page_reporting| {
            DeviceDescription::Balloon(BalloonConfig {
                free_page_reporting,
                ..BalloonConfig::default()
            })
        };
        let features = refusal(&[balloon(false)], &[balloon(true)]);
        assert!(
            features.ends_with(
                "start it with --balloon deflate-on-oom=off,free-page-hint=on,free-page-reporting=on"
            ),
            "{features}"
        );
        assert!(refusal(&[], &[disk("\n", 8)]).contains("'\\n'"));
    }
}
