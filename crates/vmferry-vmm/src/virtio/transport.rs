//! The registers of a virtio-mmio slot, and the life of the device behind them.
//!
//! ```text
//! Reset -> Acknowledged -> Driver -> FeaturesOk -> Running     the driver writes the status register
//!   ^                                                 |
//!   +------------- 0 is written, or the machine is reset
//! ```
//!
//! A device whose driver breaks the rules is [`Health::Broken`] until it is reset: its status says
//! DEVICE_NEEDS_RESET, and it serves nothing.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};

use super::chain::Broken;
use super::queue::{Interrupt, Requests, SavedQueue};
use super::{Kind, VirtioDevice, Watch};
use crate::error::MachineError;
use crate::memory::GuestMemory;
use crate::vcpu::Gate;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "VMFR"
const VENDOR: u32 = 0x5246_4d56;

/// Features of the transport and the rings.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// How far the driver has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Stage {
    Reset,
    Acknowledged,
    Driver,
    FeaturesOk,
    Running,
    /// The driver has given up.
    Failed,
}

impl Stage {
    fn bits(self) -> u32 {
        const ACKNOWLEDGED: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
        const DRIVER: u32 = ACKNOWLEDGED | VIRTIO_CONFIG_S_DRIVER;
        const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
        match self {
            Stage::Reset => 0,
            Stage::Acknowledged => ACKNOWLEDGED,
            Stage::Driver => DRIVER,
            Stage::FeaturesOk => FEATURES_OK,
            Stage::Running => FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK,
            Stage::Failed => VIRTIO_CONFIG_S_FAILED,
        }
    }

    /// The stage that a driver asks for.
    fn wanted(status: u32) -> Option<Stage> {
        if status & VIRTIO_CONFIG_S_FAILED != 0 {
            return Some(Stage::Failed);
        }
        let stages = [
            Stage::Reset,
            Stage::Acknowledged,
            Stage::Driver,
            Stage::FeaturesOk,
            Stage::Running,
        ];
        let status = status & !VIRTIO_CONFIG_S_NEEDS_RESET;
        stages.into_iter().find(|stage| stage.bits() == status)
    }
}

/// Whether the driver has kept to the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Health {
    Good,
    Broken,
}

/// What the driver has written to registers that only choose or collect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Latches {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
}

/// What the slot's other parts have to do after a register was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    /// The device's thread has to look at all queues.
    Start,
}

/// A device with its registers and queues.
pub(crate) struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    stage: Stage,
    health: Health,
    latches: Latches,
    queues: Vec<Queue>,
    /// Whether it has been told that a queue was broken.
    reported: bool,
}

/// A transport and its device in the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedTransport {
    stage: Stage,
    health: Health,
    latches: Latches,
    queues: Vec<SavedQueue>,
    interrupt_status: u32,
    device: Vec<u8>,
}

#[cfg(any(test, fuzzing))]
impl SavedTransport {
    /// The same with another state of the device itself.
    pub fn with_device(self, device: &[u8]) -> Self {
        SavedTransport {
            device: device.to_vec(),
            ..self
        }
    }
}

impl Transport {
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|size| Queue::new(*size).expect("devices choose sizes that can be"))
            .collect();
        Transport {
            device,
            memory,
            stage: Stage::Reset,
            health: Health::Good,
            latches: Latches::default(),
            queues,
            reported: false,
        }
    }

    pub fn kind(&self) -> Kind {
        self.device.kind()
    }

    /// The features that the driver can choose from.
    pub fn offered(&self) -> u64 {
        TRANSPORT_FEATURES | self.device.features()
    }

    /// Bytes of the device's configuration.
    pub fn config(&self) -> Vec<u8> {
        self.device.config()
    }

    /// Writes to the device's configuration.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// Reads a register other than those of the interrupt.
    pub fn read(&self, register: u32) -> u32 {
        let queue = self.queues.get(self.latches.queue_select as usize);
        match register {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.kind().id(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => {
                half(self.offered(), self.latches.device_features_select)
            }
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |q| q.max_size().into()),
            reg::VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(QueueT::ready).into(),
            reg::VIRTIO_MMIO_STATUS => self.status(),
            // There is no shared memory.
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.device.config_generation(),
            _ => {
                tracing::debug!(register, device = self.kind().name(), "no register to read");
                0
            }
        }
    }

    fn status(&self) -> u32 {
        let health = match self.health {
            Health::Good => 0,
            Health::Broken => VIRTIO_CONFIG_S_NEEDS_RESET,
        };
        self.stage.bits() | health
    }

    /// Writes a register other than those of the interrupt and of notifications.
    pub fn write(&mut self, register: u32, value: u32, interrupt: &Interrupt) -> After {
        let high = |value| (None, Some(value));
        let low = |value| (Some(value), None);
        match register {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.latches.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.latches.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.choose_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.latches.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NUM => {
                // What does not fit into 16 bits is as wrong as zero.
                self.set_up(|queue| queue.set_size(value.try_into().unwrap_or(0)));
            }
            reg::VIRTIO_MMIO_QUEUE_READY => self.set_ready(value & 1 == 1, interrupt),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW | reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                let is_low = register == reg::VIRTIO_MMIO_QUEUE_DESC_LOW;
                let (low, high) = if is_low { low(value) } else { high(value) };
                self.set_up(|queue| queue.set_desc_table_address(low, high));
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW | reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                let is_low = register == reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW;
                let (low, high) = if is_low { low(value) } else { high(value) };
                self.set_up(|queue| queue.set_avail_ring_address(low, high));
            }
            reg::VIRTIO_MMIO_QUEUE_USED_LOW | reg::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                let is_low = register == reg::VIRTIO_MMIO_QUEUE_USED_LOW;
                let (low, high) = if is_low { low(value) } else { high(value) };
                self.set_up(|queue| queue.set_used_ring_address(low, high));
            }
            reg::VIRTIO_MMIO_STATUS => return self.set_status(value, interrupt),
            // No shared memory to choose.
            reg::VIRTIO_MMIO_SHM_SEL => {}
            _ => {
                let device = self.kind().name();
                tracing::debug!(register, value, device, "no register to write");
            }
        }
        After::Nothing
    }

    fn choose_features(&mut self, value: u32) {
        if self.stage != Stage::Driver {
            let device = self.kind().name();
            tracing::warn!(device, "the driver chooses features at the wrong time");
            return;
        }
        let (value, features) = (u64::from(value), &mut self.latches.driver_features);
        match self.latches.driver_features_select {
            0 => *features = *features >> 32 << 32 | value,
            1 => *features = *features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// Lets `change` change the queue that the driver has chosen, if it may be changed now.
    fn set_up(&mut self, change: impl FnOnce(&mut Queue)) {
        let (stage, device) = (self.stage, self.kind().name());
        match self.queues.get_mut(self.latches.queue_select as usize) {
            Some(queue) if stage == Stage::FeaturesOk && !queue.ready() => change(queue),
            _ => tracing::warn!(
                device,
                queue = self.latches.queue_select,
                "the driver sets up a queue at the wrong time, or one that is not there"
            ),
        }
    }

    fn set_ready(&mut self, ready: bool, interrupt: &Interrupt) {
        let index = self.latches.queue_select as usize;
        if !ready {
            if let Some(queue) = self.queues.get_mut(index) {
                queue.set_ready(false);
                self.device.abandon(&self.memory);
            }
            return;
        }
        self.set_up(|queue| queue.set_ready(true));
        let queue = self.queues.get(index);
        if queue.is_some_and(|queue| queue.ready() && !queue.is_valid(&self.memory)) {
            self.queues[index].set_ready(false);
            self.break_down(&Broken::NoRing(index), interrupt);
        }
    }

    fn set_status(&mut self, status: u32, interrupt: &Interrupt) -> After {
        let Some(wanted) = Stage::wanted(status) else {
            tracing::warn!(
                device = self.kind().name(),
                status,
                "the driver asks for a status that is none"
            );
            return After::Nothing;
        };
        if wanted == Stage::Reset {
            self.reset(interrupt);
            return After::Nothing;
        }
        if wanted <= self.stage {
            return After::Nothing;
        }
        if self.stage < Stage::FeaturesOk && wanted >= Stage::FeaturesOk && wanted != Stage::Failed
        {
            let chosen = self.latches.driver_features;
            if let Err(why) = self.check_features(chosen) {
                // The driver sees that FEATURES_OK is not set, and gives up.
                let device = self.kind().name();
                tracing::warn!(device, "features {chosen:#x} are refused: {why}");
                self.stage = Stage::Driver;
                return After::Nothing;
            }
        }
        self.stage = wanted;
        if wanted == Stage::Failed {
            self.device.abandon(&self.memory);
        }
        if wanted != Stage::Running {
            return After::Nothing;
        }
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx(self.latches.driver_features));
        }
        self.device.activate(self.latches.driver_features);
        After::Start
    }

    fn check_features(&self, chosen: u64) -> Result<(), &'static str> {
        if chosen & !self.offered() != 0 {
            return Err("some were not offered");
        }
        if chosen & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err("VIRTIO_F_VERSION_1 must be among them");
        }
        Ok(())
    }

    /// Forgets the driver.
    pub fn reset(&mut self, interrupt: &Interrupt) {
        self.device.abandon(&self.memory);
        self.stage = Stage::Reset;
        self.health = Health::Good;
        self.latches = Latches::default();
        for queue in &mut self.queues {
            queue.reset();
        }
        interrupt.set_status(0);
        self.device.reset();
    }

    fn break_down(&mut self, why: &Broken, interrupt: &Interrupt) {
        let device = self.kind().name();
        let words = "a virtio device stops until its driver resets it";
        // A guest that goes on like that must not fill the host's log.
        match std::mem::replace(&mut self.reported, true) {
            false => tracing::error!(device, "{words}: {why}"),
            true => tracing::debug!(device, "{words}: {why}"),
        }
        self.health = Health::Broken;
        self.device.abandon(&self.memory);
        if self.stage == Stage::Running {
            interrupt.config();
        }
    }

    /// What the device's thread is to wait for beside the queues' kicks: nothing that it would not serve.
    pub fn watches(&self) -> Vec<Watch> {
        let mut watches = match self.is_at_work() {
            true => self.device.watches(),
            false => Vec::new(),
        };
        watches.retain(|watch| self.queues[watch.queue].ready());
        watches
    }

    /// Whether the driver uses the device, and may.
    fn is_at_work(&self) -> bool {
        self.stage == Stage::Running && self.health == Health::Good
    }

    /// Serves queue `index`. Whether it may hold more than its turn allowed.
    pub fn serve(&mut self, index: usize, interrupt: &Interrupt, gate: &Gate) -> bool {
        if !self.is_at_work() || !self.queues[index].ready() {
            return false;
        }
        let queue = &mut self.queues[index];
        let mut requests = Requests::new(&self.memory, queue, interrupt, gate);
        match self.device.serve(index, &mut requests) {
            Ok(()) => requests.more(),
            Err(why) => {
                self.break_down(&why, interrupt);
                false
            }
        }
    }

    /// How many requests the host still works on. None of a device that does not run.
    pub fn in_flight(&self) -> usize {
        self.device.in_flight()
    }

    pub fn save(&self, interrupt: &Interrupt) -> SavedTransport {
        SavedTransport {
            stage: self.stage,
            health: self.health,
            latches: self.latches,
            queues: self.queues.iter().map(SavedQueue::save).collect(),
            interrupt_status: interrupt.status(),
            device: self.device.save(),
        }
    }

    /// Puts everything back. Comes after the interrupt controllers: an interrupt may be raised at once.
    pub fn load(
        &mut self,
        saved: &SavedTransport,
        interrupt: &Interrupt,
    ) -> Result<(), MachineError> {
        let features = saved.latches.driver_features;
        if saved.stage >= Stage::FeaturesOk && saved.stage != Stage::Failed {
            self.check_features(features).map_err(|why| {
                MachineError::Misfit(format!(
                    "its driver uses features {features:#x}, of which {:#x} are here: {why}; use the same vmferry \
                     release on both hosts",
                    self.offered()
                ))
            })?;
        }
        if saved.queues.len() != self.queues.len() {
            return Err(MachineError::Misfit(format!(
                "it has {} queues, here it has {}",
                saved.queues.len(),
                self.queues.len()
            )));
        }
        let queues = saved
            .queues
            .iter()
            .zip(&self.queues)
            .map(|(saved, queue)| {
                saved.restore(queue.max_size(), event_idx(features), &self.memory)
            })
            .collect::<Result<_, _>>()?;
        self.device.reset();
        if saved.stage == Stage::Running {
            self.device.activate(features);
        }
        self.device.load(&saved.device)?;
        self.queues = queues;
        self.stage = saved.stage;
        self.health = saved.health;
        self.latches = saved.latches;
        interrupt.set_status(saved.interrupt_status);
        Ok(())
    }
}

fn event_idx(features: u64) -> bool {
    features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
}

/// The half of `features` that the driver has chosen to see.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
