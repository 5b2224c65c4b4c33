//! virtio-net.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::config::{MacAddress, NetBackend};
use crate::virtio::{Announcement, Announcer, Network};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes of the header before each frame.
const HEADER: u32 = 12;
const MERGED: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

fn bench(ram: &GuestRam, backend: &NetBackend) -> (Bench, Announcer) {
    let mac = MacAddress::default_of(0);
    let device = Network::new(backend, "net0", mac).unwrap();
    let announcer = device.announcer();
    let kicks = Kicks::new(Network::QUEUES).unwrap();
    (Bench::new(ram, Box::new(device), kicks), announcer)
}

/// A stream link, and its other end.
fn stream(ram: &GuestRam, dir: &Path) -> (Bench, Announcer, UnixListener, UnixStream) {
    let path = dir.join("net");
    let listener = UnixListener::bind(&path).unwrap();
    let (bench, announcer) = bench(ram, &NetBackend::UnixStream(path));
    let (peer, _) = listener.accept().unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    (bench, announcer, listener, peer)
}

fn send(mut peer: &UnixStream, frame: &[u8]) {
    let length = (frame.len() as u32).to_be_bytes();
    peer.write_all(&[&length, frame].concat()).unwrap();
}

fn receive(mut peer: &UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|byte| byte as u8).collect()
}

/// Does what the device's thread does, until `done`. How often there was something to do.
#[track_caller]
fn serve_until(bench: &Bench, what: &str, mut done: impl FnMut() -> bool) -> u32 {
    let (start, mut served) = (Instant::now(), 0);
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        for watch in bench.slot.watches() {
            let mut fd = libc::pollfd {
                fd: watch.fd,
                events: watch.events,
                revents: 0,
            };
            // SAFETY: `fd` is one entry, which poll fills in.
            if unsafe { libc::poll(&mut fd, 1, 10) } > 0 {
                bench.serve(watch.queue);
                served += 1;
            }
        }
    }
    served
}

/// Where in the available ring the driver wants its next kick.
fn wanted_kick(bench: &Bench, queue: usize) -> u16 {
    let at = rings(queue).used.unchecked_add(4 + 8 * u64::from(SIZE));
    bench.memory.read_obj(at).unwrap()
}

#[test]
fn frames_go_both_ways() {
    let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
    let (bench, _, _listener, peer) = stream(&ram, dir.path());
    assert_eq!(bench.offered() & (1 << VIRTIO_NET_F_CSUM), 0);
    bench.start(0, 2);

    bench.put(BUFFERS + u64::from(HEADER), &frame(100));
    bench.offer(
        TRANSMIT,
        &[(BUFFERS, HEADER, 0), (BUFFERS + u64::from(HEADER), 100, 0)],
    );
    bench.serve(TRANSMIT);
    assert_eq!(bench.used(TRANSMIT), (1, 0));
    assert_eq!(receive(&peer), frame(100));

    bench.offer(RECEIVE, &[(BUFFERS, HEADER + 1514, WRITE)]);
    written(&ram);
    send(&peer, &frame(60));
    serve_until(&bench, "a frame", || bench.used(RECEIVE).0 == 1);
    assert_eq!(bench.used(RECEIVE), (1, HEADER + 60));
    assert!(has(&written(&ram), BUFFERS));
    let arrived = bench.bytes(BUFFERS, HEADER as usize + 60);
    assert_eq!(arrived[..10], [0; 10]);
    assert_eq!(arrived[10..12], [1, 0], "one buffer has it");
    assert_eq!(arrived[12..], frame(60));
}

#[test]
fn a_frame_waits_for_room_and_may_be_put_into_several_buffers() {
    let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
    let (bench, _, _listener, peer) = stream(&ram, dir.path());
    bench.start(MERGED | 1 << VIRTIO_RING_F_EVENT_IDX, 2);
    send(&peer, &frame(2500));
    bench.store(RECEIVE, 0, Descriptor::new(BUFFERS, 1000, WRITE, 0));
    bench.store(
        RECEIVE,
        1,
        Descriptor::new(BUFFERS + 0x1000, 1000, WRITE, 0),
    );
    bench.store(
        RECEIVE,
        2,
        Descriptor::new(BUFFERS + 0x2000, 1000, WRITE, 0),
    );
    bench.publish(RECEIVE, 0);
    bench.publish(RECEIVE, 1);
    bench.serve(RECEIVE);
    assert_eq!(bench.used(RECEIVE).0, 0, "there is no room for all of it");
    assert_eq!(
        wanted_kick(&bench, RECEIVE),
        2,
        "the next buffer is of interest"
    );
    let waits_for_frames = |watch: &crate::virtio::Watch| watch.queue == RECEIVE;
    assert!(!bench.slot.watches().iter().any(waits_for_frames));

    bench.publish(RECEIVE, 2);
    bench.serve(RECEIVE);
    assert_eq!(bench.used(RECEIVE), (3, HEADER + 2500 - 2000));
    assert!(bench.slot.watches().iter().any(waits_for_frames));
    assert_eq!(bench.interrupt_status(), 1);
    let first = bench.bytes(BUFFERS, 1000);
    assert_eq!(first[10..12], [3, 0]);
    let arrived = [
        &first[12..],
        &bench.bytes(BUFFERS + 0x1000, 1000),
        &bench.bytes(BUFFERS + 0x2000, 512),
    ];
    assert_eq!(arrived.concat(), frame(2500));
    // The used ring has them in their order, each with its part of the length.
    let used: Vec<u8> = bench.bytes(rings(RECEIVE).used.raw_value() + 4, 24);
    let entries: Vec<u32> = used
        .as_chunks()
        .0
        .iter()
        .map(|word| u32::from_le_bytes(*word))
        .collect();
    assert_eq!(entries, [0, 1000, 1, 1000, 2, 512]);
}

#[test]
fn a_frame_larger_than_the_buffer_for_it_is_lost() {
    let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
    let (bench, _, _listener, peer) = stream(&ram, dir.path());
    bench.start(0, 2);
    bench.offer(RECEIVE, &[(BUFFERS, 100, WRITE)]);
    bench.store(RECEIVE, 1, Descriptor::new(BUFFERS, 100, WRITE, 0));
    bench.publish(RECEIVE, 1);
    send(&peer, &frame(200));
    send(&peer, &frame(50));
    serve_until(&bench, "the second frame", || bench.used(RECEIVE).0 == 1);
    assert_eq!(bench.used(RECEIVE), (1, HEADER + 50));
}

#[test]
fn what_is_no_frame_is_not_sent() {
    let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
    let (bench, _, _listener, peer) = stream(&ram, dir.path());
    bench.start(0, 2);
    for len in [HEADER, 70_000] {
        bench.offer(TRANSMIT, &[(BUFFERS, len, 0)]);
        bench.serve(TRANSMIT);
    }
    bench.put(BUFFERS + u64::from(HEADER), &frame(60));
    bench.offer(TRANSMIT, &[(BUFFERS, HEADER + 60, 0)]);
    bench.serve(TRANSMIT);
    assert_eq!(bench.used(TRANSMIT).0, 3);
    assert_eq!(receive(&peer), frame(60));

    bench.offer(TRANSMIT, &[(BUFFERS, HEADER - 1, 0)]);
    bench.serve(TRANSMIT);
    assert_eq!(bench.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(
        bench.slot.watches().is_empty(),
        "it waits for nothing any more"
    );
}

#[test]
fn buffers_too_small_for_a_header_stop_the_device() {
    for features in [0, MERGED] {
        let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
        let (bench, _, _listener, peer) = stream(&ram, dir.path());
        bench.start(features, 2);
        bench.offer(RECEIVE, &[(BUFFERS, HEADER - 1, WRITE)]);
        send(&peer, &frame(60));
        serve_until(&bench, "the end", || bench.status() & NEEDS_RESET != 0);
    }
}

#[test]
fn a_reader_who_is_slow_holds_up_nothing_but_frames() {
    let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
    let (bench, _, _listener, peer) = stream(&ram, dir.path());
    bench.start(0, 2);
    let mut offered = 0;
    let mut offer = || {
        let content = frame(60_000 + offered % 7);
        bench.put(BUFFERS + u64::from(HEADER), &content);
        let len = HEADER + content.len() as u32;
        bench.offer(TRANSMIT, &[(BUFFERS, len, 0)]);
        bench.serve(TRANSMIT);
        offered += 1;
        bench.used(TRANSMIT).0 == offered as u16
    };
    while offer() {
        assert!(bench.used(TRANSMIT).0 < 1000, "nothing stops the driver");
    }
    let (mut length, mut seen) = (0, 0);
    peer.set_nonblocking(true).unwrap();
    serve_until(&bench, "all frames", || {
        // Every frame that comes is whole.
        let mut some = [0; 4];
        match (&peer).read(&mut some) {
            Ok(4) => {
                length = u32::from_be_bytes(some) as usize;
                let mut content = vec![0; length];
                let mut read = 0;
                while read < length {
                    match (&peer).read(&mut content[read..]) {
                        Ok(more) => read += more,
                        Err(_) => bench.serve(TRANSMIT),
                    }
                }
                assert_eq!(content, frame(length));
                seen += 1;
            }
            Ok(few) => panic!("{few} bytes of a length"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        bench.used(TRANSMIT).0 == offered as u16 && seen > 2
    });
}

#[test]
fn a_lost_connection_comes_back() {
    let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
    let (bench, _, listener, peer) = stream(&ram, dir.path());
    bench.start(0, 2);
    drop(peer);
    listener.set_nonblocking(true).unwrap();
    let mut again = None;
    serve_until(&bench, "a new connection", || {
        again = listener.accept().ok();
        again.is_some()
    });
    let (peer, _) = again.unwrap();
    bench.offer(RECEIVE, &[(BUFFERS, 1000, WRITE)]);
    send(&peer, &frame(60));
    serve_until(&bench, "a frame", || bench.used(RECEIVE).0 == 1);
}

#[test]
fn datagrams_are_frames() {
    let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let open = |remote: &Path, local: Option<&Path>| {
        bench(
            &ram,
            &NetBackend::UnixDatagram {
                remote: remote.to_owned(),
                local: local.map(Path::to_owned),
            },
        )
        .0
    };
    let one = open(&there, Some(&here));
    one.start(0, 2);
    let peer = UnixDatagram::bind(&there).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    one.put(BUFFERS + u64::from(HEADER), &frame(60));
    one.offer(TRANSMIT, &[(BUFFERS, HEADER + 60, 0)]);
    one.serve(TRANSMIT);
    let mut room = [0; 100];
    assert_eq!(peer.recv(&mut room).unwrap(), 60);

    one.offer(RECEIVE, &[(BUFFERS, 1000, WRITE)]);
    peer.send_to(&[], &here).unwrap();
    peer.send_to(&frame(70), &here).unwrap();
    serve_until(&one, "a frame", || one.used(RECEIVE).0 == 1);
    assert_eq!(one.used(RECEIVE), (1, HEADER + 70));

    // Its socket goes with it, and a stale one is no obstacle.
    drop(one);
    assert!(!here.exists());
    drop(UnixDatagram::bind(&here).unwrap());
    let one = open(&there, Some(&here));
    // Without a path of its own it can be answered, too.
    drop(one);
    let one = open(&there, None);
    one.start(0, 2);
    one.put(BUFFERS + u64::from(HEADER), &frame(60));
    one.offer(TRANSMIT, &[(BUFFERS, HEADER + 60, 0)]);
    one.serve(TRANSMIT);
    let (len, from) = peer.recv_from(&mut room).unwrap();
    assert_eq!(len, 60);
    assert!(
        from.as_pathname().is_none() && !from.is_unnamed(),
        "{from:?}"
    );
}

#[test]
fn an_interface_announces_itself() {
    let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
    let (bench, announcer, _listener, peer) = stream(&ram, dir.path());
    bench.start(0, 2);
    announcer.start(Announcement {
        rounds: 3,
        initial: Duration::from_millis(10),
        step: Duration::from_millis(10),
        max: Duration::from_millis(20),
    });
    peer.set_nonblocking(true).unwrap();
    let mut frames = Vec::new();
    let start = Instant::now();
    serve_until(&bench, "three announcements", || {
        let mut some = [0; 64];
        if matches!((&peer).read(&mut some), Ok(64)) {
            frames.push(some);
        }
        frames.len() == 3
    });
    assert!(start.elapsed() >= Duration::from_millis(30));
    for frame in frames {
        assert_eq!(frame[..4], 60u32.to_be_bytes());
        assert_eq!(frame[4..10], [0xff; 6]);
        assert_eq!(frame[10..16], MacAddress::default_of(0).bytes());
        assert_eq!(frame[16..18], [0x80, 0x35]);
    }
}

/// Its reader has stopped to read in the middle of a frame.
#[test]
fn an_announcement_that_cannot_be_sent_waits_quietly() {
    let (ram, dir) = (ram(), tempfile::tempdir().unwrap());
    let (bench, announcer, _listener, peer) = stream(&ram, dir.path());
    bench.start(0, 2);
    bench.put(BUFFERS + u64::from(HEADER), &frame(60_000));
    let mut offered = 0;
    while bench.used(TRANSMIT).0 == offered {
        assert!(offered < 1000, "nothing stops the driver");
        bench.offer(TRANSMIT, &[(BUFFERS, HEADER + 60_000, 0)]);
        bench.serve(TRANSMIT);
        offered += 1;
    }
    announcer.start(Announcement {
        rounds: 2,
        initial: Duration::from_millis(10),
        ..Announcement::default()
    });
    let over = Instant::now() + Duration::from_millis(200);
    let served = serve_until(&bench, "nothing", || Instant::now() > over);
    assert!(served <= 4, "the device was at work {served} times");
    peer.set_nonblocking(true).unwrap();
    serve_until(&bench, "the announcement", || {
        let mut some = vec![0; 1 << 20];
        let read = (&peer).read(&mut some).unwrap_or(0);
        let mac = MacAddress::default_of(0).bytes();
        let to_all = [&[0xff; 6][..], &mac, &[0x80, 0x35]].concat();
        some[..read].windows(to_all.len()).any(|at| at == to_all)
    });
}

#[test]
fn what_cannot_be_connected_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |backend| match Network::new(&backend, "net0", MacAddress::default_of(0)) {
        Ok(_) => panic!("{backend:?} is accepted"),
        Err(error) => error.to_string(),
    };
    let nobody = refusal(NetBackend::UnixStream(dir.path().join("nobody")));
    assert!(
        nobody.contains("connect the interface 'net0' to"),
        "{nobody}"
    );
    let none = refusal(NetBackend::Tap("vmferry-none".into()));
    assert!(none.contains("ip tuntap add dev vmferry-none"), "{none}");
    let long = refusal(NetBackend::Tap("a-name-that-is-too-long".into()));
    assert!(long.contains("1 to 15"), "{long}");
    let loopback = refusal(NetBackend::Tap("lo".into()));
    assert!(loopback.contains("'lo'"), "{loopback}");
}

fn ip(arguments: &str) -> bool {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    status.is_ok_and(|status| status.success())
}

/// Has this thread, and the processes that it starts, a network of their own.
fn own_network() -> bool {
    // SAFETY: the call has no effect on this process's memory.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    unshared && ip("tuntap add dev vmferry0 mode tap") && Path::new("/dev/net/tun").exists()
}

/// The TAP interface of the host is asked for its address, as a guest would, and answers.
#[test]
fn a_tap_interface_is_a_network() {
    if !own_network() {
        eprintln!(
            "SKIPPED: a_tap_interface_is_a_network: needs root, /dev/net/tun and the 'ip' command"
        );
        return;
    }
    assert!(ip("address add 192.0.2.1/24 dev vmferry0"));
    assert!(ip("link set vmferry0 up"));
    let ram = ram();
    let (bench, _) = bench(&ram, &NetBackend::Tap("vmferry0".into()));
    let offloads = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!(bench.offered() & offloads, offloads);
    bench.start(MERGED | offloads, 2);
    let second = Network::new(
        &NetBackend::Tap("vmferry0".into()),
        "net1",
        MacAddress::default_of(1),
    );
    let busy = second.err().expect("only one can have it").to_string();
    assert!(busy.contains("another process uses it"), "{busy}");

    let mac = MacAddress::default_of(0).bytes();
    let mut question = [0; HEADER as usize + 60];
    let arp = &mut question[HEADER as usize..];
    arp[..6].fill(0xff);
    arp[6..12].copy_from_slice(&mac);
    arp[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp[22..28].copy_from_slice(&mac);
    arp[28..32].copy_from_slice(&[192, 0, 2, 2]);
    arp[38..42].copy_from_slice(&[192, 0, 2, 1]);
    bench.put(BUFFERS, &question);

    // The host may have other things to say, too.
    const ROOM: u64 = BUFFERS + 0x1000;
    let mut answers = 0;
    let mut asked: Option<Instant> = None;
    serve_until(&bench, "an answer", || {
        // A new connection takes the host some time, in which it says nothing.
        if asked.is_none_or(|at| at.elapsed() > Duration::from_millis(100)) {
            bench.offer(TRANSMIT, &[(BUFFERS, question.len() as u32, 0)]);
            bench.serve(TRANSMIT);
            asked = Some(Instant::now());
        }
        let used = bench.used(RECEIVE).0;
        if used > 0 && bench.bytes(ROOM + 24, 2) == [8, 6] {
            assert_eq!(bench.bytes(ROOM + 12, 6), mac, "to the guest");
            assert_eq!(bench.bytes(ROOM + 32, 2), [0, 2], "an answer");
            assert_eq!(bench.bytes(ROOM + 40, 4), [192, 0, 2, 1]);
            return true;
        }
        if used == answers {
            answers += 1;
            bench.offer(RECEIVE, &[(ROOM, 2000, WRITE)]);
            bench.serve(RECEIVE);
        }
        false
    });

    // What is left to wait for when the host has removed it is the time of an announcement.
    serve_until(&bench, "room for more", || {
        let has_room = bench.slot.watches().len() == 2;
        if !has_room {
            bench.offer(RECEIVE, &[(ROOM, 2000, WRITE)]);
            bench.serve(RECEIVE);
        }
        has_room
    });
    assert!(ip("link del vmferry0"));
    serve_until(&bench, "the interface to be missed", || {
        bench.slot.watches().len() == 1
    });
}
