//! The devices of a machine and their threads.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use kvm_ioctls::VmFd;

use super::balloon::OnChange;
use super::console::InputGate;
use super::slot::Slot;
use super::{
    Announcement, Announcer, Balloon, BalloonPort, Block, Console, Disk, DiskIo, Kicks, Kind,
    Network, Rng, VirtioDevice, check_raw, event, signal,
};
use crate::config::{Access, ImageFormat, MachineConfig, SerialConfig};
use crate::devices::{BackendEvents, MmioRange};
use crate::error::MachineError;
use crate::layout::{VIRTIO_MMIO_IRQS, VIRTIO_MMIO_SLOT, virtio_slot};
use crate::memory::GuestMemory;
use crate::state::virtio::DeviceDescription;
use crate::vcpu::{Gate, Pass, Wanted};

/// All virtio devices of a machine, by slot, each with its thread. Dropping it ends the threads.
pub(crate) struct Devices {
    slots: Vec<Arc<Slot>>,
    disks: Vec<Arc<Disk>>,
    announcers: Vec<Announcer>,
    disk_io: Vec<DiskIo>,
    console: Option<InputGate>,
    balloon: Option<BalloonPort>,
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Devices {
    /// Builds the devices that `config` asks for and starts their threads, which wait for [`go`](Self::go).
    /// `events` learns what the user of the console's back end does, `on_balloon` how much memory the guest has left.
    pub fn new(
        config: &MachineConfig,
        memory: &GuestMemory,
        events: BackendEvents,
        on_balloon: OnChange,
    ) -> Result<Self, MachineError> {
        let mut slots: Vec<Arc<Slot>> = Vec::new();
        let (mut disks, mut disk_io) = (Vec::new(), Vec::new());
        let mut add = |device: Box<dyn VirtioDevice>, kicks| {
            // Slots that share an interrupt share its event: KVM would lose one of two edges that come from two events at
            // the same moment.
            let line = match slots.len().checked_sub(VIRTIO_MMIO_IRQS as usize) {
                Some(first) => Slot::line(&slots[first]).clone(),
                None => Arc::new(event()?),
            };
            let slot = Arc::new(Slot::new(device, kicks, line, memory.clone())?);
            slots.push(slot.clone());
            Ok::<_, MachineError>(slot)
        };
        for (disk, id) in config.disks.iter().zip(config.disk_ids()) {
            // A guest that arrives uses its image already, as a raw one.
            if disk.format == ImageFormat::Unsaid && !config.incoming {
                check_raw(&id, &disk.path)?;
            }
            let disk = Arc::new(Disk::open(disk, id)?);
            let kicks = Kicks::new(Block::QUEUES)?;
            let device = Block::new(disk.clone(), &kicks);
            disk_io.push(device.io());
            add(Box::new(device), kicks)?;
            disks.push(disk);
        }
        check_images(&disks, config)?;
        let mut announcers = Vec::new();
        for nic in config.nics() {
            let device = Network::new(nic.backend, &nic.id, nic.mac)?;
            announcers.push(device.announcer());
            add(Box::new(device), Kicks::new(Network::QUEUES)?)?;
        }
        let mut console = None;
        if let Some(port) = &config.console {
            let kicks = Kicks::new(Console::QUEUES)?;
            let (device, input) = Console::new(port, &kicks, events)?;
            add(Box::new(device), kicks)?;
            console = Some(input);
        }
        if config.rng {
            add(Box::new(Rng), Kicks::new(Rng::QUEUES)?)?;
        }
        let mut balloon = None;
        if let Some(wanted) = config.balloon {
            let device = Balloon::new(wanted, config.memory, on_balloon);
            let port = device.port();
            let slot = add(Box::new(device), Kicks::new(Balloon::queues(wanted))?)?;
            balloon = Some(port(slot));
        }
        let gate = Arc::new(Gate::new(slots.len()));
        let mut devices = Devices {
            slots,
            disks,
            announcers,
            disk_io,
            console,
            balloon,
            gate,
            threads: Vec::new(),
        };
        for (number, slot) in devices.slots.iter().enumerate() {
            let name = format!("{} {number}", slot.kind().name());
            let (slot, gate) = (slot.clone(), devices.gate.clone());
            let thread = thread::Builder::new()
                .name(name.clone())
                .spawn(move || run(&slot, &gate))
                .map_err(|source| MachineError::Os {
                    action: format!("start the thread of device {name}"),
                    source,
                })?;
            devices.threads.push(thread);
        }
        devices.wait_until_held();
        Ok(devices)
    }

    /// Connects every slot with KVM.
    pub fn connect(&self, vm: &VmFd) -> Result<(), MachineError> {
        (0..)
            .zip(&self.slots)
            .try_for_each(|(number, slot)| slot.connect(vm, number))
    }

    /// Where the slots' registers are.
    pub fn ranges(&self) -> impl Iterator<Item = MmioRange> {
        (0..).zip(&self.slots).map(|(number, slot)| MmioRange {
            start: virtio_slot(number),
            len: VIRTIO_MMIO_SLOT,
            device: slot.clone(),
        })
    }

    /// The devices, as far as the guest can tell.
    pub fn describe(&self, config: &MachineConfig) -> Vec<DeviceDescription> {
        let (mut disks, mut nics) = (self.disks.iter(), config.nics());
        let describe = |slot: &Arc<Slot>| match slot.kind() {
            Kind::Block => {
                let disk = disks.next().expect("every block device has a disk");
                DeviceDescription::Block {
                    id: disk.id().to_owned(),
                    sectors: disk.sectors(),
                    block_size: disk.block_size(),
                    access: disk.access(),
                }
            }
            Kind::Network => {
                let nic = nics.next().expect("every network device has its interface");
                DeviceDescription::Network {
                    mac: nic.mac,
                    offloads: nic.backend.offloads(),
                }
            }
            Kind::Console => DeviceDescription::Console,
            Kind::Rng => DeviceDescription::Rng,
            Kind::Balloon => {
                DeviceDescription::Balloon(config.balloon.expect("a balloon was asked for"))
            }
        };
        self.slots.iter().map(describe).collect()
    }

    /// The disks, in their order.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// The disk of this name, and its slot.
    pub fn disk(&self, id: &str) -> Option<(&Disk, &Slot)> {
        let blocks = self.slots.iter().filter(|slot| slot.kind() == Kind::Block);
        let mut disks = self.disks.iter().zip(blocks);
        disks
            .find(|(disk, _)| disk.id() == id)
            .map(|(disk, slot)| (&**disk, &**slot))
    }

    /// Has interface number `place` tell its network where it is, as soon as the devices work.
    pub fn announce(&self, place: usize, announcement: Announcement) {
        self.announcers[place].start(announcement);
    }

    /// The disks and how their requests reach the host.
    pub fn disks_and_io(&self) -> impl Iterator<Item = (&Disk, DiskIo)> {
        let disks = self.disks.iter().map(Arc::as_ref);
        disks.zip(self.disk_io.iter().copied())
    }

    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&BalloonPort> {
        self.balloon.as_ref()
    }

    /// The devices, by slot.
    pub fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// Lets the devices serve their queues.
    pub fn go(&self) {
        self.gate.set(Wanted::Run);
        // A notification may have been made elsewhere, or been left unserved when the devices were held.
        for slot in &self.slots {
            slot.kick_all();
        }
        if let Some(console) = &self.console {
            console.accept_input(true);
        }
    }

    /// Asks the devices to come to a stand; each finishes at most the requests that it has begun.
    pub fn ask_to_hold(&self) {
        if let Some(console) = &self.console {
            console.accept_input(false);
        }
        self.gate.set(Wanted::Hold);
        self.ring();
    }

    /// Waits until every device that was asked to stands still: nothing is in flight, and none of them touches
    /// guest memory.
    pub fn wait_until_held(&self) {
        self.gate.wait_until_held();
    }

    /// The same, until `end` at the latest. Whether every device stands still.
    pub fn held_by(&self, end: Instant) -> bool {
        self.gate.held_by(end)
    }

    /// The devices that have requests in flight, and how many, for humans.
    pub fn busy(&self) -> String {
        let mut disks = self.disks.iter();
        let busy = self.slots.iter().filter_map(|slot| {
            let name = match slot.kind() {
                Kind::Block => {
                    let disk = disks.next().expect("every block device has a disk");
                    format!("disk '{}'", disk.id())
                }
                kind => kind.name().to_owned(),
            };
            let number = slot.in_flight_now();
            (number > 0).then(|| format!("{name} ({number})"))
        });
        busy.collect::<Vec<_>>().join(", ")
    }

    fn ring(&self) {
        for slot in &self.slots {
            signal(slot.bell());
        }
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.gate.set(Wanted::Quit);
        self.ring();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("the thread of a virtio device has panicked");
            }
        }
    }
}

/// Refuses an image that is given twice, unless it is only read, and output of the guest that would be written over one.
fn check_images(disks: &[Arc<Disk>], config: &MachineConfig) -> Result<(), MachineError> {
    for (place, disk) in disks.iter().enumerate() {
        let only_read = |other: &Disk| [disk.access(), other.access()] == [Access::ReadOnly; 2];
        let twin = disks[..place]
            .iter()
            .find(|other| other.is_at(disk.path()) && !only_read(other));
        if let Some(twin) = twin {
            return Err(MachineError::Config(format!(
                "the disks '{}' ({}) and '{}' ({}) are one image: give the guest each image once, or let it only read \
                 them (ro=on)",
                twin.id(),
                twin.path().display(),
                disk.id(),
                disk.path().display()
            )));
        }
        for port in [Some(&config.serial), config.console.as_ref()] {
            if let Some(SerialConfig::File(path)) = port
                && disk.is_at(path)
            {
                return Err(MachineError::Config(format!(
                    "the guest's output cannot go to {}: that is its disk '{}'",
                    path.display(),
                    disk.id()
                )));
            }
        }
    }
    Ok(())
}

/// The life of a device's thread.
pub(super) fn run(slot: &Slot, gate: &Gate) {
    let kicks = slot.kicks().all();
    let entry = |fd: i32, events| libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    let mut fds = vec![entry(slot.bell().as_raw_fd(), libc::POLLIN)];
    let kick_fds = kicks.iter().map(|kick| kick.as_raw_fd());
    fds.extend(kick_fds.map(|fd| entry(fd, libc::POLLIN)));
    let own = fds.len();
    loop {
        // What is in flight is given back before the device stands still, or ends: guest memory is the host's until then.
        if !gate.is_open() && slot.in_flight() == 0 && gate.pass(|| {}) == Pass::Quit {
            return;
        }
        let watches = slot.watches();
        fds.truncate(own);
        fds.extend(watches.iter().map(|watch| entry(watch.fd, watch.events)));
        // SAFETY: `fds` is an array of that many entries, which poll fills in.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            tracing::debug!(%error, "a device's wait was interrupted");
            continue;
        }
        if fds[0].revents != 0 {
            // Never blocks; the counter's value means nothing.
            let _ = slot.bell().read();
        }
        for (queue, kick) in kicks.iter().enumerate() {
            if fds[queue + 1].revents != 0 {
                let _ = kick.read();
                slot.serve(queue, gate);
            }
        }
        for (watch, fd) in watches.iter().zip(&fds[own..]) {
            if fd.revents != 0 {
                slot.serve(watch.queue, gate);
            }
        }
    }
}
