//! What a destination must look like.

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::SectionKind;
use super::virtio::{self, DeviceDescription};
use crate::cpuid;
use crate::error::MachineError;

/// The section that describes a machine.
pub(crate) const SECTION: SectionKind = SectionKind {
    name: "vmferry/machine",
    version: 3,
};

/// How far two hosts' TSC frequencies may be apart without scaling: what Linux's clock keeping tolerates.
const TSC_TOLERANCE_PPM: u64 = 250;

/// A machine, as far as its guest can tell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Description {
    pub vcpus: u32,
    pub memory: u64,
    pub tsc_khz: u32,
    /// CPUID of the first vCPU.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// By slot.
    pub devices: Vec<DeviceDescription>,
}

impl Description {
    /// Whether a guest of a machine like `source` can go on in a machine like this one.
    pub fn accepts(&self, source: &Description, tsc_scaling: bool) -> Result<(), MachineError> {
        let refuse = |why: String| Err(MachineError::Misfit(why));
        if source.vcpus != self.vcpus {
            return refuse(format!(
                "the source has {}, this machine has {}: start it with --cpus {}",
                count(source.vcpus),
                count(self.vcpus),
                source.vcpus
            ));
        }
        if source.memory != self.memory {
            return refuse(format!(
                "the source has {} of memory, this machine has {}: start it with --memory {}",
                size(source.memory),
                size(self.memory),
                size(source.memory)
            ));
        }
        virtio::accepts(&self.devices, &source.devices)?;
        if let Err(why) = cpuid::accept(&[&source.cpuid], self.vcpus, &self.cpuid) {
            return refuse(why);
        }
        self.accepts_tsc(source.tsc_khz, tsc_scaling)
    }

    /// Whether the time stamp counter of a guest, which counts `tsc_khz` ticks in a millisecond, can go on here.
    pub fn accepts_tsc(&self, tsc_khz: u32, tsc_scaling: bool) -> Result<(), MachineError> {
        let (there, here) = (u64::from(tsc_khz), u64::from(self.tsc_khz));
        if !tsc_scaling && there.abs_diff(here) * 1_000_000 > there * TSC_TOLERANCE_PPM {
            return Err(MachineError::Misfit(format!(
                "the guest's time stamp counter runs at {there} kHz, this host's at {here} kHz, and this host's KVM \
                 cannot scale it: start the destination on a host with the same frequency, or one with TSC scaling"
            )));
        }
        Ok(())
    }
}

fn count(vcpus: u32) -> String {
    format!("{vcpus} vCPU{}", if vcpus == 1 { "" } else { "s" })
}

/// So many bytes, as the command line takes them.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 3] = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in UNITS {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{bytes}B")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        Description {
            vcpus: 2,
            memory: 1 << 30,
            tsc_khz: 2_000_000,
            cpuid: vec![kvm_cpuid_entry2 {
                function: 7,
                ebx: 1 << 16,
                ..Default::default()
            }],
            devices: Vec::new(),
        }
    }

    fn refusal(change: impl FnOnce(&mut Description), scaling: bool) -> String {
        let mut source = description();
        change(&mut source);
        match description().accepts(&source, scaling) {
            Ok(()) => String::new(),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn a_misfit_says_how_to_start_the_destination() {
        assert_eq!(refusal(|_| {}, false), "");
        assert_eq!(
            refusal(|d| d.vcpus = 4, false),
            "the source has 4 vCPUs, this machine has 2 vCPUs: start it with --cpus 4"
        );
        assert_eq!(
            refusal(|d| d.memory = 1536 << 20, false),
            "the source has 1536MiB of memory, this machine has 1GiB: start it with --memory 1536MiB"
        );
        assert!(refusal(|d| d.cpuid[0].ebx |= 1 << 30, false).contains("leaf 0x7 subleaf 0 EBX"));
    }

    #[test]
    fn the_tsc_frequency_matters_without_scaling() {
        assert_eq!(refusal(|d| d.tsc_khz += 400, false), "");
        assert!(refusal(|d| d.tsc_khz += 600, false).contains("2000600 kHz"));
        assert_eq!(refusal(|d| d.tsc_khz += 600, true), "");
        assert!(refusal(|d| d.tsc_khz = 0, false).contains("0 kHz"));
    }
}
