//! The interrupt controllers and the interval timer in KVM.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_FLAGS_HPET_LEGACY,
    kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::SectionKind;
use crate::error::{Attempt, MachineError};
use crate::layout::IO_APIC;

/// The section of the interrupt controllers.
pub(crate) const IRQCHIP: SectionKind = SectionKind {
    name: "vmferry/irqchip",
    version: 1,
};
/// The section of the interval timer.
pub(crate) const PIT: SectionKind = SectionKind {
    name: "vmferry/pit",
    version: 1,
};

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// Both PICs and the I/O APIC.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct IrqchipState([kvm_irqchip; CHIPS.len()]);

impl IrqchipState {
    pub fn save(vm: &VmFd) -> Result<Self, MachineError> {
        let mut chips: [kvm_irqchip; CHIPS.len()] = Default::default();
        for (chip, id) in chips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip)
                .attempt("save an interrupt controller")?;
        }
        Ok(IrqchipState(chips))
    }

    /// Checks a state before any of it is loaded.
    pub fn check(&self) -> Result<(), MachineError> {
        for (chip, id) in self.0.iter().zip(CHIPS) {
            if chip.chip_id != id {
                return Err(MachineError::Misfit(format!(
                    "interrupt controller {} is where {id} belongs",
                    chip.chip_id
                )));
            }
        }
        let [_, _, io_apic] = &self.0;
        // SAFETY: all members of the union are plain numbers, and the chip's number says that this one is meant.
        let base = unsafe { io_apic.chip.ioapic.base_address };
        if base != u64::from(IO_APIC) {
            return Err(MachineError::Misfit(format!(
                "its I/O APIC is at {base:#x}, and at {IO_APIC:#x} in a vmferry machine"
            )));
        }
        Ok(())
    }

    /// Comes after the local APICs: the I/O APIC delivers at once what is pending in it.
    pub fn load(&self, vm: &VmFd) -> Result<(), MachineError> {
        for chip in &self.0 {
            vm.set_irqchip(chip)
                .attempt("restore an interrupt controller")?;
        }
        Ok(())
    }
}

/// The interval timer.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct PitState(kvm_pit_state2);

impl PitState {
    pub fn save(vm: &VmFd) -> Result<Self, MachineError> {
        vm.get_pit2()
            .attempt("save the interval timer")
            .map(PitState)
    }

    /// Checks a state before any of it is loaded.
    pub fn check(&self) -> Result<(), MachineError> {
        if self.0.flags & KVM_PIT_FLAGS_HPET_LEGACY == 0 {
            return Ok(());
        }
        Err(MachineError::Misfit(
            "an HPET stands in for the timer, and a vmferry machine has none".into(),
        ))
    }

    pub fn load(&self, vm: &VmFd) -> Result<(), MachineError> {
        vm.set_pit2(&self.0).attempt("restore the interval timer")
    }
}
