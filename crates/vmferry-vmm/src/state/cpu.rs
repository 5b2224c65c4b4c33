//! A vCPU's state.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, KVMIO, Xsave, kvm_cpuid_entry2, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sregs2, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::fam::FamStruct;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{errno, ioctl_ior_nr, ioctl_iow_nr};

use super::{SectionKind, msrs};
use crate::error::{Attempt, MachineError};
use crate::hypervisor::Features;
use crate::vcpu::Inner;

mod check;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// `KVM_SREGS2_FLAGS_PDPTRS_VALID`.
const PDPTRS_VALID: u64 = 1;

/// The section of a vCPU.
pub(crate) const SECTION: SectionKind = SectionKind {
    name: "vmferry/cpu",
    version: 2,
};

/// The state of a vCPU. The time stamp counter is not in it: `clock` has those of all vCPUs.
#[derive(Serialize, Deserialize)]
pub(crate) struct CpuState {
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub mp_state: kvm_mp_state,
    pub events: kvm_vcpu_events,
    regs: kvm_regs,
    pub sregs: kvm_sregs,
    /// Page directory pointers of a guest in PAE mode, which may differ from those in its memory.
    pdptrs: Option<[u64; 4]>,
    pub xsave: kvm_xsave,
    /// What the extended registers take beyond the traditional 4096 bytes.
    xsave_extra: Vec<u32>,
    pub xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    pub msrs: Vec<kvm_msr_entry>,
    lapic: kvm_lapic_state,
    /// The value of IA32_TSC_DEADLINE; only set once the counter is right (see [`set_tsc_deadline`]).
    tsc_deadline: u64,
}

impl CpuState {
    /// Reads the state of a vCPU that is held. `msrs` are those to save (see [`msrs::to_save`]).
    pub fn save(vcpu: &Inner, features: Features, msrs: &[u32]) -> Result<Self, MachineError> {
        let fd = &vcpu.fd;
        // Reading the MP state carries out a pending INIT or start-up interrupt, and reading the events makes
        // a pending exception's side effects happen: both before the registers that this changes.
        let mp_state = fd.get_mp_state().attempt("save a vCPU's run state")?;
        let events = fd
            .get_vcpu_events()
            .attempt("save a vCPU's pending events")?;
        let (sregs, pdptrs) = get_sregs(fd, features)?;
        let (xsave, xsave_extra) = get_xsave(fd, features)?;
        let deadline = msrs::read(fd, &[msrs::IA32_TSC_DEADLINE])?;
        Ok(CpuState {
            cpuid: vcpu.cpuid().to_vec(),
            mp_state,
            events,
            regs: fd.get_regs().attempt("save a vCPU's registers")?,
            sregs,
            pdptrs,
            xsave,
            xsave_extra,
            xcrs: fd.get_xcrs().attempt("save a vCPU's XCRs")?,
            debug_regs: fd
                .get_debug_regs()
                .attempt("save a vCPU's debug registers")?,
            msrs: msrs::read(fd, msrs)?,
            lapic: fd.get_lapic().attempt("save a vCPU's local APIC")?,
            tsc_deadline: deadline.first().map_or(0, |msr| msr.data),
        })
    }

    /// Puts the state into a vCPU that is held.
    ///
    /// The order is KVM's: CPUID decides what the rest may hold; the special registers hold the local APIC's
    /// base and mode, which the MSRs and the APIC's own registers depend on; setting the general registers
    /// forgets pending exceptions, so the events come last.
    /// `msrs` are those that this machine saves.
    pub fn load(
        &self,
        vcpu: &mut Inner,
        features: Features,
        msrs: &[u32],
    ) -> Result<(), MachineError> {
        vcpu.set_cpuid(self.cpuid.clone())?;
        self.load_registers(&vcpu.fd, features, msrs)
    }

    /// As [`load`](Self::load), but the vCPU keeps its CPUID: KVM lets nobody change that once it has run.
    pub fn load_registers(
        &self,
        fd: &VcpuFd,
        features: Features,
        msrs: &[u32],
    ) -> Result<(), MachineError> {
        self.set_sregs(fd, features)?;
        fd.set_regs(&self.regs)
            .attempt("restore a vCPU's registers")?;
        self.set_xsave(fd, features)?;
        fd.set_xcrs(&self.xcrs).attempt("restore a vCPU's XCRs")?;
        fd.set_debug_regs(&self.debug_regs)
            .attempt("restore a vCPU's debug registers")?;
        msrs::write(fd, &self.msrs, msrs)?;
        fd.set_lapic(&self.lapic)
            .attempt("restore a vCPU's local APIC")?;
        fd.set_mp_state(self.mp_state)
            .attempt("restore a vCPU's run state")?;
        fd.set_vcpu_events(&self.events(features)?)
            .attempt("restore a vCPU's pending events")
    }

    /// The timer of the local APIC in TSC-deadline mode.
    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// CPUID as the guest sees it.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// The pending events as this KVM takes them.
    fn events(&self, features: Features) -> Result<kvm_vcpu_events, MachineError> {
        let mut events = self.events;
        if features.triple_fault_event {
            return Ok(events);
        }
        if events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 && events.triple_fault.pending != 0
        {
            return Err(MachineError::Misfit(
                "the guest is about to be reset by a triple fault, and this host's KVM cannot be told so: use a host \
                 with Linux 6.0 or newer"
                    .into(),
            ));
        }
        events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        Ok(events)
    }

    fn set_sregs(&self, fd: &VcpuFd, features: Features) -> Result<(), MachineError> {
        let Some(pdptrs) = self.pdptrs.filter(|_| features.sregs2) else {
            return fd
                .set_sregs(&self.sregs)
                .attempt("restore a vCPU's special registers");
        };
        let from = &self.sregs;
        let sregs = kvm_sregs2 {
            cs: from.cs,
            ds: from.ds,
            es: from.es,
            fs: from.fs,
            gs: from.gs,
            ss: from.ss,
            tr: from.tr,
            ldt: from.ldt,
            gdt: from.gdt,
            idt: from.idt,
            cr0: from.cr0,
            cr2: from.cr2,
            cr3: from.cr3,
            cr4: from.cr4,
            cr8: from.cr8,
            efer: from.efer,
            apic_base: from.apic_base,
            flags: PDPTRS_VALID,
            pdptrs,
        };
        // SAFETY: the request is for a vCPU and reads a kvm_sregs2.
        let result = unsafe { ioctl_with_ref(fd, KVM_SET_SREGS2(), &sregs) };
        check(result).attempt("restore a vCPU's special registers")
    }

    fn set_xsave(&self, fd: &VcpuFd, features: Features) -> Result<(), MachineError> {
        if self.xsave_extra.len() > features.xsave_extra {
            return Err(MachineError::Misfit(format!(
                "its extended registers take {} bytes more than this host's CPU has: use a host with the same or \
                 a newer CPU",
                (self.xsave_extra.len() - features.xsave_extra) * 4
            )));
        }
        let mut xsave = new_xsave(features)?;
        // SAFETY: the length of the flexible part stays as it is.
        let inner = unsafe { xsave.as_mut_fam_struct() };
        inner.xsave.region = self.xsave.region;
        inner.as_mut_slice()[..self.xsave_extra.len()].copy_from_slice(&self.xsave_extra);
        // SAFETY: the buffer has the size that KVM names for this virtual machine, and no feature is switched
        // on in this process after that.
        unsafe { fd.set_xsave2(&xsave) }.attempt("restore a vCPU's extended registers")
    }
}

/// Arms the local APIC's timer in TSC-deadline mode. KVM computes the time of expiry from the counter's value
/// at this moment, so the counter comes first.
pub(crate) fn set_tsc_deadline(fd: &VcpuFd, deadline: u64) -> Result<(), MachineError> {
    let msr = kvm_msr_entry {
        index: msrs::IA32_TSC_DEADLINE,
        data: deadline,
        ..Default::default()
    };
    msrs::write(fd, &[msr], &[msr.index])
}

fn check(result: i32) -> Result<(), errno::Error> {
    if result == 0 {
        return Ok(());
    }
    Err(errno::Error::last())
}

fn get_sregs(
    fd: &VcpuFd,
    features: Features,
) -> Result<(kvm_sregs, Option<[u64; 4]>), MachineError> {
    let sregs = fd.get_sregs().attempt("save a vCPU's special registers")?;
    // An interrupt that was being delivered is in the pending events, too.
    let sregs = kvm_sregs {
        interrupt_bitmap: [0; 4],
        ..sregs
    };
    if !features.sregs2 {
        return Ok((sregs, None));
    }
    let mut with_pdptrs = kvm_sregs2::default();
    // SAFETY: the request is for a vCPU and fills a kvm_sregs2.
    let result = unsafe { ioctl_with_mut_ref(fd, KVM_GET_SREGS2(), &mut with_pdptrs) };
    check(result).attempt("save a vCPU's special registers")?;
    let valid = with_pdptrs.flags & PDPTRS_VALID != 0;
    Ok((sregs, valid.then_some(with_pdptrs.pdptrs)))
}

fn new_xsave(features: Features) -> Result<Xsave, MachineError> {
    Xsave::new(features.xsave_extra)
        .map_err(|e| MachineError::Misfit(format!("no room for the extended registers: {e:?}")))
}

fn get_xsave(fd: &VcpuFd, features: Features) -> Result<(kvm_xsave, Vec<u32>), MachineError> {
    let mut xsave = new_xsave(features)?;
    // SAFETY: as in set_xsave, the buffer has the size that KVM names.
    unsafe { fd.get_xsave2(&mut xsave) }.attempt("save a vCPU's extended registers")?;
    let inner: &kvm_xsave2 = xsave.as_fam_struct_ref();
    let traditional = kvm_xsave {
        region: inner.xsave.region,
        ..Default::default()
    };
    Ok((traditional, inner.as_slice().to_vec()))
}
