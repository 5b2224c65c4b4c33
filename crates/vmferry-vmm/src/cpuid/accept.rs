//! Whether a guest with the CPUID of another host can go on here.
//!
//! A guest keeps the CPUID that it started with, so what arrives with it is loaded into its vCPUs. KVM itself takes almost
//! any table, and then emulates what the table says. So each register of each leaf is compared with what this machine
//! offers, by a [`Rule`]; a register without a rule has to be the same, or zero.

use std::collections::BTreeSet;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use super::Register::{self, Eax, Ebx, Ecx, Edx};
use super::{find, for_vcpu};

/// So many differences are named at most.
const NAMED: usize = 8;

/// What a register of the guest may hold where another value is offered.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// Each bit is a feature, and those of the guest are among those offered.
    Features,
    /// The same value in these bits. The others describe.
    Same(u32),
    /// The same value, or zero: the guest knows nothing of it.
    SameOrNone,
    /// Numbers, each with its lowest bit and its width, that are not larger than those offered. Other bits describe.
    AtMost(&'static [(u32, u32)]),
    /// It describes the CPU on which the guest started, and switches nothing on.
    Describes,
}

/// The rule for one register.
fn rule(leaf: u32, subleaf: u32, register: Register) -> Rule {
    match (leaf, subleaf, register) {
        // The vendor; EAX is the last leaf.
        (0x0, _, Eax) => Rule::Describes,
        (0x0, _, _) => Rule::Same(u32::MAX),
        // Family, model, stepping.
        (0x1, _, Eax) => Rule::Describes,
        // The size of a cache line, which the guest flushes by. APIC id and number of vCPUs are compared elsewhere.
        (0x1, _, Ebx) => Rule::Same(0xff00),
        (0x1, _, Ecx | Edx) => Rule::Features,
        // Caches, MONITOR's line, and the bits of the topology, which are compared elsewhere.
        (0x2 | 0x4 | 0x5, _, _) => Rule::Describes,
        (0x6, _, Eax) => Rule::Features,
        (0x7, 0, Eax) => Rule::Describes,
        (0x7, 0..=2, _) => Rule::Features,
        // Performance counters: version, number and width of the general ones, events known; then the fixed ones.
        (0xa, _, Eax) => Rule::AtMost(&[(0, 8), (8, 8), (16, 8)]),
        (0xa, _, Ebx) => Rule::Describes,
        (0xa, _, Ecx) => Rule::Features,
        (0xa, _, Edx) => Rule::AtMost(&[(0, 5), (5, 8)]),
        (0xb | 0x1f | 0x8000_001e, _, _) => Rule::Describes,
        // XSAVE: which components there are, and how large they are all together. The other leaves say where each
        // component lies, and fall under the last rule.
        (0xd, 0, Eax | Edx) | (0xd, 1, Eax | Ecx | Edx) => Rule::Features,
        (0xd, 0, Ebx) | (0xd, 1, Ebx) => Rule::Describes,
        (0xd, 0, Ecx) => Rule::AtMost(&[(0, 32)]),
        // Frequencies.
        (0x15 | 0x16, _, _) => Rule::Describes,
        // KVM's own leaves.
        (0x4000_0000, _, Eax) => Rule::Describes,
        (0x4000_0001, _, Eax | Edx) => Rule::Features,
        (0x8000_0000, _, Eax) | (0x8000_0001, _, Eax | Ebx) => Rule::Describes,
        (0x8000_0001, _, Ecx | Edx) => Rule::Features,
        // The CPU's name, its caches and TLBs.
        (0x8000_0002..=0x8000_0006 | 0x8000_0019..=0x8000_001a | 0x8000_001d, _, _) => {
            Rule::Describes
        }
        (0x8000_0007, _, Ebx | Edx) => Rule::Features,
        // Physical and linear address bits.
        (0x8000_0008, _, Eax) => Rule::AtMost(&[(0, 8), (8, 8)]),
        (0x8000_0008, _, Ebx) => Rule::Features,
        (0x8000_0008, _, Ecx) => Rule::Describes,
        (0x8000_001f, _, Eax) => Rule::Features,
        (0x8000_0021, _, Eax | Ecx) => Rule::Features,
        (0x8000_0021, _, Ebx) => Rule::Describes,
        // Performance counters of AMD, version 2.
        (0x8000_0022, _, Eax) => Rule::Features,
        (0x8000_0022, _, Ebx) => Rule::AtMost(&[(0, 4), (4, 6), (10, 6)]),
        _ => Rule::SameOrNone,
    }
}

impl Rule {
    /// What is wrong with `wanted` where `offered` is offered, if anything.
    fn broken(self, wanted: u32, offered: u32) -> Option<String> {
        let differs = || Some(format!("{wanted:#x} instead of {offered:#x}"));
        match self {
            Rule::Features if wanted & !offered != 0 => {
                Some(format!("bits {:#010x}", wanted & !offered))
            }
            Rule::Same(bits) if (wanted ^ offered) & bits != 0 => differs(),
            Rule::SameOrNone if wanted != 0 && wanted != offered => differs(),
            Rule::AtMost(numbers) => numbers.iter().find_map(|&(low, width)| {
                let number = |register: u32| register >> low & u32::MAX >> (32 - width);
                let (wanted, offered) = (number(wanted), number(offered));
                (wanted > offered).then(|| {
                    let high = low + width - 1;
                    format!("bits {high}-{low} are {wanted}, at most {offered} here")
                })
            }),
            _ => None,
        }
    }
}

/// Each register of two tables in which `wrong` finds something, as text.
fn differences(
    wanted: &[kvm_cpuid_entry2],
    offered: &[kvm_cpuid_entry2],
    wrong: impl Fn(u32, u32, Register, u32, u32) -> Option<String>,
) -> Vec<String> {
    let places: BTreeSet<_> = wanted
        .iter()
        .chain(offered)
        .map(|entry| (entry.function, entry.index))
        .collect();
    places
        .into_iter()
        .flat_map(|(leaf, subleaf)| Register::ALL.map(|register| (leaf, subleaf, register)))
        .filter_map(|(leaf, subleaf, register)| {
            let wanted = register.of(find(wanted, leaf, subleaf));
            let offered = register.of(find(offered, leaf, subleaf));
            let what = wrong(leaf, subleaf, register, wanted, offered)?;
            let name = register.name();
            Some(format!("leaf {leaf:#x} subleaf {subleaf} {name} {what}"))
        })
        .collect()
}

fn list(mut differences: Vec<String>) -> String {
    let more = differences.len().saturating_sub(NAMED);
    differences.truncate(NAMED);
    let named = differences.join(", ");
    match more {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// Checks CPUID of the first vCPUs (usually of all) of a guest that has `cpus` of them against what vCPU 0 is offered
/// `here`. The error names leaf, register, bits, and the vCPU.
pub(crate) fn accept(
    tables: &[&[kvm_cpuid_entry2]],
    cpus: u32,
    here: &[kvm_cpuid_entry2],
) -> Result<(), String> {
    for (index, table) in (0..).zip(tables) {
        let of = |what: String| format!("CPUID of vCPU {index}: {what}");
        // Before anything takes time or memory by their number.
        if table.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(of(format!(
                "{} entries, KVM takes {KVM_MAX_CPUID_ENTRIES} at most",
                table.len()
            )));
        }
        let mut places = BTreeSet::new();
        for entry in *table {
            if !places.insert((entry.function, entry.index)) {
                return Err(of(format!(
                    "leaf {:#x} subleaf {} twice",
                    entry.function, entry.index
                )));
            }
        }
        let unknown = differences(table, here, |leaf, subleaf, register, wanted, offered| {
            rule(leaf, subleaf, register).broken(wanted, offered)
        });
        if !unknown.is_empty() {
            return Err(of(format!(
                "this host does not offer {}: start the destination on a host with the same or a newer CPU and kernel",
                list(unknown)
            )));
        }
        // All vCPUs are the same but for their place in the machine.
        let right = for_vcpu(tables[0], index, cpus);
        let wrong = differences(table, &right, |_, _, _, has, should| {
            (has != should).then(|| format!("{has:#x} instead of {should:#x}"))
        });
        if !wrong.is_empty() {
            return Err(of(format!(
                "it is not that of vCPU {index} of {cpus} in a vmferry machine: {}",
                list(wrong)
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    /// A CPU of AMD, in short.
    fn host() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0x0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            entry(0x1, 0, [0xa10f11, 0x800, 0x8020_2000, 0x078b_fbff]),
            entry(0x7, 0, [0, 0x0180_0002, 0, 0]),
            entry(0xb, 0, [0; 4]),
            entry(0xd, 0, [0x7, 0x340, 0x340, 0]),
            entry(0xd, 2, [0x100, 0x240, 0, 0]),
            entry(0x4000_0001, 0, [0x7efb, 0, 0, 0]),
            entry(0x8000_0001, 0, [0xa10f11, 0, 0x391, 0x23d3_fbff]),
            entry(0x8000_0008, 0, [0x3030, 0, 0x7001, 0]),
            entry(0x8000_0021, 0, [0x204, 0, 6, 0]),
        ]
    }

    fn tables(cpus: u32) -> Vec<Vec<kvm_cpuid_entry2>> {
        (0..cpus).map(|i| for_vcpu(&host(), i, cpus)).collect()
    }

    /// What is said of the tables of a guest of two vCPUs of which one table was changed.
    fn refusal(vcpu: usize, change: impl FnOnce(&mut Vec<kvm_cpuid_entry2>)) -> String {
        let mut guest = tables(2);
        change(&mut guest[vcpu]);
        let guest: Vec<_> = guest.iter().map(Vec::as_slice).collect();
        match accept(&guest, 2, &tables(2)[0]) {
            Ok(()) => String::new(),
            Err(why) => why,
        }
    }

    fn at(table: &mut [kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> &mut kvm_cpuid_entry2 {
        table
            .iter_mut()
            .find(|e| (e.function, e.index) == (leaf, subleaf))
            .expect("the host has it")
    }

    #[test]
    fn what_the_host_offers_is_taken() {
        assert_eq!(refusal(1, |_| {}), "");
        assert_eq!(refusal(0, |_| {}), "");
    }

    #[test]
    fn a_guest_of_another_model_with_less_is_taken() {
        let mut lesser = host();
        at(&mut lesser, 0, 0).eax = 0xd;
        at(&mut lesser, 1, 0).eax = 0x80_0f11;
        at(&mut lesser, 7, 0).ebx = 2;
        at(&mut lesser, 0x8000_0008, 0).eax = 0x302b;
        at(&mut lesser, 0x8000_0021, 0).eax = 0;
        at(&mut lesser, 0xd, 0).eax = 3;
        at(&mut lesser, 0xd, 0).ecx = 0x240;
        lesser.retain(|e| (e.function, e.index) != (0xd, 2));
        let guest: Vec<_> = (0..2).map(|i| for_vcpu(&lesser, i, 2)).collect();
        let guest: Vec<_> = guest.iter().map(Vec::as_slice).collect();
        assert_eq!(accept(&guest, 2, &tables(2)[0]), Ok(()));
    }

    #[test]
    fn what_the_host_does_not_offer_is_named_with_the_vcpu() {
        for (leaf, subleaf, change, words) in [
            (
                0x1,
                0,
                (|e| e.ecx |= 1 << 5) as fn(&mut kvm_cpuid_entry2),
                "leaf 0x1 subleaf 0 ECX bits 0x00000020",
            ),
            (
                0x8000_0001,
                0,
                |e| e.ecx |= 1 << 2,
                "leaf 0x80000001 subleaf 0 ECX bits 0x00000004",
            ),
            (
                0x7,
                0,
                |e| e.ebx |= 1 << 16,
                "leaf 0x7 subleaf 0 EBX bits 0x00010000",
            ),
            (
                0x0,
                0,
                |e| e.ebx = 0x756e_6547,
                "leaf 0x0 subleaf 0 EBX 0x756e6547 instead of 0x68747541",
            ),
            (0x1, 0, |e| e.ebx |= 0x8000, "leaf 0x1 subleaf 0 EBX"),
            (
                0x8000_0008,
                0,
                |e| e.eax = 0x3034,
                "leaf 0x80000008 subleaf 0 EAX bits 7-0 are 52, at most 48 here",
            ),
            (
                0x8000_0008,
                0,
                |e| e.eax = 0x3930,
                "bits 15-8 are 57, at most 48 here",
            ),
            (
                0xd,
                0,
                |e| e.eax |= 1 << 9,
                "leaf 0xd subleaf 0 EAX bits 0x00000200",
            ),
            (
                0xd,
                2,
                |e| e.ebx = 0x260,
                "leaf 0xd subleaf 2 EBX 0x260 instead of 0x240",
            ),
            (
                0x8000_0021,
                0,
                |e| e.eax |= 1 << 8,
                "leaf 0x80000021 subleaf 0 EAX bits 0x00000100",
            ),
            (
                0x4000_0001,
                0,
                |e| e.eax |= 1 << 31,
                "leaf 0x40000001 subleaf 0 EAX bits 0x80000000",
            ),
        ] {
            for vcpu in [0, 1] {
                let said = refusal(vcpu, |table| change(at(table, leaf, subleaf)));
                assert!(said.contains(words), "{said}");
                assert!(
                    said.starts_with(&format!("CPUID of vCPU {vcpu}: ")),
                    "{said}"
                );
            }
        }
    }

    #[test]
    fn a_leaf_that_the_host_does_not_have_is_refused() {
        // Hyper-V's: KVM would emulate it.
        let said = refusal(0, |table| {
            table.push(entry(0x4000_0003, 0, [0xff, 0, 0, 0]));
        });
        assert!(
            said.contains("leaf 0x40000003 subleaf 0 EAX 0xff instead of 0x0"),
            "{said}"
        );
        assert_eq!(refusal(0, |_| {}), "");
    }

    #[test]
    fn each_place_is_there_once_and_their_number_is_bounded() {
        let twice = refusal(1, |table| table.push(table[2]));
        assert_eq!(twice, "CPUID of vCPU 1: leaf 0x7 subleaf 0 twice");
        let many = refusal(1, |table| table.resize(100_000, entry(0x20, 0, [0; 4])));
        assert_eq!(
            many,
            "CPUID of vCPU 1: 100000 entries, KVM takes 256 at most"
        );
        let all_features = refusal(0, |table| {
            for entry in table {
                (entry.ecx, entry.edx) = (u32::MAX, u32::MAX);
            }
        });
        assert!(all_features.contains(" more: "), "{all_features}");
    }

    #[test]
    fn vcpus_that_do_not_agree_are_refused() {
        let apic_id = refusal(1, |table| at(table, 1, 0).ebx &= 0x00ff_ffff);
        assert!(
            apic_id.contains("vCPU 1 of 2") && apic_id.contains("leaf 0x1 subleaf 0 EBX"),
            "{apic_id}"
        );
        let x2apic_id = refusal(0, |table| at(table, 0xb, 0).edx = 1);
        assert!(
            x2apic_id.contains("leaf 0xb subleaf 0 EDX 0x1 instead of 0x0"),
            "{x2apic_id}"
        );
        let features = refusal(1, |table| at(table, 7, 0).ebx = 0);
        assert!(
            features.contains("leaf 0x7 subleaf 0 EBX 0x0 instead of 0x1800002"),
            "{features}"
        );
    }
}
