//! The registers: what a driver finds, in which order it may do what, and what is saved.

use super::*;
use crate::error::MachineError;
use crate::virtio::{Rng, SavedTransport};

fn bench(ram: &GuestRam) -> Bench {
    Bench::new(ram, Box::new(Rng), Kicks::new(Rng::QUEUES).unwrap())
}

#[test]
fn a_driver_recognises_the_device() {
    let ram = ram();
    let bench = bench(&ram);
    assert_eq!(bench.read(0), 0x7472_6976);
    assert_eq!(bench.read(4), 2);
    assert_eq!(bench.read(8), 4);
    assert_eq!(bench.offered(), VERSION_1 | 3 << 28);
    assert_eq!(bench.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    bench.write(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(bench.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    assert_eq!(bench.read(reg::VIRTIO_MMIO_CONFIG_GENERATION), 0);
    assert_eq!(bench.read(reg::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    // Registers have 32 bits; the configuration of this device is empty.
    let mut byte = [0xff];
    bench.slot.read(0, &mut byte);
    assert_eq!(byte, [0]);
    let mut config = [0xff; 8];
    bench.slot.read(0x100, &mut config);
    assert_eq!(config, [0; 8]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let ram = ram();
    let bench = bench(&ram);
    for features in [0, VERSION_1 | 1, VERSION_1 | 1 << 63] {
        bench.negotiate(features);
        assert_eq!(bench.status(), DRIVER, "{features:#x}");
    }
    // Nor can they be slipped in later, or skipped.
    bench.negotiate(VERSION_1);
    bench.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    bench.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    bench.set_status(RUNNING);
    assert_eq!(bench.status(), RUNNING);
    bench.set_status(0);
    bench.set_status(RUNNING);
    assert_eq!(bench.status(), DRIVER, "without VERSION_1");
    // A legacy driver knows no FEATURES_OK.
    bench.set_status(0);
    bench.set_status(7);
    assert_eq!(bench.status(), 0);
}

#[test]
fn a_queue_is_set_up_once_and_at_the_right_time() {
    let ram = ram();
    let bench = bench(&ram);
    // Too early.
    bench.set_status(DRIVER);
    bench.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(bench.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    bench.start(0, 1);
    // Too late: requests still arrive through the old ring.
    bench.write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x8000);
    bench.write(reg::VIRTIO_MMIO_QUEUE_NUM, 4);
    bench.offer(0, &[(BUFFERS, 8, WRITE)]);
    bench.serve(0);
    assert_eq!(bench.used(0), (1, 8));

    bench.set_status(0);
    assert_eq!(bench.status(), 0);
    assert_eq!(bench.interrupt_status(), 0);
    assert_eq!(bench.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    bench.serve(0);
    assert_eq!(bench.used(0).0, 1, "a device without a driver served");
}

#[test]
fn rings_outside_ram_break_the_device_until_it_is_reset() {
    let ram = ram();
    let bench = bench(&ram);
    for low in [
        reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
        reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        reg::VIRTIO_MMIO_QUEUE_USED_LOW,
    ] {
        for address in [RAM - 16, RAM, 1 << 40, !0xf] {
            bench.negotiate(VERSION_1);
            bench.set_up(0);
            bench.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
            bench.write(low, address as u32);
            bench.write(low + 4, (address >> 32) as u32);
            bench.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
            assert_eq!(bench.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
            assert_eq!(bench.status(), FEATURES_OK | NEEDS_RESET, "{address:#x}");
            bench.set_status(RUNNING);
            bench.serve(0);
            assert_eq!(bench.status(), RUNNING | NEEDS_RESET);
        }
    }
    // Sizes that cannot be are ignored, and so are rings that are not aligned.
    bench.negotiate(VERSION_1);
    for size in [0, 3, 128, 0x1_0010] {
        bench.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
    }
    bench.start(0, 1);
}

#[test]
fn whatever_is_written_anywhere_gives_an_answer() {
    let ram = ram();
    let bench = bench(&ram);
    for start in [None, Some(0)] {
        if start.is_some() {
            bench.start(0, 1);
        }
        for offset in 0..0x200 {
            for value in [0u64, 1, 7, 0xff, u64::from(u32::MAX), u64::MAX] {
                for len in [1, 2, 4, 8] {
                    bench.slot.write(offset, &value.to_le_bytes()[..len]);
                    bench.slot.read(offset, &mut [0; 8][..len]);
                    bench.serve(0);
                }
            }
        }
    }
}

fn load(bench: &Bench, saved: &SavedTransport) -> Result<(), MachineError> {
    bench.slot.load(saved)
}

#[test]
fn the_state_survives_a_move_at_every_stage() {
    let ram = ram();
    let bench = bench(&ram);
    let there = self::bench(&ram);
    let moved = |stage: &str| {
        let saved = bench.slot.save();
        load(&there, &saved).unwrap();
        assert_eq!(there.slot.save(), saved, "{stage}");
        assert_eq!(there.status(), bench.status(), "{stage}");
        assert_eq!(there.interrupt_status(), bench.interrupt_status());
    };
    moved("reset");
    bench.set_status(ACKNOWLEDGED);
    moved("acknowledged");
    bench.negotiate(VERSION_1);
    bench.write(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
    moved("features ok");
    bench.start(0, 1);
    bench.offer(0, &[(BUFFERS, 8, WRITE)]);
    bench.serve(0);
    moved("running");
    assert_eq!(there.interrupt_status(), 1);
    bench.offer(0, &[(RAM, 8, WRITE)]);
    bench.serve(0);
    assert_eq!(bench.status(), RUNNING | NEEDS_RESET);
    moved("broken");
    bench.set_status(0x80);
    moved("failed");
}

#[test]
fn state_that_cannot_be_is_refused() {
    let ram = ram();
    let bench = bench(&ram);
    bench.start(0, 1);
    let saved = bench.slot.save();
    let refused = |bytes: &[u8]| match postcard::from_bytes::<SavedTransport>(bytes) {
        Ok(saved) => load(&bench, &saved).err().map(|e| e.to_string()),
        Err(error) => Some(error.to_string()),
    };
    let bytes = postcard::to_stdvec(&saved).unwrap();
    assert_eq!(refused(&bytes), None);
    // Whatever is in the stream, there is an answer, and what is accepted can be served.
    let mut refusals = 0;
    for at in 0..bytes.len() {
        for flip in [1, 0x10, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            refusals += usize::from(refused(&damaged).is_some());
            bench.serve(0);
        }
        assert!(refused(&bytes[..at]).is_some());
    }
    assert!(refusals > 10, "{refusals}");
}
