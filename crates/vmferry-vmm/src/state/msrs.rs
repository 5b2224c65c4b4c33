//! Model-specific registers, one by one where KVM wants it.

use std::collections::BTreeSet;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{Attempt, MachineError};

/// The time stamp counter and its timer: `clock` restores them.
pub(crate) const IA32_TSC: u32 = 0x10;
/// See [`IA32_TSC`].
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Not offered to guests (see `cpuid`), though KVM lists it.
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// How many pairs of variable MTRRs there are (lowest byte).
const IA32_MTRRCAP: u32 = 0xfe;
/// How many banks of machine checks there are (lowest byte).
const IA32_MCG_CAP: u32 = 0x179;
/// How many MSRs KVM reads or writes in one call: its limit (`MAX_IO_MSRS`, 256) is itself one too many.
const MOST_AT_ONCE: usize = KVM_MAX_MSR_ENTRIES - 1;
/// Hyper-V's, which is not offered either; some of them act when written.
const HYPER_V: std::ops::Range<u32> = 0x4000_0000..0x4000_0200;

fn entries(msrs: &[kvm_msr_entry]) -> Result<Msrs, MachineError> {
    Msrs::from_entries(msrs).map_err(|_| {
        MachineError::Misfit(format!(
            "{} MSRs are too many: KVM takes at most {MOST_AT_ONCE} at once",
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
        let end = msrs.len().min(at + MOST_AT_ONCE);
        let mut rest = entries(&msrs[at..end])?;
        let done = operation(&mut rest)?.min(end - at);
        msrs[at..at + done].copy_from_slice(&rest.as_slice()[..done]);
        at += done;
        if at < end {
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

/// Checks MSRs of a stream: each has to be among those that this machine saves. One that is not, and is zero, is as it is
/// at power-on; [`write`] does not write it.
pub(crate) fn check(msrs: &[kvm_msr_entry], saved: &[u32]) -> Result<(), MachineError> {
    let mut seen = BTreeSet::new();
    for msr in msrs {
        if !seen.insert(msr.index) {
            return Err(MachineError::Misfit(format!(
                "MSR {:#x} is there twice",
                msr.index
            )));
        }
        if msr.data != 0 && !saved.contains(&msr.index) {
            return Err(MachineError::Misfit(format!(
                "MSR {:#x} has value {:#x}, and this host's KVM does not offer it: use a host with the same or a newer \
                 CPU and kernel",
                msr.index, msr.data
            )));
        }
    }
    Ok(())
}

/// Writes MSRs, those of them that this machine saves. One that KVM refuses may keep its power-on value if the guest has
/// never used it (it is zero); otherwise the guest would miss it, and that is an error.
pub(crate) fn write(
    fd: &VcpuFd,
    msrs: &[kvm_msr_entry],
    saved: &[u32],
) -> Result<(), MachineError> {
    let known = msrs.iter().filter(|msr| saved.contains(&msr.index));
    for_all(
        &mut known.copied().collect::<Vec<_>>(),
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

/// The MSRs that make up a vCPU's state and that KVM does not list: memory types (MTRRs) and machine checks. KVM keeps
/// them in software, as many as it tells.
fn unlisted(fd: &VcpuFd) -> Result<Vec<u32>, MachineError> {
    let capabilities = read(fd, &[IA32_MTRRCAP, IA32_MCG_CAP])?;
    let count = |index| {
        let msr = capabilities.iter().find(|msr| msr.index == index);
        msr.map_or(0, |msr| msr.data as u32 & 0xff)
    };
    let (ranges, banks) = (count(IA32_MTRRCAP), count(IA32_MCG_CAP).min(32));
    let mut msrs = Vec::new();
    msrs.extend(0x200..0x200 + 2 * ranges.min(32)); // IA32_MTRR_PHYSBASE0, IA32_MTRR_PHYSMASK0, ...
    msrs.extend([0x250, 0x258, 0x259]); // IA32_MTRR_FIX64K_00000, IA32_MTRR_FIX16K_...
    msrs.extend(0x268..0x270); // IA32_MTRR_FIX4K_...
    msrs.push(0x2ff); // IA32_MTRR_DEF_TYPE
    msrs.extend([0x17a, 0x17b]); // IA32_MCG_STATUS, IA32_MCG_CTL
    msrs.push(0x4d0); // IA32_MCG_EXT_CTL
    msrs.extend(0x280..0x280 + banks); // IA32_MC0_CTL2, ...
    msrs.extend(0x400..0x400 + 4 * banks); // IA32_MC0_CTL, IA32_MC0_STATUS, IA32_MC0_ADDR, IA32_MC0_MISC, ...
    Ok(msrs)
}

/// The MSRs that make up a vCPU's state here: of those that KVM lists and those that it leaves out, what can be read and
/// written back.
pub(crate) fn to_save(fd: &VcpuFd, listed: &[u32]) -> Result<Vec<u32>, MachineError> {
    let candidates: BTreeSet<u32> = listed
        .iter()
        .copied()
        .chain(unlisted(fd)?)
        .filter(|index| {
            !HYPER_V.contains(index)
                && ![IA32_TSC, IA32_TSC_DEADLINE, IA32_ARCH_CAPABILITIES].contains(index)
        })
        .collect();
    let candidates: Vec<u32> = candidates.into_iter().collect();
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

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    #[test]
    fn more_msrs_than_one_call_takes_are_read_in_several() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED: /dev/kvm is missing or not usable");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        for number in [MOST_AT_ONCE, KVM_MAX_MSR_ENTRIES, 3 * KVM_MAX_MSR_ENTRIES] {
            let read = read(&vcpu, &vec![IA32_TSC; number]).unwrap();
            assert_eq!(read.len(), number);
        }
    }
}
