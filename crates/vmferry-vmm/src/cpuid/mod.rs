//! The guest's CPUID: what KVM supports, completed for each vCPU, and compared between two hosts.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

mod accept;

pub(crate) use accept::accept;

/// Leaf 7, EDX: the CPU has IA32_ARCH_CAPABILITIES. Its contents say which flaws the *host* CPU has, which may
/// not hold after a migration.
const ARCH_CAPABILITIES: u32 = 1 << 29;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: VMX. A guest that runs guests of its own has state (`KVM_GET_NESTED_STATE`) that does not move yet, and what
/// would arrive without it is another machine; so it is not offered.
const VMX: u32 = 1 << 5;
/// Leaf 0x8000_0001, ECX: AMD's SVM, likewise.
const SVM: u32 = 1 << 2;
/// Leaf 7, ECX: shadow stacks. The shadow stack pointer is not among the MSRs that KVM lists, and no other way to save it
/// exists before Linux 6.18.
const SHADOW_STACKS: u32 = 1 << 7;
const HYPER_THREADING: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: several cores are a package's cores (AMD).
const CMP_LEGACY: u32 = 1 << 1;

/// A register that the CPUID instruction fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    const ALL: [Register; 4] = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx];

    fn name(self) -> &'static str {
        match self {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        }
    }

    /// Its value in an entry; zero where there is none, as the instruction has it.
    fn of(self, entry: Option<&kvm_cpuid_entry2>) -> u32 {
        entry.map_or(0, |entry| match self {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        })
    }
}

/// Returns whether a table has a feature: a bit in a register of a leaf, subleaf 0.
pub(crate) fn has(table: &[kvm_cpuid_entry2], leaf: u32, register: Register, bit: u32) -> bool {
    register.of(find(table, leaf, 0)) & 1 << bit != 0
}

/// CPUID of vCPU `index` of `cpus`: one package of `cpus` cores with one thread each, APIC ids counting from 0.
///
/// What it makes of a table that it has made is the same table: [`accept`] uses that to check the tables of a stream.
pub(crate) fn for_vcpu(
    supported: &[kvm_cpuid_entry2],
    index: u32,
    cpus: u32,
) -> Vec<kvm_cpuid_entry2> {
    let id_bits = cpus.next_power_of_two().trailing_zeros();
    let mut table = supported.to_vec();
    for leaf in [0xb, 0x1f] {
        // Newer kernels offer the first level only, and leave the others to the VMM.
        if find(supported, leaf, 0).is_some() && find(supported, leaf, 1).is_none() {
            table.push(kvm_cpuid_entry2 {
                function: leaf,
                index: 1,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                ..Default::default()
            });
        }
    }
    for entry in &mut table {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0xffff | (cpus.min(255) << 16) | (index & 0xff) << 24;
                entry.ecx = entry.ecx & !VMX | TSC_DEADLINE | HYPERVISOR;
                set_bit(&mut entry.edx, HYPER_THREADING, cpus > 1);
            }
            // Caches: levels 1 and 2 belong to a core, level 3 to the package.
            0x4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { cpus } else { 1 };
                let ids = |n: u32| n.next_power_of_two() - 1;
                entry.eax =
                    entry.eax & 0x3fff | (ids(sharing) & 0xfff) << 14 | (ids(cpus) & 0x3f) << 26;
            }
            0x7 if entry.index == 0 => {
                entry.ecx &= !SHADOW_STACKS;
                entry.edx &= !ARCH_CAPABILITIES;
            }
            0xb | 0x1f => {
                let (shift, count, kind) = match entry.index {
                    0 => (0, 1, 1),
                    1 => (id_bits, cpus, 2),
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = count;
                entry.ecx = entry.index | kind << 8;
                entry.edx = index;
            }
            0x8000_0001 => {
                entry.ecx &= !SVM;
                set_bit(&mut entry.ecx, CMP_LEGACY, cpus > 1 && is_amd(supported));
            }
            0x8000_0008 if is_amd(supported) => {
                entry.ecx = entry.ecx & !0xf0ff | (cpus - 1).min(0xff) | id_bits << 12;
            }
            // What SVM can do.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_001e => {
                entry.eax = index;
                entry.ebx = index & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    table
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

fn is_amd(table: &[kvm_cpuid_entry2]) -> bool {
    // "Auth" of AuthenticAMD.
    find(table, 0, 0).is_some_and(|e| e.ebx == 0x6874_7541)
}

fn find(table: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    table
        .iter()
        .find(|e| e.function == leaf && e.index == subleaf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let supported = [entry(1, 0), entry(0xb, 0), entry(0xb, 1), entry(7, 0)];
        let third = for_vcpu(&supported, 2, 3);
        assert_eq!(third[0].ebx, 2 << 24 | 3 << 16);
        assert_eq!(third[0].ecx, TSC_DEADLINE | HYPERVISOR);
        assert_eq!((third[1].eax, third[1].ebx, third[1].edx), (0, 1, 2));
        assert_eq!((third[2].eax, third[2].ebx, third[2].edx), (2, 3, 2));
        assert_eq!(third[2].ecx, 1 | 2 << 8);
    }

    #[test]
    fn guests_get_no_guests() {
        let all = |function| kvm_cpuid_entry2 {
            ecx: u32::MAX,
            edx: u32::MAX,
            ..entry(function, 0)
        };
        let table = for_vcpu(&[all(1), all(0x8000_0001), all(0x8000_000a)], 0, 2);
        assert_eq!(table[0].ecx, !VMX);
        assert_eq!(table[1].ecx & SVM, 0);
        assert_eq!((table[2].ecx, table[2].edx), (0, 0));
    }

    #[test]
    fn every_core_has_a_level_of_its_own_where_kvm_leaves_that_out() {
        let table = for_vcpu(&[entry(0xb, 0)], 1, 2);
        let core = find(&table, 0xb, 1).expect("a level for the cores");
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (1, 2, 0x201, 1));
        assert_eq!(for_vcpu(&table, 1, 2), table, "a second time");
    }
}
