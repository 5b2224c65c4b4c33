//! Descriptors that no driver would write. Every one stops its device, and nothing else.

use virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;

use super::*;
use crate::virtio::Rng;

const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Where an indirect table is.
const TABLE: u64 = BUFFERS + 0x8000;

/// Lets a device meet what `prepare` puts into its rings, and expects it to stop; then a reset helps.
#[track_caller]
fn breaks(what: &str, prepare: impl FnOnce(&Bench)) {
    let ram = ram();
    let bench = Bench::new(&ram, Box::new(Rng), Kicks::new(Rng::QUEUES).unwrap());
    bench.start(0, 1);
    prepare(&bench);
    bench.serve(0);
    assert_eq!(bench.status(), RUNNING | NEEDS_RESET, "{what}");
    assert_eq!(bench.interrupt_status() & 2, 2, "{what}: nobody was told");
    let used = bench.used(0).0;
    bench.serve(0);
    bench.set_status(RUNNING);
    assert_eq!(bench.used(0).0, used, "{what}: it goes on");
    assert_eq!(bench.status(), RUNNING | NEEDS_RESET, "{what}");

    bench.put(RINGS, &[0; 0x3000]);
    bench.start(0, 1);
    bench.offer(0, &[(BUFFERS, 8, WRITE)]);
    bench.serve(0);
    assert_eq!(bench.used(0), (1, 8), "{what}: a reset does not help");
}

fn store(bench: &Bench, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
    bench.store(0, index, Descriptor::new(addr, len, flags, next));
}

/// Writes an indirect table and a descriptor that leads there.
fn indirect(bench: &Bench, len: u32, table: &[(u64, u32, u16, u16)]) {
    for (index, (addr, len, flags, next)) in table.iter().enumerate() {
        let at = GuestAddress(TABLE + 16 * index as u64);
        let descriptor = Descriptor::new(*addr, *len, *flags, *next);
        bench.memory.write_obj(descriptor, at).unwrap();
    }
    store(bench, 0, TABLE, len, INDIRECT, 0);
    bench.publish(0, 0);
}

#[test]
fn chains_without_an_end() {
    breaks("a descriptor that follows itself", |bench| {
        store(bench, 0, BUFFERS, 8, WRITE | NEXT, 0);
        bench.publish(0, 0);
    });
    breaks("a circle", |bench| {
        store(bench, 0, BUFFERS, 8, WRITE | NEXT, 1);
        store(bench, 1, BUFFERS, 8, WRITE | NEXT, 0);
        bench.publish(0, 0);
    });
    breaks("a chain that leads out of the table", |bench| {
        store(bench, 0, BUFFERS, 8, WRITE | NEXT, SIZE);
        bench.publish(0, 0);
    });
    breaks("a head outside the table", |bench| bench.publish(0, SIZE));
    breaks("a circle in an indirect table", |bench| {
        let entry = (BUFFERS, 8, WRITE | NEXT, 0);
        indirect(bench, 16, &[entry]);
    });
    breaks("a longer indirect table than the queue", |bench| {
        let entry = |n: u16| (BUFFERS, 8, WRITE | NEXT, n + 1);
        let table: Vec<_> = (0..100).map(entry).collect();
        indirect(bench, 1600, &table);
    });
}

#[test]
fn buffers_outside_ram() {
    for (addr, len) in [
        (RAM, 1),
        (RAM - 1, 2),
        (RAM - 8, u32::MAX),
        (0, u32::MAX),
        (1 << 32, 8),
        (u64::MAX, 1),
        (u64::MAX - 3, 8),
        (0xfeb0_0000, 4),
        (BUFFERS, 0),
    ] {
        breaks(&format!("{len} bytes at {addr:#x}"), |bench| {
            bench.offer(0, &[(addr, len, WRITE)]);
        });
        breaks(&format!("{len} bytes at {addr:#x}, later"), |bench| {
            bench.offer(0, &[(BUFFERS, 8, WRITE), (addr, len, WRITE)]);
        });
    }
    breaks("more than 4 GiB in all", |bench| {
        let entry = |n: u16| (0, (RAM - 1) as u32, WRITE | NEXT, n + 1);
        let table: Vec<_> = (0..300).map(entry).collect();
        indirect(bench, 4800, &table);
    });
}

#[test]
fn indirect_tables_that_are_none() {
    breaks("a table outside RAM", |bench| {
        store(bench, 0, RAM, 16, INDIRECT, 0);
        bench.publish(0, 0);
    });
    breaks("a table that is half a descriptor", |bench| {
        store(bench, 0, TABLE, 24, INDIRECT, 0);
        bench.publish(0, 0);
    });
    breaks("an empty table", |bench| {
        store(bench, 0, TABLE, 0, INDIRECT, 0);
        bench.publish(0, 0);
    });
    breaks("a table in a table", |bench| {
        indirect(bench, 16, &[(TABLE, 16, INDIRECT, 0)]);
    });
}

#[test]
fn requests_in_the_wrong_shape() {
    breaks("something to read behind something to write", |bench| {
        bench.offer(0, &[(BUFFERS, 8, WRITE), (BUFFERS, 8, 0)]);
    });
    breaks("nothing to write", |bench| {
        bench.offer(0, &[(BUFFERS, 8, 0)]);
    });
}

#[test]
fn an_available_ring_that_runs_ahead() {
    breaks("more requests than the ring has entries", |bench| {
        let index = rings(0).available.unchecked_add(2);
        bench.memory.write_obj(SIZE + 1, index).unwrap();
    });
}

#[test]
fn one_request_may_use_the_whole_table() {
    let ram = ram();
    let bench = Bench::new(&ram, Box::new(Rng), Kicks::new(Rng::QUEUES).unwrap());
    bench.start(0, 1);
    bench.offer(0, &[(BUFFERS, 8, WRITE); SIZE as usize]);
    bench.serve(0);
    assert_eq!(bench.used(0), (1, 8 * u32::from(SIZE)));
    indirect(
        &bench,
        32,
        &[(BUFFERS, 8, WRITE | NEXT, 1), (BUFFERS, 4, WRITE, 0)],
    );
    bench.serve(0);
    assert_eq!(bench.used(0), (2, 12));
    assert_eq!(bench.status(), RUNNING);
}
