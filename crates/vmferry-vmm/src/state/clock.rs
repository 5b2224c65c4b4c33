//! The guest's clocks: kvmclock and the time stamp counters.
//!
//! Both go on while a guest stands still, as time does. A migration reads them when the guest has stopped and
//! sets them on the other side when it starts, moved on by the time in between, so the guest sees one jump
//! that is not longer than its downtime.
//!
//! The counters of all vCPUs are set through KVM's TSC offsets, computed from one reading: counters that agreed
//! before agree exactly afterwards, and KVM goes on telling the guest that its clock is stable.
//!
//! Counters and kvmclock also keep their relation to each other: Linux uses one as the watchdog of the other, and
//! gives up a counter that is 100 microseconds off. So they are read as of one moment, and kvmclock is set
//! first and the counters are put where they belong beside it.

use std::ptr;
use std::time::Duration;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clock_data, kvm_device_attr, kvm_msr_entry,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{errno, ioctl_iow_nr};

use super::{SectionKind, msrs};
use crate::error::{Attempt, MachineError};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// The section of the clocks.
pub(crate) const SECTION: SectionKind = SectionKind {
    name: "vmferry/clock",
    version: 1,
};

/// The clocks at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ClockState {
    /// kvmclock, in nanoseconds.
    kvmclock: u64,
    /// The time stamp counter of the first vCPU.
    tsc: u64,
    /// How far each vCPU's counter is ahead of the first one's, modulo 2^64.
    ahead: Vec<u64>,
    /// Ticks of the counters in a millisecond.
    tsc_khz: u32,
}

impl ClockState {
    /// Reads the clocks of vCPUs that are held.
    pub fn save<'a>(
        vm: &VmFd,
        vcpus: impl Iterator<Item = &'a VcpuFd> + Clone,
    ) -> Result<Self, MachineError> {
        let first = vcpus.clone().next().expect("a machine has a vCPU");
        let moment = Moment::now(vm, first)?;
        let offsets = vcpus.map(tsc_offset).collect::<Result<Vec<_>, _>>()?;
        Ok(ClockState {
            kvmclock: moment.kvmclock,
            tsc: moment.tsc,
            ahead: offsets.iter().map(|o| o.wrapping_sub(offsets[0])).collect(),
            tsc_khz: first.get_tsc_khz().attempt("read a vCPU's TSC frequency")?,
        })
    }

    /// Ticks of the counters in a millisecond.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Whether these clocks are of a guest with so many vCPUs.
    pub fn check(&self, vcpus: usize) -> Result<(), MachineError> {
        if self.ahead.len() == vcpus && self.tsc_khz > 0 {
            return Ok(());
        }
        Err(MachineError::Misfit(format!(
            "it has the time stamp counters of {} vCPUs at {} kHz, this machine has {vcpus} vCPUs",
            self.ahead.len(),
            self.tsc_khz
        )))
    }

    /// Gives vCPUs that have not run yet the frequency of these clocks, where KVM can.
    pub fn set_frequency(&self, vcpu: &VcpuFd) -> Result<(), MachineError> {
        let here = vcpu.get_tsc_khz().attempt("read a vCPU's TSC frequency")?;
        if here != self.tsc_khz {
            vcpu.set_tsc_khz(self.tsc_khz)
                .attempt("give a vCPU the TSC frequency of the source")?;
        }
        Ok(())
    }

    /// Sets the clocks of held vCPUs to what these show `later`.
    pub fn load<'a>(
        &self,
        later: Duration,
        vm: &VmFd,
        vcpus: impl Iterator<Item = &'a VcpuFd> + Clone,
    ) -> Result<(), MachineError> {
        let first = vcpus.clone().next().expect("a machine has a vCPU");
        vm.set_clock(&kvm_clock_data {
            clock: self.kvmclock.saturating_add(later.as_nanos() as u64),
            ..Default::default()
        })
        .attempt("set the guest's clock")?;
        let now = Moment::now(vm, first)?;
        let elapsed = now.kvmclock.wrapping_sub(self.kvmclock);
        let ticks = u128::from(elapsed) * u128::from(self.tsc_khz) / 1_000_000;
        let wanted = self.tsc.wrapping_add(ticks as u64);
        // The difference between what the counter shows with the present offset and what is wanted is also the
        // difference between the offsets, whatever factor KVM scales the host's counter by.
        let offset = tsc_offset(first)?.wrapping_add(wanted.wrapping_sub(now.tsc));
        for (vcpu, ahead) in vcpus.zip(&self.ahead) {
            set_tsc_offset(vcpu, offset.wrapping_add(*ahead))?;
        }
        Ok(())
    }
}

/// Both clocks at one moment, as well as it can be known from outside: one is read between two readings of the other.
struct Moment {
    kvmclock: u64,
    tsc: u64,
}

impl Moment {
    /// How often it is tried. Something may come between two readings, hardly between all of them.
    const TRIES: usize = 8;

    /// Reads the clocks; the closest of several readings counts.
    fn now(vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, MachineError> {
        let mut closest: Option<(u64, Moment)> = None;
        let mut before = kvmclock(vm)?;
        for _ in 0..Self::TRIES {
            let tsc = tsc(vcpu)?;
            let after = kvmclock(vm)?;
            let apart = after.saturating_sub(before);
            if closest.as_ref().is_none_or(|(least, _)| apart < *least) {
                let kvmclock = before + apart / 2;
                closest = Some((apart, Moment { kvmclock, tsc }));
            }
            before = after;
        }
        let (_, moment) = closest.expect("it was tried");
        Ok(moment)
    }
}

fn kvmclock(vm: &VmFd) -> Result<u64, MachineError> {
    let clock = vm.get_clock().attempt("read the guest's clock")?;
    Ok(clock.clock)
}

fn tsc(vcpu: &VcpuFd) -> Result<u64, MachineError> {
    let msrs: Vec<kvm_msr_entry> = msrs::read(vcpu, &[msrs::IA32_TSC])?;
    msrs.first()
        .map(|msr| msr.data)
        .ok_or_else(|| MachineError::Misfit("KVM does not show the time stamp counter".into()))
}

fn offset_attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
        flags: 0,
    }
}

pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, MachineError> {
    let mut offset = 0u64;
    let attribute = offset_attribute(&raw mut offset);
    // SAFETY: the request reads a kvm_device_attr and writes eight bytes at `addr`, which `offset` is.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    if result != 0 {
        return Err(errno::Error::last()).attempt("read a vCPU's TSC offset");
    }
    Ok(offset)
}

pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), MachineError> {
    let attribute = offset_attribute(ptr::from_ref(&offset).cast_mut());
    // SAFETY: the request reads a kvm_device_attr and eight bytes at `addr`, which `offset` is.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result != 0 {
        return Err(errno::Error::last()).attempt("set a vCPU's TSC offset");
    }
    Ok(())
}
