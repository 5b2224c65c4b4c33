//! virtio-console.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;
use crate::SerialConfig;
use crate::virtio::Console;
use crate::virtio::console::InputGate;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

fn bench(ram: &GuestRam, port: &SerialConfig) -> (Bench, InputGate) {
    let kicks = Kicks::new(Console::QUEUES).unwrap();
    let (console, input) = Console::new(port, &kicks, Box::new(|| {})).unwrap();
    (Bench::new(ram, Box::new(console), kicks), input)
}

fn connect(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    client
}

/// Waits until the back end has kicked the receive queue.
fn wait_for_kick(bench: &Bench) {
    let start = Instant::now();
    while bench.slot.kicks().all()[RECEIVE].read().is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "no input");
        std::thread::yield_now();
    }
}

#[test]
fn bytes_go_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let ram = ram();
    let (bench, input) = bench(&ram, &SerialConfig::Unix(path.clone()));
    bench.start(0, 2);
    bench.slot.kicks().all()[RECEIVE].read().unwrap();
    let mut client = connect(&path);

    bench.put(BUFFERS, b"Hello, console");
    bench.offer(TRANSMIT, &[(BUFFERS, 7, 0), (BUFFERS + 7, 7, 0)]);
    bench.serve(TRANSMIT);
    assert_eq!(bench.used(TRANSMIT), (1, 0));
    let mut said = [0; 14];
    client.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"Hello, console");

    input.accept_input(true);
    client.write_all(b"reboot\n").unwrap();
    wait_for_kick(&bench);
    // There is no room yet: the input waits, and moves with the guest.
    bench.serve(RECEIVE);
    assert_eq!(bench.used(RECEIVE).0, 0);
    let (there, _) = self::bench(&ram, &SerialConfig::Null);
    there.slot.load(&bench.slot.save()).unwrap();
    there.offer(RECEIVE, &[(BUFFERS, 4, WRITE)]);
    there.offer(RECEIVE, &[(BUFFERS, 4, WRITE)]);
    written(&ram);
    there.serve(RECEIVE);
    assert!(has(&written(&ram), BUFFERS));
    assert_eq!(there.used(RECEIVE), (2, 3));
    assert_eq!(there.bytes(BUFFERS, 4), b"ot\no");
}

#[test]
fn input_waits_outside_while_the_guest_stands_still() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let ram = ram();
    let (bench, input) = bench(&ram, &SerialConfig::Unix(path.clone()));
    bench.start(0, 2);
    bench.slot.kicks().all()[RECEIVE].read().unwrap();
    let mut client = connect(&path);
    client.write_all(&[b'x'; 10_000]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(bench.slot.kicks().all()[RECEIVE].read().is_err());
    input.accept_input(true);
    // All of it arrives, though only a part fits at a time.
    let mut arrived = 0;
    while arrived < 10_000 {
        wait_for_kick(&bench);
        let before = bench.used(RECEIVE).0;
        bench.offer(RECEIVE, &[(BUFFERS, 0x1_0000, WRITE)]);
        bench.serve(RECEIVE);
        assert_eq!(bench.used(RECEIVE).0, before + 1);
        arrived += bench.used(RECEIVE).1;
    }
    assert_eq!(arrived, 10_000);
}
