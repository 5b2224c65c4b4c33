//! The guest's CPUID: what KVM supports, completed for each vCPU, and compared between two hosts.

use kvm_bindings::kvm_cpuid_entry2;

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
const HYPER_THREADING: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: several cores are a package's cores (AMD).
const CMP_LEGACY: u32 = 1 << 1;

/// CPUID of vCPU `index` of `cpus`: one package of `cpus` cores with one thread each, APIC ids counting from 0.
pub(crate) fn for_vcpu(
    supported: &[kvm_cpuid_entry2],
    index: u32,
    cpus: u32,
) -> Vec<kvm_cpuid_entry2> {
    let id_bits = cpus.next_power_of_two().trailing_zeros();
    let mut table = supported.to_vec();
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
            0x7 if entry.index == 0 => entry.edx &= !ARCH_CAPABILITIES,
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

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn name(self) -> &'static str {
        match self {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        }
    }

    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }
}

/// The registers in which a bit is a feature that a guest may come to rely on.
const FEATURES: &[(u32, u32, Register)] = &[
    (0x1, 0, Register::Ecx),
    (0x1, 0, Register::Edx),
    (0x7, 0, Register::Ebx),
    (0x7, 0, Register::Ecx),
    (0x7, 0, Register::Edx),
    (0x7, 1, Register::Eax),
    (0x7, 1, Register::Edx),
    (0xd, 0, Register::Eax),
    (0xd, 0, Register::Edx),
    (0xd, 1, Register::Eax),
    (0x4000_0001, 0, Register::Eax),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0007, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
];

/// Features that a guest with CPUID `source` may use and a guest with CPUID `here` has not, as text that
/// names leaf, register and bits.
pub(crate) fn missing(source: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Vec<String> {
    FEATURES
        .iter()
        .filter_map(|&(leaf, subleaf, register)| {
            let wanted = find(source, leaf, subleaf).map_or(0, |e| register.of(e));
            let offered = find(here, leaf, subleaf).map_or(0, |e| register.of(e));
            let lacking = wanted & !offered;
            (lacking != 0).then(|| {
                let name = register.name();
                format!("leaf {leaf:#x} subleaf {subleaf} {name} bits {lacking:#010x}")
            })
        })
        .collect()
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
    fn a_missing_feature_is_named() {
        let mut source = entry(7, 0);
        source.ebx = 0x1_0000;
        assert_eq!(
            missing(&[source], &[entry(7, 0)]),
            ["leaf 0x7 subleaf 0 EBX bits 0x00010000"]
        );
        assert!(missing(&[source], &[source]).is_empty());
        assert!(missing(&[entry(7, 0)], &[source]).is_empty());
    }
}
