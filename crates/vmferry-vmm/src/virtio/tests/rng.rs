//! virtio-rng, and what all devices have in common: rings, interrupts, the dirty log.

use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::virtio::Rng;

fn bench(ram: &GuestRam) -> Bench {
    Bench::new(ram, Box::new(Rng), Kicks::new(Rng::QUEUES).unwrap())
}

#[test]
fn the_guest_gets_random_numbers() {
    let ram = ram();
    let bench = bench(&ram);
    bench.start(0, 1);
    bench.offer(0, &[(BUFFERS, 32, WRITE), (BUFFERS + 0x2000, 32, WRITE)]);
    bench.serve(0);
    assert_eq!(bench.used(0), (1, 64));
    assert_ne!(bench.bytes(BUFFERS, 32), [0; 32]);
    assert_ne!(bench.bytes(BUFFERS, 32), bench.bytes(BUFFERS + 0x2000, 32));
    assert_eq!(bench.interrupt_status(), 1);
    bench.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(bench.interrupt_status(), 0);
}

#[test]
fn every_byte_written_shows_in_the_dirty_log() {
    let ram = ram();
    let bench = bench(&ram);
    bench.start(0, 1);
    // Over a page's edge, and one page that is not touched between two that are.
    bench.offer(
        0,
        &[(BUFFERS + 4090, 10, WRITE), (BUFFERS + 0x3000, 1, WRITE)],
    );
    written(&ram);
    bench.serve(0);
    let pages = written(&ram);
    let used = rings(0).used.raw_value();
    for address in [BUFFERS, BUFFERS + 0x1000, BUFFERS + 0x3000, used] {
        assert!(has(&pages, address), "{address:#x} in {pages:x?}");
    }
    assert!(!has(&pages, BUFFERS + 0x2000));
    bench.serve(0);
    // With nothing to do, the device only says that it wants to be notified.
    assert!(
        written(&ram)
            .iter()
            .all(|page| *page == used / PAGE_SIZE as u64)
    );
}

#[test]
fn a_driver_that_asks_for_fewer_interrupts_gets_fewer() {
    let ram = ram();
    let bench = bench(&ram);
    bench.start(1 << VIRTIO_RING_F_EVENT_IDX, 1);
    // used_event, behind the available ring's entries: interrupt when the third is used.
    let used_event = rings(0).available.unchecked_add(4 + 2 * u64::from(SIZE));
    bench.memory.write_obj(2u16, used_event).unwrap();
    for count in 1..=3 {
        bench.offer(0, &[(BUFFERS, 8, WRITE)]);
        bench.serve(0);
        assert_eq!(bench.used(0).0, count);
        assert_eq!(bench.interrupt_status(), u32::from(count == 3));
    }
}

#[test]
fn a_held_device_leaves_requests_in_their_ring() {
    let ram = ram();
    let bench = bench(&ram);
    bench.start(0, 1);
    bench.offer(0, &[(BUFFERS, 8, WRITE)]);
    bench.gate.set(Wanted::Hold);
    written(&ram);
    bench.serve(0);
    assert_eq!(bench.used(0).0, 0);
    assert!(written(&ram).is_empty(), "a held device wrote");

    // Its state goes to another slot with the same memory, which serves what was left.
    let saved = bench.slot.save();
    let there = self::bench(&ram);
    there.slot.load(&saved).unwrap();
    assert_eq!(there.slot.save(), saved);
    assert_eq!(there.status(), RUNNING);
    there.serve(0);
    assert_eq!(there.used(0), (1, 8));
    there.offer(0, &[(BUFFERS, 9, WRITE)]);
    there.serve(0);
    assert_eq!(there.used(0), (2, 9));
}

#[test]
fn a_busy_queue_leaves_others_a_turn() {
    let ram = ram();
    let bench = bench(&ram);
    bench.start(0, 1);
    for _ in 0..SIZE {
        bench.offer(0, &[(BUFFERS, 8, WRITE)]);
    }
    let kick = &bench.slot.kicks().all()[0];
    kick.read().unwrap();
    bench.serve(0);
    assert_eq!(bench.used(0).0, SIZE);
    assert_eq!(kick.read().unwrap(), 1, "it has to look once more");
    bench.serve(0);
    assert!(kick.read().is_err());
}

#[test]
fn threads_serve_stand_still_and_go_on() {
    use crate::virtio::Devices;
    let ram = ram();
    let config = crate::config::tests::config();
    let config = crate::MachineConfig {
        rng: true,
        console: Some(crate::SerialConfig::Null),
        ..config
    };
    let devices = Devices::new(&config, &ram.memory, Box::new(|| {}), Box::new(drop)).unwrap();
    let bench = Bench {
        memory: ram.memory.clone(),
        slot: devices.slots()[1].clone(),
        gate: Gate::new(0),
    };
    assert_eq!(devices.slots()[1].kind(), crate::virtio::Kind::Rng);
    bench.start(0, 1);
    let wait_for = |count| {
        let start = Instant::now();
        while bench.used(0).0 != count {
            assert!(start.elapsed() < Duration::from_secs(10), "not served");
            std::thread::yield_now();
        }
    };
    let ask = || {
        bench.offer(0, &[(BUFFERS, 8, WRITE)]);
        bench.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    };
    ask();
    assert_eq!(bench.used(0).0, 0, "it waits for the machine");
    for round in 0..50 {
        devices.go();
        wait_for(2 * round + 1);
        ask();
        wait_for(2 * round + 2);
        devices.ask_to_hold();
        devices.wait_until_held();
        ask();
        assert_eq!(bench.used(0).0, 2 * round + 2);
    }
    // Notifications of queues that are not there are ignored.
    bench.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 7);
}
