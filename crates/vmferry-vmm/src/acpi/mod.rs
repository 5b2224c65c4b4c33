//! ACPI tables: how a kernel without a firmware learns what the machine has.
//!
//! The machine is *hardware-reduced*: it has none of the fixed registers of a PC, and everything is described.
//! The tables lie in one piece of RAM that the memory map keeps from the kernel, the root pointer first:
//!
//! | table | says |
//! |---|---|
//! | RSDP | where the XSDT is |
//! | XSDT | where the FADT and the MADT are |
//! | FADT | that the hardware is reduced, how to power off and reset, where the DSDT is |
//! | MADT | local APICs and the I/O APIC. Interrupts below 16 are where ISA has them, so nothing is overridden |
//! | DSDT | the devices (see `dsdt`) |

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::devices::events;
use crate::layout::{ACPI_TABLES, EVENT_DEVICE, IO_APIC, LOCAL_APIC};

mod dsdt;

const OEM: [u8; 6] = *b"VMFRRY";
const OEM_TABLE: [u8; 8] = *b"VMFERRY ";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of this.
const ALIGN: usize = 16;

/// Length of the MADT without its entries.
const MADT_HEADER: u32 = 44;
const MADT_REVISION: u8 = 5;
/// APIC ids that an entry of the short kind can hold; 255 means all.
const SHORT_APIC_IDS: u32 = 255;

/// FADT, IA-PC boot flags: there is no VGA to probe.
const NO_VGA: u16 = 1 << 2;
/// FADT, IA-PC boot flags: there is no CMOS clock.
const NO_CMOS_RTC: u16 = 1 << 5;

/// What the tables describe.
#[derive(Clone, Debug)]
pub(crate) struct Platform {
    pub cpus: u32,
    /// The virtio-mmio slots that hold a device.
    pub virtio_slots: Vec<u32>,
}

/// The tables as they are to lie at [`ACPI_TABLES`], the root pointer first.
pub(crate) fn tables(platform: &Platform) -> Vec<u8> {
    let mut area = Area(vec![0; Rsdp::len()]);
    let dsdt = area.add(&dsdt::table(platform));
    let fadt = area.add(&bytes(&fadt(dsdt)));
    let madt = area.add(madt(platform.cpus).as_slice());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.add(&bytes(&xsdt));
    let root = bytes(&Rsdp::new(OEM, xsdt));
    area.0[..root.len()].copy_from_slice(&root);
    area.0
}

/// Tables one behind the other, as they will lie in the guest's memory.
struct Area(Vec<u8>);

impl Area {
    /// Appends a table and returns its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let at = self.0.len().next_multiple_of(ALIGN);
        self.0.resize(at, 0);
        self.0.extend(table);
        ACPI_TABLES + at as u64
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |offset| {
        GAS::new(
            AddressSpace::SystemMemory,
            8,
            0,
            AccessSize::ByteAccess,
            EVENT_DEVICE + offset,
        )
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        // These two say that the buttons are no fixed hardware: the power button is a device, and there is no
        // other.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = register(events::RESET);
    fadt.reset_value = events::RESET_VALUE;
    fadt.sleep_control_reg = register(events::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(events::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u32) -> Sdt {
    let mut madt = Sdt::new(
        *b"APIC",
        MADT_HEADER,
        MADT_REVISION,
        OEM,
        OEM_TABLE,
        OEM_REVISION,
    );
    madt.write_u32(36, LOCAL_APIC);
    for cpu in 0..cpus {
        if cpu < SHORT_APIC_IDS {
            let id = cpu as u8;
            let entry = ProcessorLocalApic::new(id, id, EnabledStatus::Enabled);
            madt.append_slice(&bytes(&entry));
        } else {
            madt.append_slice(&local_x2apic(cpu));
        }
    }
    madt.append_slice(&bytes(&IoApic::new(0, IO_APIC, 0)));
    madt
}

/// An entry for a vCPU whose APIC id needs more than a byte.
fn local_x2apic(id: u32) -> Vec<u8> {
    const KIND: u8 = 9;
    const LEN: u8 = 16;
    const ENABLED: u32 = 1;
    let mut entry = vec![KIND, LEN, 0, 0];
    for word in [id, ENABLED, id] {
        entry.extend(word.to_le_bytes());
    }
    entry
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;
    use crate::layout::RESET_VECTOR;

    fn all() -> Platform {
        Platform {
            cpus: 3,
            virtio_slots: (0..24).collect(),
        }
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at `address`, whose checksum must be right.
    fn table(area: &[u8], address: u64) -> &[u8] {
        let at = (address - ACPI_TABLES) as usize;
        let table = &area[at..at + u32_at(area, at + 4) as usize];
        assert_eq!(sum(table), 0, "checksum at {address:#x}");
        table
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn found(area: &[u8]) -> [&[u8]; 4] {
        assert_eq!(&area[..8], b"RSD PTR ");
        assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
        let xsdt = table(area, u64_at(area, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 16));
        let fadt = table(area, u64_at(xsdt, 36));
        let madt = table(area, u64_at(xsdt, 44));
        let dsdt = table(area, u64_at(fadt, 140));
        [xsdt, fadt, madt, dsdt]
    }

    #[test]
    fn every_table_is_found_from_the_root() {
        let area = tables(&all());
        let [_, fadt, madt, dsdt] = found(&area);
        assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 276));
        let hardware_reduced = 1 << 20;
        assert_ne!(u32_at(fadt, 112) & hardware_reduced, 0);
        let register_at = |at: usize| u64_at(fadt, at + 4);
        assert_eq!(register_at(116), 0xfea0_0202, "reset");
        assert_eq!(fadt[128], 0x42);
        assert_eq!(register_at(244), 0xfea0_0200, "sleep control");
        assert_eq!(register_at(256), 0xfea0_0201, "sleep status");

        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(u32_at(madt, 36), 0xfee0_0000);
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        assert_eq!(madt[44 + 16..][..4], [0, 8, 2, 2]);
        assert_eq!(madt[44 + 24..][..2], [1, 12]);
        assert_eq!(u32_at(madt, 44 + 24 + 4), 0xfec0_0000);

        assert_eq!(&dsdt[..4], b"DSDT");
        let count = |what: &[u8]| dsdt.windows(what.len()).filter(|w| *w == what).count();
        assert_eq!(count(b"LNRO0005"), 24);
        assert_eq!(count(b"ACPI0013"), 1);
    }

    #[test]
    fn the_tables_fit_where_kernels_look_for_them() {
        let area = tables(&Platform {
            cpus: 1024,
            ..all()
        });
        found(&area);
        assert!(ACPI_TABLES + (area.len() as u64) < RESET_VECTOR);
        assert_eq!(local_x2apic(300)[..8], [9, 16, 0, 0, 44, 1, 0, 0]);
    }

    /// ACPICA's compiler takes the tables apart and puts them together again, which it refuses if they are wrong.
    #[test]
    fn acpica_understands_the_tables() {
        if Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("SKIPPED: iasl is not installed (Debian: acpica-tools)");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let area = tables(&all());
        let [_, fadt, madt, dsdt] = found(&area);
        for (name, table) in [("facp", fadt), ("apic", madt), ("dsdt", dsdt)] {
            fs::write(dir.path().join(name).with_extension("dat"), table).unwrap();
            let iasl = |arguments: &[&str]| {
                let run = Command::new("iasl")
                    .args(arguments)
                    .current_dir(dir.path())
                    .output()
                    .unwrap();
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                let said = text(&run.stdout) + &text(&run.stderr);
                assert!(run.status.success(), "{said}");
                said
            };
            iasl(&["-d", &format!("{name}.dat")]);
            let said = iasl(&[&format!("{name}.dsl")]);
            assert!(said.contains("0 Errors"), "{said}");
            eprintln!("{said}");
            if name == "dsdt" {
                assert!(said.contains("0 Warnings"), "{said}");
            }
        }
        let source = fs::read_to_string(dir.path().join("dsdt.dsl")).unwrap();
        for part in [
            "Notify (PWRB, 0x80)",
            "0xFEB02E00",
            "\"LNRO0005\"",
            "EisaId (\"PNP0501\")",
            "EisaId (\"PNP0C0C\")",
        ] {
            assert!(source.contains(part), "{part} is not in {source}");
        }
    }
}
