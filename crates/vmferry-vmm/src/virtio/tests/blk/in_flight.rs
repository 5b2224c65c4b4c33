//! Requests that the host has while nobody looks: many at a time, and those that end late.

use std::io::{PipeWriter, Write, pipe};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;

use super::*;
use crate::virtio::{signal, threads};

/// How far the buffers of two requests are apart, and what is where in them.
const AREA: u64 = 0x4000;
const AREA_STATUS: u64 = 0x100;
const AREA_TABLE: u64 = 0x200;
const AREA_DATA: u64 = 0x1000;

/// Where request `number` has its data.
fn data_of(number: u16) -> u64 {
    BUFFERS + u64::from(number) * AREA + AREA_DATA
}

/// Writes a request with buffers of its own, without offering it. Its head is its number.
fn prepare(bench: &Bench, number: u16, kind: u32, sector: u64, len: u32) {
    let area = BUFFERS + u64::from(number) * AREA;
    let mut header = [kind.to_le_bytes(), [0; 4]].concat();
    header.extend(sector.to_le_bytes());
    bench.put(area, &header);
    bench.put(area + AREA_STATUS, &[0xee]);
    let to_guest = if kind == blk::VIRTIO_BLK_T_IN {
        WRITE
    } else {
        0
    };
    let table = [
        Descriptor::new(area, 16, NEXT, 1),
        Descriptor::new(area + AREA_DATA, len, NEXT | to_guest, 2),
        Descriptor::new(area + AREA_STATUS, 1, WRITE, 0),
    ];
    for (index, descriptor) in (0..).zip(table) {
        let at = GuestAddress(area + AREA_TABLE + 16 * index);
        bench.memory.write_obj(descriptor, at).unwrap();
    }
    let indirect = VRING_DESC_F_INDIRECT as u16;
    bench.store(
        0,
        number,
        Descriptor::new(area + AREA_TABLE, 48, indirect, 0),
    );
}

/// Offers such a request.
fn post(bench: &Bench, number: u16, kind: u32, sector: u64, len: u32) {
    prepare(bench, number, kind, sector, len);
    bench.publish(0, number);
}

fn status_of(bench: &Bench, number: u16) -> u8 {
    let at = BUFFERS + u64::from(number) * AREA + AREA_STATUS;
    bench.bytes(at, 1)[0]
}

/// A started device whose reads wait for what is written into a pipe; none if that needs an engine that is not here.
fn slow(ram: &GuestRam) -> Option<(Bench, PipeWriter)> {
    slow_with(ram, SECTORS, Caching::Cached)
}

fn slow_with(ram: &GuestRam, sectors: u64, caching: Caching) -> Option<(Bench, PipeWriter)> {
    has_ring().then(|| {
        let (reader, writer) = pipe().unwrap();
        let disk = Disk::of_pipe(OwnedFd::from(reader).into(), sectors, caching);
        let bench = bench(ram, disk, DiskIo::IoUring);
        bench.start(FLUSH, 1);
        (bench, writer)
    })
}

/// Offers a read of a sector and has it begun.
fn begin_read(bench: &Bench) {
    post(bench, 0, blk::VIRTIO_BLK_T_IN, 0, 512);
    bench.serve(0);
    assert_eq!(bench.slot.in_flight(), 1);
}

#[test]
fn many_at_a_time_get_what_is_theirs() {
    for caching in [Caching::Cached, Caching::Direct] {
        with_each(|io| {
            let (image, ram) = (Image::new(), ram());
            let config = DiskConfig {
                caching,
                ..image.config()
            };
            let disk = match Disk::open(&config, "root".into()) {
                Ok(disk) => disk,
                Err(error) => {
                    eprintln!("SKIPPED: {caching:?}: {error}");
                    return;
                }
            };
            let bench = bench(&ram, disk, io);
            bench.start(FLUSH, 1);
            let mut model = fs::read(image.path()).unwrap();
            for round in 0..50 {
                // Each has sixteen sectors to itself, of which it moves eight.
                let place = |number: u16| {
                    let sector = u64::from(number) * 16 + 8 * (round % 2);
                    (sector, sector as usize * 512..sector as usize * 512 + 4096)
                };
                let writes = |number: u16| (u64::from(number) + round) % 3 == 0;
                for number in 0..SIZE {
                    let (sector, range) = place(number);
                    if writes(number) {
                        model[range.clone()].fill((round * 7 + u64::from(number)) as u8);
                        bench.put(data_of(number), &model[range]);
                        post(&bench, number, blk::VIRTIO_BLK_T_OUT, sector, 4096);
                    } else {
                        bench.put(data_of(number), &[0xee; 4096]);
                        post(&bench, number, blk::VIRTIO_BLK_T_IN, sector, 4096);
                    }
                }
                bench.serve_all(0);
                for number in 0..SIZE {
                    let (_, range) = place(number);
                    assert_eq!(status_of(&bench, number), OK);
                    assert_eq!(bench.bytes(data_of(number), 4096), model[range]);
                }
            }
            assert_eq!(bench.used(0).0, 50 * SIZE);
            assert!(fs::read(image.path()).unwrap() == model);
        });
    }
}

/// Law 1: a mark made when the read began would be gone by the time the page changes.
#[test]
fn what_is_read_is_marked_when_it_is_there() {
    let ram = ram();
    let Some((bench, mut pipe)) = slow(&ram) else {
        return;
    };
    begin_read(&bench);
    written(&ram);
    // One that ends early is continued.
    pipe.write_all(&[1; 200]).unwrap();
    bench.wait_for_kick(0);
    bench.serve(0);
    assert_eq!((bench.slot.in_flight(), bench.used(0).0), (1, 0));
    assert!(!has(&written(&ram), data_of(0)));

    pipe.write_all(&[2; 312]).unwrap();
    bench.wait_for_kick(0);
    bench.serve(0);
    assert_eq!((bench.slot.in_flight(), bench.used(0)), (0, (1, 513)));
    assert!(has(&written(&ram), data_of(0)));
    assert_eq!(status_of(&bench, 0), OK);
    let data = bench.bytes(data_of(0), 512);
    assert_eq!(data, [&[1; 200][..], &[2; 312]].concat());

    // One that fails may have changed something.
    begin_read(&bench);
    pipe.write_all(&[3; 100]).unwrap();
    bench.wait_for_kick(0);
    bench.serve(0);
    written(&ram);
    drop(pipe);
    bench.serve_all(0);
    assert_eq!(status_of(&bench, 0), ERROR);
    assert!(has(&written(&ram), data_of(0)));
}

#[test]
fn a_name_that_is_given_twice_confuses_nobody() {
    let ram = ram();
    let Some((bench, mut pipe)) = slow(&ram) else {
        return;
    };
    prepare(&bench, 3, blk::VIRTIO_BLK_T_IN, 0, 512);
    bench.publish(0, 3);
    bench.publish(0, 3);
    bench.serve(0);
    assert_eq!(bench.slot.in_flight(), 2);
    for number in [1, 2] {
        pipe.write_all(&[number; 512]).unwrap();
        bench.wait_for_kick(0);
        bench.serve(0);
        assert_eq!(bench.used(0), (number.into(), 513));
        assert_eq!(bench.bytes(data_of(3), 512), [number; 512]);
    }
    assert_eq!(bench.status(), RUNNING);
}

#[test]
fn a_driver_that_offers_too_many_waits() {
    /// The device's queue size, of which the tests' driver uses less.
    const MOST: u16 = 256;
    let ram = ram();
    let Some((bench, mut pipe)) = slow(&ram) else {
        return;
    };
    let rounds = MOST / SIZE + 1;
    for round in 1..=rounds {
        (0..SIZE).for_each(|number| post(&bench, number, blk::VIRTIO_BLK_T_IN, 0, 512));
        bench.serve(0);
        let expected = MOST.min(round * SIZE);
        assert_eq!(bench.slot.in_flight(), usize::from(expected));
    }
    let content = vec![5; usize::from(rounds * SIZE) * 512];
    let writer = thread::spawn(move || pipe.write_all(&content));
    bench.serve_all(0);
    writer.join().unwrap().unwrap();
    assert_eq!(bench.used(0).0, rounds * SIZE);
    assert_eq!(bench.status(), RUNNING);
}

/// Requests whose memory does not suit direct I/O take memory of the host.
#[test]
fn a_driver_that_wants_much_memory_waits() {
    const LEN: u32 = 4 << 20;
    const MOST: usize = (64 << 20) / LEN as usize;
    let ram = ram();
    let sectors = u64::from(LEN) / 512;
    let Some((bench, pipe)) = slow_with(&ram, sectors, Caching::Direct) else {
        return;
    };
    let offer = |number| {
        prepare(&bench, number, blk::VIRTIO_BLK_T_IN, 0, LEN);
        // All into one buffer, which is not aligned.
        let table = BUFFERS + u64::from(number) * AREA + AREA_TABLE;
        let data = Descriptor::new(0x80_0001, LEN, NEXT | WRITE, 2);
        bench
            .memory
            .write_obj(data, GuestAddress(table + 16))
            .unwrap();
        bench.publish(0, number);
    };
    for _ in 0..2 {
        (0..SIZE).for_each(offer);
        bench.serve(0);
        assert_eq!(bench.slot.in_flight(), MOST);
    }
    drop(pipe);
    bench.serve_all(0);
    assert_eq!((bench.used(0).0, bench.status()), (2 * SIZE, RUNNING));
}

/// However a device comes to its end, the host is done with guest memory before it.
#[test]
fn the_end_of_a_device_waits_for_the_host() {
    type End = fn(&Bench);
    let ends: [(&str, End); 4] = [
        ("reset", |bench| bench.set_status(0)),
        ("failed", |bench| bench.set_status(0x80)),
        ("no queue", |bench| {
            bench.write(reg::VIRTIO_MMIO_QUEUE_READY, 0)
        }),
        ("broken", |bench| {
            bench.offer(0, &[(HEADER, 15, 0), (STATUS, 1, WRITE)]);
            bench.serve(0);
        }),
    ];
    for (name, end) in ends {
        let ram = ram();
        let Some((bench, pipe)) = slow(&ram) else {
            return;
        };
        begin_read(&bench);
        written(&ram);
        thread::scope(|scope| {
            // Closed here in any case: it ends what is in flight.
            let mut pipe = pipe;
            let ending = scope.spawn(|| end(&bench));
            thread::sleep(Duration::from_millis(50));
            assert!(!ending.is_finished(), "{name}");
            pipe.write_all(&[7; 512]).unwrap();
        });
        assert_eq!(bench.slot.in_flight(), 0, "{name}");
        assert_eq!(bench.used(0).0, 0, "{name}");
        assert!(has(&written(&ram), data_of(0)), "{name}");
        assert_eq!(bench.bytes(data_of(0), 512), [7; 512], "{name}");
    }
}

fn ask(bench: &Bench, wanted: Wanted) {
    bench.gate.set(wanted);
    signal(bench.slot.bell());
}

/// Ends the device's thread, however its test ends.
struct Ending<'a>(&'a Bench);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        ask(self.0, Wanted::Quit);
    }
}

#[test]
fn a_device_comes_to_the_gate_with_nothing_in_flight() {
    let ram = ram();
    let Some((bench, pipe)) = slow(&ram) else {
        return;
    };
    let soon = || Instant::now() + Duration::from_millis(100);
    let patiently = || Instant::now() + Duration::from_secs(20);
    let ask = |wanted| ask(&bench, wanted);
    begin_read(&bench);
    thread::scope(|scope| {
        let (mut pipe, _end) = (pipe, Ending(&bench));
        scope.spawn(|| threads::run(&bench.slot, &bench.gate));
        ask(Wanted::Hold);
        assert!(!bench.gate.held_by(soon()));
        assert_eq!(bench.slot.in_flight_now(), 1);
        // Whoever asked gives up, and asks again later.
        ask(Wanted::Run);
        post(&bench, 1, blk::VIRTIO_BLK_T_IN, 0, 512);
        bench.slot.kick_all();
        let end = patiently();
        while bench.slot.in_flight_now() < 2 {
            assert!(Instant::now() < end, "the second request is not taken");
            thread::sleep(Duration::from_millis(1));
        }
        ask(Wanted::Hold);
        pipe.write_all(&[1; 512]).unwrap();
        assert!(!bench.gate.held_by(soon()));
        pipe.write_all(&[2; 512]).unwrap();
        assert!(bench.gate.held_by(patiently()));
        assert_eq!((bench.slot.in_flight(), bench.used(0).0), (0, 2));
        // One that is offered now stays where it is.
        post(&bench, 0, blk::VIRTIO_BLK_T_IN, 0, 512);
        bench.slot.kick_all();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(bench.slot.in_flight(), 0);
    });
}
