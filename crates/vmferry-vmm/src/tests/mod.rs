//! Whole machines, run by KVM. They are skipped, loudly, where there is none.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmferry_testing::host::has_kvm as kvm;
use vmferry_testing::wait::{PATIENCE, wait_until as wait_for};

use crate::devices::MmioDevice;
use crate::{Backing, DirtyLogChoice, Machine, MachineConfig, MachineEvent, OnReset, SerialConfig};

mod balloon;
mod devices;
mod dirty_log;
mod disk_driver;
mod flushes;
mod guest;
mod life;
mod migration;
mod payload;
mod snapshots;
mod state;
mod storage;

fn config(cpus: u32, serial: &Path) -> MachineConfig {
    MachineConfig {
        name: "test".into(),
        cpus,
        memory: 64 << 20,
        backing: Backing::Private,
        dirty_log: DirtyLogChoice::Auto,
        kernel: Some(guest::kernel()),
        initrd: None,
        cmdline: "console=ttyS0".into(),
        serial: SerialConfig::File(serial.to_owned()),
        disks: Vec::new(),
        nets: Vec::new(),
        console: None,
        rng: false,
        balloon: None,
        on_reset: OnReset::Reset,
        incoming: false,
    }
}

fn machine(config: MachineConfig) -> (Arc<Machine>, Receiver<MachineEvent>) {
    let (sender, events) = mpsc::channel();
    let on_event = Box::new(move |event| {
        // Not every test listens.
        let _ = sender.send(event);
    });
    (Machine::new(config, on_event).unwrap(), events)
}

fn u64_at(machine: &Machine, at: u64) -> u64 {
    machine.ram.memory.read_obj(GuestAddress(at)).unwrap()
}

fn u32_at(machine: &Machine, at: u64) -> u32 {
    machine.ram.memory.read_obj(GuestAddress(at)).unwrap()
}

fn command(machine: &Machine, command: u8) {
    machine
        .ram
        .memory
        .write_obj(command, GuestAddress(guest::COMMAND))
        .unwrap();
}

/// Where the rings of the queue are that [`start_device`] sets up.
const RINGS: u64 = 0x40_0000;

/// Does what a driver does to start the machine's first virtio device, with one of its queues.
fn start_device(machine: &Machine, features: u32, queue: u32) {
    let slot = &machine.devices.slots()[0];
    for (register, value) in [
        (0x70, 3),
        (0x24, 0),
        (0x20, features),
        (0x24, 1),
        (0x20, 1),
        (0x70, 0xb),
        (0x30, queue),
        (0x38, 16),
        (0x80, RINGS as u32),
        (0x90, RINGS as u32 + 0x1000),
        (0xa0, RINGS as u32 + 0x2000),
        (0x44, 1),
        (0x70, 0xf),
    ] {
        slot.write(register, &u32::to_le_bytes(value));
    }
}

#[track_caller]
fn expect(events: &Receiver<MachineEvent>, wanted: &MachineEvent) {
    let event = events
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|_| panic!("waited in vain for {wanted:?}"));
    assert_eq!(event, *wanted);
}

/// Waits until the guest goes on: digits, ticks, and with several vCPUs the counter of the others.
#[track_caller]
fn wait_for_progress(machine: &Machine) {
    let (ticks, tsc) = (u32_at(machine, guest::TICKS), u64_at(machine, guest::TSC));
    wait_for("timer ticks", || {
        u32_at(machine, guest::TICKS) > ticks.wrapping_add(1)
    });
    wait_for("the boot processor", || u64_at(machine, guest::TSC) > tsc);
    if machine.config().cpus > 1 {
        let counter = u32_at(machine, guest::AP_COUNTER);
        wait_for("the application processors", || {
            u32_at(machine, guest::AP_COUNTER) != counter
        });
    }
}
