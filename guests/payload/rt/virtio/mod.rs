//! Virtio devices on the virtio-mmio transport, driven from ring 3 without interrupts: the driver looks into the used
//! ring when it likes. Virtio 1.2, sections 2.7 and 4.2.

pub mod queue;
pub mod registers;
