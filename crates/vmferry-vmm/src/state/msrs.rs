//! Model-specific registers, one by one where KVM wants it.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{Attempt, MachineError};

/// The time stamp counter and its timer: `clock` restores them.
pub(crate) const IA32_TSC: u32 = 0x10;
/// See [`IA32_TSC`].
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Not offered to guests (see `cpuid`), though KVM lists it.
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// Hyper-V's, which is not offered either; some of them act when written.
const HYPER_V: std::ops::Range<u32> = 0x4000_0000..0x4000_0200;

fn entries(msrs: &[kvm_msr_entry]) -> Result<Msrs, MachineError> {
    Msrs::from_entries(msrs).map_err(|_| {
        MachineError::Misfit(format!(
            "{} MSRs are too many: KVM knows at most {KVM_MAX_MSR_ENTRIES}",
            msrs.len()
        ))
    })
}

/// Applies `operation` to all MSRs, handing those where KVM stops to `refused` and going on after them. KVM
/// says how many it did before the first that it could not.
fn for_all(
    msrs: &mut [kvm_msr_entry],
    mut operation: impl FnMut(&mut Msrs) -> Result<usize, MachineError>,
    mut refused: impl FnMut(&kvm_msr_entry) -> Result<(), MachineError>,
) -> Result<(), MachineError> {
    let mut at = 0;
    while at < msrs.len() {
        let mut rest = entries(&msrs[at..])?;
        let done = operation(&mut rest)?.min(msrs.len() - at);
        msrs[at..at + done].copy_from_slice(&rest.as_slice()[..done]);
        at += done;
        if at < msrs.len() {
            refused(&msrs[at])?;
            at += 1;
        }
    }
    Ok(())
}

/// Reads the MSRs `indices`, leaving out those that cannot be read.
pub(crate) fn read(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, MachineError> {
    let mut msrs: Vec<_> = indices
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut unreadable = Vec::new();
    for_all(
        &mut msrs,
        |msrs| fd.get_msrs(msrs).attempt("read a vCPU's MSRs"),
        |msr| {
            unreadable.push(msr.index);
            Ok(())
        },
    )?;
    msrs.retain(|msr| !unreadable.contains(&msr.index));
    Ok(msrs)
}

/// Writes MSRs. One that KVM refuses may keep its power-on value if the guest has never used it (it is zero);
/// otherwise the guest would miss it, and that is an error.
pub(crate) fn write(fd: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), MachineError> {
    for_all(
        &mut msrs.to_vec(),
        |msrs| fd.set_msrs(msrs).attempt("write a vCPU's MSRs"),
        |msr| {
            if msr.data == 0 {
                tracing::debug!(
                    index = msr.index,
                    "MSR not restored: it is zero and refused"
                );
                return Ok(());
            }
            Err(MachineError::Misfit(format!(
                "this host's KVM refuses value {:#x} for MSR {:#x}: the source's CPU or kernel has a feature that \
                 this one lacks; use a host with the same or a newer CPU and kernel",
                msr.data, msr.index
            )))
        },
    )
}

/// Of the MSRs that KVM lists, those that make up a vCPU's state here: what can be read and written back.
pub(crate) fn to_save(fd: &VcpuFd, listed: &[u32]) -> Result<Vec<u32>, MachineError> {
    let candidates: Vec<u32> = listed
        .iter()
        .copied()
        .filter(|index| {
            !HYPER_V.contains(index)
                && ![IA32_TSC, IA32_TSC_DEADLINE, IA32_ARCH_CAPABILITIES].contains(index)
        })
        .collect();
    let mut msrs = read(fd, &candidates)?;
    let mut refused = Vec::new();
    for_all(
        &mut msrs,
        |msrs| fd.set_msrs(msrs).attempt("write a vCPU's MSRs"),
        |msr| {
            refused.push(msr.index);
            Ok(())
        },
    )?;
    tracing::debug!(?refused, "MSRs that KVM lists but does not take back");
    Ok(msrs
        .iter()
        .map(|msr| msr.index)
        .filter(|index| !refused.contains(index))
        .collect())
}
