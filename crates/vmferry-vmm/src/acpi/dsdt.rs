//! The DSDT: the devices, as code for the kernel's interpreter.
//!
//! ```text
//! Device (\_SB.VR00)  a virtio-mmio slot that holds a device, LNRO0005
//! Device (\_SB.COM1)  the serial port, PNP0501
//! Device (\_SB.PWRB)  the power button, PNP0C0C
//! Device (\_SB.GED_)  the generic event device, ACPI0013: at its interrupt the kernel runs _EVT, which reads the
//!                     selector and notifies the button
//! Name (\_S5_)        the sleep type that powers the machine off
//! ```
//!
//! All interrupts are edges: that is what KVM makes of an irqfd.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package,
    Path, ResourceTemplate, Store, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{OEM, OEM_REVISION, OEM_TABLE, Platform, bytes};
use crate::devices::events;
use crate::layout::{
    EVENT_DEVICE, EVENT_DEVICE_IRQ, SERIAL_IRQ, SERIAL_PORT, VIRTIO_MMIO_SLOT, virtio_irq,
    virtio_slot,
};

const HEADER: u32 = 36;
/// Two means that integers have 64 bits.
const REVISION: u8 = 2;
/// The notification of a button that was pressed.
const PRESSED: u8 = 0x80;

pub(super) fn table(platform: &Platform) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    for slot in &platform.virtio_slots {
        dsdt.append_slice(&virtio(*slot));
    }
    dsdt.append_slice(&serial_port());
    dsdt.append_slice(&power_button());
    dsdt.append_slice(&event_device());
    dsdt.append_slice(&power_off());
    dsdt.as_slice().to_vec()
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

/// An interrupt of a device: an edge to high.
fn interrupt(number: u32, shared: bool) -> Interrupt {
    Interrupt::new(true, true, false, shared, number)
}

fn virtio(slot: u32) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, virtio_slot(slot) as u32, VIRTIO_MMIO_SLOT as u32);
    let interrupt = interrupt(virtio_irq(slot), true);
    bytes(&Device::new(
        Path::new(&format!("\\_SB_.VR{slot:02}")),
        vec![
            &name("_HID", &"LNRO0005"),
            &name("_UID", &slot),
            &name("_CCA", &1u8),
            &name("_CRS", &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    ))
}

fn serial_port() -> Vec<u8> {
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
    let interrupt = interrupt(SERIAL_IRQ, false);
    bytes(&Device::new(
        Path::new("\\_SB_.COM1"),
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &1u8),
            &name("_CRS", &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    bytes(&Device::new(
        Path::new("\\_SB_.PWRB"),
        vec![
            &name("_HID", &EISAName::new("PNP0C0C")),
            &name("_UID", &ZERO),
        ],
    ))
}

fn event_device() -> Vec<u8> {
    let selector = || Name::new_field_name("ESEL");
    let button = || Name::new_field_name("PWRB");
    let interrupt = interrupt(EVENT_DEVICE_IRQ, false);
    bytes(&Device::new(
        Path::new("\\_SB_.GED_"),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&interrupt])),
            &OpRegion::new(
                Path::new("EREG"),
                OpRegionSpace::SystemMemory,
                &(EVENT_DEVICE + events::SELECTOR),
                &4u8,
            ),
            &Field::new(
                Path::new("EREG"),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"ESEL", 32)],
            ),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![
                    // One read: it clears the register.
                    &Store::new(&Local(0), &selector()),
                    &And::new(&Local(1), &Local(0), &events::POWER_BUTTON),
                    &If::new(&Local(1), vec![&Notify::new(&button(), &PRESSED)]),
                ],
            ),
        ],
    ))
}

fn power_off() -> Vec<u8> {
    let kind = events::SLEEP_TYPE_OFF;
    bytes(&name(
        "\\_S5_",
        &Package::new(vec![&kind, &ZERO, &ZERO, &ZERO]),
    ))
}
