//! A virtio-mmio slot: a transport with what KVM and the device's thread hold of it.

use std::sync::{Arc, Mutex, MutexGuard};

use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

use super::queue::Interrupt;
use super::transport::{After, SavedTransport, Transport};
use super::{Kicks, Kind, VirtioDevice, Watch, event, signal};
use crate::devices::{MmioDevice, WriteEffect};
use crate::error::{Attempt, MachineError};
use crate::layout::{VIRTIO_MMIO_IRQS, virtio_irq, virtio_slot};
use crate::memory::GuestMemory;
use crate::vcpu::Gate;

/// Where the device's configuration begins.
const CONFIG: u64 = reg::VIRTIO_MMIO_CONFIG as u64;

/// A slot with a device in it.
pub(crate) struct Slot {
    kind: Kind,
    transport: Mutex<Transport>,
    interrupt: Interrupt,
    kicks: Kicks,
    /// Has the device's thread look around.
    bell: EventFd,
}

impl Slot {
    /// Puts a device into a slot. `kicks` has an event for each of its queues; `line` raises its interrupt.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        kicks: Kicks,
        line: Arc<EventFd>,
        memory: GuestMemory,
    ) -> Result<Self, MachineError> {
        let transport = Transport::new(device, memory);
        Ok(Slot {
            kind: transport.kind(),
            transport: Mutex::new(transport),
            interrupt: Interrupt::new(line),
            kicks,
            bell: event()?,
        })
    }

    /// Has KVM signal the queues' events when slot `number` is notified, and listen to the slot's interrupt.
    pub fn connect(&self, vm: &VmFd, number: u32) -> Result<(), MachineError> {
        let notify = virtio_slot(number) + u64::from(reg::VIRTIO_MMIO_QUEUE_NOTIFY);
        for (queue, kick) in self.kicks.all().iter().enumerate() {
            vm.register_ioevent(kick, &IoEventAddress::Mmio(notify), queue as u32)
                .attempt("connect a virtio queue's notifications")?;
        }
        // Those beyond have the event of one of the first.
        if number < VIRTIO_MMIO_IRQS {
            vm.register_irqfd(self.interrupt.line(), virtio_irq(number))
                .attempt("connect a virtio device's interrupt")?;
        }
        Ok(())
    }

    /// The event that raises the slot's interrupt.
    pub fn line(&self) -> &Arc<EventFd> {
        self.interrupt.line()
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    pub fn kicks(&self) -> &Kicks {
        &self.kicks
    }

    pub fn transport(&self) -> MutexGuard<'_, Transport> {
        self.transport.lock().expect("a device does not panic")
    }

    /// Has the device's thread look at all queues.
    pub fn kick_all(&self) {
        for kick in self.kicks.all() {
            signal(kick);
        }
    }

    /// What the device's thread is to wait for beside the queues' kicks.
    pub fn watches(&self) -> Vec<Watch> {
        self.transport().watches()
    }

    /// Serves one queue's share. Called by the device's thread.
    pub fn serve(&self, queue: usize, gate: &Gate) {
        if self.transport().serve(queue, &self.interrupt, gate) {
            signal(&self.kicks.all()[queue]);
        }
    }

    /// How many requests the host still works on.
    pub fn in_flight(&self) -> usize {
        self.transport().in_flight()
    }

    /// The same for who must not wait for the device; one that is busy is at one request at least.
    pub fn in_flight_now(&self) -> usize {
        match self.transport.try_lock() {
            Ok(transport) => transport.in_flight(),
            Err(_) => 1,
        }
    }

    /// The device's configuration has changed.
    pub fn config_changed(&self) {
        self.interrupt.config();
    }

    /// As at power-on.
    pub fn reset(&self) {
        self.transport().reset(&self.interrupt);
    }

    pub fn save(&self) -> SavedTransport {
        self.transport().save(&self.interrupt)
    }

    pub fn load(&self, saved: &SavedTransport) -> Result<(), MachineError> {
        self.transport().load(saved, &self.interrupt)
    }

    fn write_register(&self, register: u32, value: u32) {
        match register {
            // KVM takes nearly all of these away before they come here.
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.all().get(value as usize) {
                    signal(kick);
                }
            }
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            _ => match self.transport().write(register, value, &self.interrupt) {
                After::Nothing => {}
                After::Start => self.kick_all(),
            },
        }
    }
}

impl MmioDevice for Slot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let config = self.transport().config();
            let there = config.get(offset as usize..).unwrap_or_default();
            let len = data.len().min(there.len());
            data[..len].copy_from_slice(&there[..len]);
            return;
        }
        let register = offset as u32;
        if data.len() != 4 || !register.is_multiple_of(4) {
            tracing::debug!(register, len = data.len(), "registers have 32 bits");
            return;
        }
        let value = match register {
            // At every interrupt: a device that is busy must not delay it.
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            _ => self.transport().read(register),
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&self, offset: u64, data: &[u8]) -> WriteEffect {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.transport().write_config(offset as usize, data);
            return WriteEffect::Nothing;
        }
        match <[u8; 4]>::try_from(data) {
            Ok(value) if offset.is_multiple_of(4) => {
                self.write_register(offset as u32, u32::from_le_bytes(value));
            }
            _ => tracing::debug!(offset, ?data, "write to no virtio register"),
        }
        WriteEffect::Nothing
    }
}
