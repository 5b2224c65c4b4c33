//! The virtual machine as KVM holds it, and what this host's KVM can do.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SREGS2, KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_X2APIC_API, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_cpuid_entry2,
    kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::error::{Attempt, MachineError};
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};

/// A virtual machine without memory and vCPUs, with its interrupt controllers and timer.
pub(crate) struct Hypervisor {
    /// The virtual machine.
    pub vm: Arc<VmFd>,
    /// What this host's CPU and KVM offer to guests.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// MSRs that KVM knows to save and restore, readable or not.
    pub msrs: Vec<u32>,
    /// What this KVM can do for a vCPU.
    pub features: Features,
}

/// What this KVM can do for a vCPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    /// 32-bit words of the extended register state beyond the traditional 4096 bytes.
    pub xsave_extra: usize,
    /// Whether the page directory pointers of a guest in PAE mode can be saved.
    pub sregs2: bool,
    /// Whether a triple fault that is pending can be saved and restored.
    pub triple_fault_event: bool,
    /// Whether guests can have a TSC frequency that is not the host's.
    pub tsc_scaling: bool,
}

/// Has both PICs keep quiet until a kernel sets them up, as firmware does. KVM's local APICs pass their interrupts on
/// from power-on, with vectors of exceptions, and a kernel on reduced hardware never touches them.
fn mask_pics(vm: &VmFd) -> Result<(), MachineError> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .attempt("read an interrupt controller")?;
        chip.chip.pic.imr = 0xff;
        vm.set_irqchip(&chip)
            .attempt("mask an interrupt controller")?;
    }
    Ok(())
}

/// Switches on a capability of KVM that changes what the state of a vCPU looks like. False if this KVM does not have it.
fn enable(vm: &VmFd, capability: u32, argument: u32) -> Result<bool, MachineError> {
    if vm.check_extension_raw(capability.into()) <= 0 {
        return Ok(false);
    }
    let mut request = kvm_enable_cap {
        cap: capability,
        ..Default::default()
    };
    request.args[0] = argument.into();
    vm.enable_cap(&request)
        .attempt("save all of a vCPU's state")?;
    Ok(true)
}

impl Hypervisor {
    /// Opens KVM and lets `check` look at it before anything is built.
    pub fn new(check: impl FnOnce(&Kvm) -> Result<(), MachineError>) -> Result<Self, MachineError> {
        let kvm = Kvm::new().map_err(|source| MachineError::Os {
            action: "open /dev/kvm (is KVM there, and may this user use it?)".into(),
            source: source.into(),
        })?;
        check(&kvm)?;
        let vm = create_vm(&kvm).attempt("create a virtual machine")?;

        let xsave = vm.check_extension_int(Cap::Xsave2);
        if xsave <= 0 || vm.check_extension_raw(KVM_CAP_VCPU_ATTRIBUTES.into()) <= 0 {
            return Err(MachineError::Config(
                "this host's KVM cannot save all of a vCPU (KVM_CAP_XSAVE2, KVM_CAP_VCPU_ATTRIBUTES): \
                 Linux 5.17 or newer is needed"
                    .into(),
            ));
        }
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        if !enable(&vm, KVM_CAP_X2APIC_API, x2apic)? {
            return Err(MachineError::Config(
                "this host's KVM cannot save local APICs with ids of 32 bits (KVM_CAP_X2APIC_API): Linux 4.8 or newer is \
                 needed"
                    .into(),
            ));
        }
        let features = Features {
            xsave_extra: (xsave as usize).saturating_sub(size_of::<kvm_xsave>()) / 4,
            sregs2: vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0,
            triple_fault_event: enable(&vm, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)?,
            tsc_scaling: vm.check_extension(Cap::TscControl),
        };

        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .attempt("place the identity map")?;
        vm.set_tss_address(KVM_TSS)
            .attempt("place the task state")?;
        vm.create_irq_chip()
            .attempt("create the interrupt controllers")?;
        mask_pics(&vm)?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .attempt("create the interval timer")?;

        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .attempt("tell which CPU features it supports")?
            .as_slice()
            .to_vec();
        let msrs = kvm
            .get_msr_index_list()
            .attempt("list the MSRs it can save")?
            .as_slice()
            .to_vec();
        Ok(Hypervisor {
            vm: Arc::new(vm),
            cpuid,
            msrs,
            features,
        })
    }
}

/// Creates a virtual machine. KVM gives up when something wants the thread's attention; an io_uring that has just been closed
/// does.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
}
