//! What this host's KVM is good for.

use std::fs::OpenOptions;
use std::path::Path;

/// How this host can run guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostKvm {
    /// With the CPU's virtualization: Linux guests boot in seconds. The first level of the rig is such a host, too.
    Hardware,
    /// There is a `/dev/kvm`, but neither of the modules that drive the CPU's virtualization is at work behind it.
    /// KVM/PVM is of this kind: the guest's kernel mode is emulated, and Linux does not get through its boot.
    Software,
    /// No `/dev/kvm`, or not for this user.
    None,
}

/// Looks what this host's KVM is.
///
/// Whether `kvm_intel` or `kvm_amd` is loaded (or built in) decides: they load only where the CPU, or the hypervisor
/// that this host is a guest of, has the virtualization extensions switched on. The flags in `/proc/cpuinfo` do not:
/// they are there even when the firmware has it switched off.
pub fn probe() -> HostKvm {
    let usable = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    let hardware = ["/sys/module/kvm_intel", "/sys/module/kvm_amd"];
    match usable {
        false => HostKvm::None,
        true if hardware.iter().any(|module| Path::new(module).exists()) => HostKvm::Hardware,
        true => HostKvm::Software,
    }
}
