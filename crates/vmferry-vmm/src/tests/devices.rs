//! Devices of whole machines: power, notifications, and disks that change hands with the guest.

use std::fs::{self, File};
use std::path::PathBuf;

use vmferry_engine::seam::{Activity, Departure, Guest};

use super::migration::{copy_ram, incoming, migrate};
use super::*;
use crate::{Access, Caching, DiskConfig, ImageFormat, RunState, ShutdownCause};

#[test]
fn a_guest_powers_its_machine_off() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    let (machine, events) = machine(config(2, &serial));
    machine.resume().unwrap();
    expect(&events, &MachineEvent::Resume);
    wait_for_progress(&machine);
    command(&machine, guest::ACPI_RESET);
    expect(&events, &MachineEvent::Reset { guest: true });
    wait_for_progress(&machine);
    command(&machine, guest::POWER_OFF);
    let cause = ShutdownCause::GuestShutdown;
    expect(&events, &MachineEvent::Shutdown { cause });
    assert_eq!(machine.run_state(), RunState::Shutdown);
    assert!(machine.power_button().is_err());
    assert!(!fs::read(&serial).unwrap().contains(&b'!'), "it ran on");
    machine.reset().unwrap();
    machine.resume().unwrap();
    wait_for_progress(&machine);
}

#[test]
fn a_press_of_the_power_button_moves_with_the_guest() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, events) = machine(config(1, &dir.path().join("here")));
    let (destination, _) = machine(incoming(1, &dir.path().join("there")));
    assert!(destination.power_button().is_err(), "nobody is there");
    source.resume().unwrap();
    wait_for_progress(&source);
    source.power_button().unwrap();
    expect(&events, &MachineEvent::Resume);
    expect(&events, &MachineEvent::PowerButton);
    migrate(&source, &destination);
    assert!(source.power_button().is_err(), "nobody is there any more");
    for selector in [2, 0] {
        let unread = 0xffff_ffffu32;
        let at = GuestAddress(guest::SELECTOR);
        destination.ram.memory.write_obj(unread, at).unwrap();
        command(&destination, guest::READ_SELECTOR);
        wait_for("the selector", || {
            u32_at(&destination, guest::SELECTOR) != unread
        });
        assert_eq!(u32_at(&destination, guest::SELECTOR), selector);
    }
}

#[test]
fn kvm_passes_notifications_on() {
    if !kvm() {
        return;
    }
    const BUFFER: u64 = 0x50_0000;
    let dir = tempfile::tempdir().unwrap();
    let with_rng = |config: MachineConfig| MachineConfig {
        rng: true,
        ..config
    };
    let (source, _) = machine(with_rng(config(1, &dir.path().join("here"))));
    let (destination, _) = machine(with_rng(incoming(1, &dir.path().join("there"))));
    // The tables say that there is one device.
    let mut tables = vec![0; 4096];
    let at = GuestAddress(0xe_0000);
    source.ram.memory.read_slice(&mut tables, at).unwrap();
    let count = |what: &[u8]| tables.windows(what.len()).filter(|w| *w == what).count();
    assert_eq!(count(b"LNRO0005"), 1);

    source.resume().unwrap();
    wait_for_progress(&source);
    // The test sets the device up; the guest only notifies it.
    start_device(&source, 0, 0);
    let offer = |machine: &Machine, index: u16| {
        let memory = &machine.ram.memory;
        memory.write_obj(BUFFER, GuestAddress(RINGS)).unwrap();
        memory.write_obj(64u32, GuestAddress(RINGS + 8)).unwrap();
        memory.write_obj(2u32, GuestAddress(RINGS + 12)).unwrap();
        memory
            .write_obj(index, GuestAddress(RINGS + 0x1002))
            .unwrap();
    };
    let used = |machine: &Machine| u32_at(machine, RINGS + 0x2000) >> 16;
    // It looks for requests when it is started, and then has to be notified.
    thread::sleep(Duration::from_millis(500));
    offer(&source, 1);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(used(&source), 0, "nobody has notified the device");
    command(&source, guest::NOTIFY);
    wait_for("random numbers", || used(&source) == 1);
    assert_ne!(u64_at(&source, BUFFER), 0);

    migrate(&source, &destination);
    offer(&destination, 2);
    command(&destination, guest::NOTIFY);
    wait_for("random numbers on the destination", || {
        used(&destination) == 2
    });
    wait_for_progress(&destination);
    // A reset of the machine is one of its devices.
    destination.reset().unwrap();
    let mut status = [0xff; 4];
    destination.devices.slots()[0].read(0x70, &mut status);
    assert_eq!(status, [0; 4]);
}

struct Disks {
    dir: tempfile::TempDir,
}

impl Disks {
    fn new() -> Self {
        let disks = Disks {
            dir: tempfile::tempdir().unwrap(),
        };
        File::create(disks.path())
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        disks
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn disk(&self) -> DiskConfig {
        DiskConfig {
            path: self.path(),
            id: Some("root".into()),
            access: Access::ReadWrite,
            caching: Caching::Cached,
            format: ImageFormat::Unsaid,
        }
    }

    fn with(&self, config: MachineConfig) -> MachineConfig {
        MachineConfig {
            disks: vec![self.disk()],
            ..config
        }
    }

    /// A machine that runs and has the disk.
    fn source(&self) -> Arc<Machine> {
        let (machine, _) = machine(self.with(config(1, &self.dir.path().join("here"))));
        machine.resume().unwrap();
        wait_for_progress(&machine);
        machine
    }

    fn destination(&self) -> Arc<Machine> {
        machine(self.with(incoming(1, &self.dir.path().join("there")))).0
    }

    /// Whether a machine in another process could use the disk.
    fn is_free(&self) -> bool {
        let config = self.with(config(1, &self.dir.path().join("other")));
        match Machine::new(config, Box::new(drop)) {
            Ok(_) => true,
            Err(error) => {
                assert!(error.to_string().contains("another process"), "{error}");
                false
            }
        }
    }
}

#[test]
fn a_disk_changes_hands_with_its_guest() {
    if !kvm() {
        return;
    }
    let disks = Disks::new();
    let (source, destination) = (disks.source(), disks.destination());
    assert!(!disks.is_free());
    assert_eq!(source.disks()[0].bytes, 1 << 20);
    migrate(&source, &destination);
    wait_for_progress(&destination);
    assert!(!disks.is_free());
    // The source has given it away, and cannot go on while the destination has it.
    let error = source.resume_anyway().unwrap_err().to_string();
    assert!(
        error.contains("'root'") && error.contains("another process"),
        "{error}"
    );
    assert_eq!(source.run_state(), RunState::PostMigrate);
    drop(destination);
    assert!(disks.is_free());
    source.resume_anyway().unwrap();
    wait_for_progress(&source);
    assert!(!disks.is_free());
}

/// There are more slots than interrupts.
#[test]
fn devices_share_interrupts() {
    if !kvm() {
        return;
    }
    let disks = Disks::new();
    let numbered = |number: u32| DiskConfig {
        id: Some(format!("disk{number}")),
        access: Access::ReadOnly,
        ..disks.disk()
    };
    let many = MachineConfig {
        disks: (0..20).map(numbered).collect(),
        ..config(1, &disks.dir.path().join("here"))
    };
    let (machine, _) = machine(many);
    machine.resume().unwrap();
    wait_for_progress(&machine);
}

/// Takes a running guest as far as the destination's LOADED.
fn load_into(source: &Machine, destination: &Machine) {
    assert_eq!(Guest::pause(source, PATIENCE).unwrap(), Activity::Running);
    let state = source.save_devices().unwrap();
    copy_ram(source, destination);
    destination.load_devices(&state).unwrap();
}

#[test]
fn a_failed_hand_over_takes_the_disk_back() {
    if !kvm() {
        return;
    }
    let disks = Disks::new();
    let (source, destination) = (disks.source(), disks.destination());
    // The destination fails, or dies, after it has loaded the guest.
    load_into(&source, &destination);
    assert!(disks.is_free(), "it belongs to nobody");
    Guest::resume(&*source, Activity::Running).unwrap();
    wait_for_progress(&source);
    assert!(!disks.is_free());
    // The destination must not start, even if it is told to.
    let error = destination.start(Activity::Running, Duration::ZERO);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    assert_eq!(destination.run_state(), RunState::Paused);
    assert!(destination.resume().is_err());
    // A guest that was paused keeps its disk, too.
    source.pause().unwrap();
    assert_eq!(Guest::pause(&*source, PATIENCE).unwrap(), Activity::Paused);
    source.save_devices().unwrap();
    Guest::resume(&*source, Activity::Paused).unwrap();
    assert_eq!(source.run_state(), RunState::Paused);
    assert!(!disks.is_free());
}

#[test]
fn a_paused_guest_takes_its_disk_along() {
    if !kvm() {
        return;
    }
    let disks = Disks::new();
    let (source, destination) = (disks.source(), disks.destination());
    source.pause().unwrap();
    assert_eq!(Guest::pause(&*source, PATIENCE).unwrap(), Activity::Paused);
    let state = source.save_devices().unwrap();
    copy_ram(&source, &destination);
    destination.load_devices(&state).unwrap();
    destination.start(Activity::Paused, Duration::ZERO).unwrap();
    source.left(Departure::HandedOver);
    assert!(!disks.is_free(), "somebody else could write to it");
    // What has left does not leave once more.
    let error = Guest::pause(&*source, PATIENCE).unwrap_err().to_string();
    assert!(error.contains("it has left already"), "{error}");
    assert!(source.resume_anyway().is_err());
    destination.resume().unwrap();
    wait_for_progress(&destination);
}

#[test]
fn in_doubt_whoever_goes_on_first_has_the_disk() {
    if !kvm() {
        return;
    }
    let disks = Disks::new();
    let (source, destination) = (disks.source(), disks.destination());
    load_into(&source, &destination);
    // The connection is lost where neither can know: both keep the guest, paused.
    source.resume_in_doubt().unwrap();
    destination.start_in_doubt(Duration::ZERO).unwrap();
    assert_eq!(source.run_state(), RunState::Paused);
    assert!(disks.is_free());
    destination.resume().unwrap();
    wait_for_progress(&destination);
    assert!(source.resume().is_err(), "both would run");
    assert_eq!(source.run_state(), RunState::Paused);
}

#[test]
fn a_disk_that_a_third_has_taken_stops_both() {
    if !kvm() {
        return;
    }
    let disks = Disks::new();
    let (source, destination) = (disks.source(), disks.destination());
    Guest::pause(&*source, PATIENCE).unwrap();
    let state = source.save_devices().unwrap();
    copy_ram(&source, &destination);
    let (third, _) = machine(disks.with(config(1, &disks.dir.path().join("third"))));
    let error = destination.load_devices(&state).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    assert!(Guest::resume(&*source, Activity::Running).is_err());
    assert_eq!(source.run_state(), RunState::Paused);
    drop(third);
    source.resume().unwrap();
    wait_for_progress(&source);
}

#[test]
fn a_destination_without_the_disk_is_refused() {
    if !kvm() {
        return;
    }
    let disks = Disks::new();
    let source = disks.source();
    let (destination, _) = machine(incoming(1, &disks.dir.path().join("there")));
    let error = destination.check_description(&source.describe().unwrap());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("--disk path=IMAGE,id=root"), "{error}");
    let state = {
        Guest::pause(&*source, PATIENCE).unwrap();
        source.save_devices().unwrap()
    };
    let error = destination.load_devices(&state).unwrap_err().to_string();
    assert!(error.contains("vmferry/virtio-blk"), "{error}");
}
