//! Devices, driven as a driver would: through their registers and through rings in guest memory.

use std::sync::Arc;

use virtio_bindings::virtio_mmio as reg;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};
use vmferry_dirty::PAGE_SIZE;

use super::Kicks;
use super::driver::*;
use crate::config::Backing;
use crate::devices::MmioDevice;
use crate::memory::GuestRam;
use crate::vcpu::{Gate, Wanted};

mod balloon;
mod blk;
mod console;
mod hostile;
mod net;
mod rng;
mod transport;

/// RAM of the tests' guests.
const RAM: u64 = 16 << 20;

fn ram() -> GuestRam {
    GuestRam::new(RAM, Backing::Private).unwrap()
}
