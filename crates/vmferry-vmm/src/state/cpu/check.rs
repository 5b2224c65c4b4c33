//! What a vCPU's state may hold.
//!
//! KVM checks much of what it is given, but against what it could emulate, not against what this machine offers. What is
//! not checked there is checked here, before anything of it is loaded.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_cpuid_entry2,
};

use super::CpuState;
use crate::cpuid::{Register, has};
use crate::error::MachineError;
use crate::state::msrs;

/// A bit of a control register, and the feature that it needs.
struct Needs {
    bit: u32,
    leaf: u32,
    register: Register,
    feature: u32,
}

const fn needs(bit: u32, leaf: u32, register: Register, feature: u32) -> Needs {
    Needs {
        bit,
        leaf,
        register,
        feature,
    }
}

/// Bits of CR4 that every x86-64 CPU has: VME to OSXMMEXCPT.
const CR4_BASE: u64 = 0x7ff;

const CR4: &[Needs] = &[
    needs(11, 0x7, Register::Ecx, 2),  // UMIP
    needs(12, 0x7, Register::Ecx, 16), // LA57
    needs(13, 0x1, Register::Ecx, 5),  // VMXE
    needs(14, 0x1, Register::Ecx, 6),  // SMXE
    needs(16, 0x7, Register::Ebx, 0),  // FSGSBASE
    needs(17, 0x1, Register::Ecx, 17), // PCIDE
    needs(18, 0x1, Register::Ecx, 26), // OSXSAVE
    needs(20, 0x7, Register::Ebx, 7),  // SMEP
    needs(21, 0x7, Register::Ebx, 20), // SMAP
    needs(22, 0x7, Register::Ecx, 3),  // PKE
    needs(23, 0x7, Register::Edx, 20), // CET: indirect branch tracking; shadow stacks are not offered
    needs(24, 0x7, Register::Ecx, 31), // PKS
];

/// Bits of EFER that every x86-64 CPU has: SCE, LME, LMA, NXE.
const EFER_BASE: u64 = 0xd01;

const EFER: &[Needs] = &[
    needs(12, 0x8000_0001, Register::Ecx, 2),  // SVME
    needs(14, 0x8000_0001, Register::Edx, 25), // FFXSR
    needs(15, 0x8000_0001, Register::Ecx, 17), // TCE
    needs(21, 0x8000_0021, Register::Eax, 8),  // AIBRSE
];

/// The first two components of the extended state, x87 and SSE, which are always there.
const LEGACY_STATE: u64 = 3;
/// Where the header of the extended state has its components, in words of 32 bits.
const XSTATE_BV: usize = 512 / 4;

/// Refuses bits of the control register `name` for which there is no feature.
fn check_control(
    name: &str,
    value: u64,
    base: u64,
    bits: &[Needs],
    cpuid: &[kvm_cpuid_entry2],
) -> Result<(), MachineError> {
    let allowed = bits
        .iter()
        .filter(|needs| has(cpuid, needs.leaf, needs.register, needs.feature))
        .fold(base, |allowed, needs| allowed | 1 << needs.bit);
    if value & !allowed == 0 {
        return Ok(());
    }
    Err(MachineError::Misfit(format!(
        "{name} has bits {:#x}, for which the guest's CPUID has no feature",
        value & !allowed
    )))
}

impl CpuState {
    /// Checks a state before any of it is loaded. CPUID has been checked; `msrs` are those that this machine saves.
    pub fn check(&self, msrs: &[u32]) -> Result<(), MachineError> {
        const RUN_STATES: [u32; 5] = [
            KVM_MP_STATE_RUNNABLE,
            KVM_MP_STATE_UNINITIALIZED,
            KVM_MP_STATE_INIT_RECEIVED,
            KVM_MP_STATE_HALTED,
            KVM_MP_STATE_SIPI_RECEIVED,
        ];
        let run_state = self.mp_state.mp_state;
        if !RUN_STATES.contains(&run_state) {
            return Err(MachineError::Misfit(format!(
                "its run state {run_state} is unknown"
            )));
        }
        check_control("CR4", self.sregs.cr4, CR4_BASE, CR4, &self.cpuid)?;
        check_control("EFER", self.sregs.efer, EFER_BASE, EFER, &self.cpuid)?;
        self.check_extended_state()?;
        msrs::check(&self.msrs, msrs)
    }

    /// What XCR0 switches on, and what the saved registers hold, is what CPUID names.
    fn check_extended_state(&self) -> Result<(), MachineError> {
        let named = self
            .cpuid
            .iter()
            .find(|e| e.function == 0xd && e.index == 0);
        let components = named.map_or(0, |e| u64::from(e.edx) << 32 | u64::from(e.eax));
        let offered = components | LEGACY_STATE;
        let refuse = |what: &str, value: u64| {
            Err(MachineError::Misfit(format!(
                "{what} has bits {:#x}, and CPUID names components {offered:#x}",
                value & !offered
            )))
        };
        let count = self.xcrs.nr_xcrs as usize;
        let Some(xcrs) = self.xcrs.xcrs.get(..count) else {
            return Err(MachineError::Misfit(format!("it has {count} XCRs")));
        };
        for register in xcrs {
            if register.xcr != 0 {
                return Err(MachineError::Misfit(format!(
                    "it has XCR{}, and there is only XCR0",
                    register.xcr
                )));
            }
            if register.value & !offered != 0 {
                return refuse("XCR0", register.value);
            }
        }
        let word = |at: usize| u64::from(self.xsave.region[at]);
        let held = word(XSTATE_BV) | word(XSTATE_BV + 1) << 32;
        if held & !offered != 0 {
            return refuse("the header of its extended registers", held);
        }
        Ok(())
    }
}
