//! The network of the tests does what they ask of it: over both kinds of sockets, to the byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_testing::proxy::{Builder, Effect, Proxy, Rate, Way, When};
use vmferry_testing::random::Random;
use vmferry_testing::wait::PATIENCE;

/// One end of a connection.
trait End: Read + Write + Send {
    fn impatient(&self);
}

impl End for TcpStream {
    fn impatient(&self) {
        let short = Some(Duration::from_millis(300));
        self.set_read_timeout(short).unwrap();
        self.set_write_timeout(short).unwrap();
    }
}

impl End for UnixStream {
    fn impatient(&self) {
        let short = Some(Duration::from_millis(300));
        self.set_read_timeout(short).unwrap();
        self.set_write_timeout(short).unwrap();
    }
}

/// A connection through a proxy, over TCP.
fn tcp(with: impl Fn(Builder) -> Builder) -> (TcpStream, Proxy, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let proxy = with(Proxy::to(uri)).start();
    let source = TcpStream::connect(proxy.uri.strip_prefix("tcp:").unwrap()).unwrap();
    (source, proxy, listener.accept().unwrap().0)
}

/// The same over a Unix socket.
fn unix(
    directory: &tempfile::TempDir,
    with: impl Fn(Builder) -> Builder,
) -> (UnixStream, Proxy, UnixStream) {
    let path = directory.path().join("destination");
    let listener = UnixListener::bind(&path).unwrap();
    let proxy = with(Proxy::to(format!("unix:{}", path.display()))).start();
    let source = UnixStream::connect(proxy.uri.strip_prefix("unix:").unwrap()).unwrap();
    (source, proxy, listener.accept().unwrap().0)
}

fn read_all(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A connection that is cut may end with an error.
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

fn noise(len: usize) -> Vec<u8> {
    let mut random = Random::with_seed(7);
    (0..len).map(|_| random.below(256) as u8).collect()
}

/// What is sent arrives, both ways, and so does its end.
fn passes(mut source: impl End + 'static, destination: impl End + 'static) {
    let stream = noise(3 << 20);
    let arrived = read_all(destination);
    source.write_all(&stream).unwrap();
    drop(source);
    assert!(arrived.join().unwrap() == stream);
}

#[test]
fn a_good_network_passes_everything_on() {
    let (source, _proxy, destination) = tcp(|good| good);
    passes(source, destination);
    let (source, _proxy, destination) = tcp(|good| good);
    passes(destination, source);
    let directory = tempfile::tempdir().unwrap();
    let (source, _proxy, destination) = unix(&directory, |good| good);
    passes(source, destination);
    assert_eq!(directory.path().read_dir().unwrap().count(), 1);
}

#[test]
fn a_cut_comes_at_its_byte() {
    for at in [0, 1, 100_000] {
        let (mut source, proxy, destination) =
            tcp(|good| good.fault(When::Bytes(Way::Forward, at), Effect::Cut));
        let arrived = read_all(destination);
        let _ = source.write_all(&noise(1 << 20));
        proxy.wait_until_struck();
        assert!(arrived.join().unwrap() == noise(1 << 20)[..at as usize]);
        assert_eq!(read_all(source).join().unwrap(), b"");
    }
}

#[test]
fn a_fault_finds_its_text() {
    for (place, arrives) in [
        (When::BEFORE_LOADED, &b"pong"[..]),
        (When::from_loaded(2), b"pong\x76\x01"),
        (When::BEHIND_LOADED, b"pong\x76\x01\0\0"),
    ] {
        let (source, _proxy, mut destination) = tcp(|good| good.fault(place, Effect::Cut));
        let arrived = read_all(source);
        destination.write_all(b"pong").unwrap();
        destination.write_all(b"\x76\x01\0\0shut").unwrap();
        assert_eq!(arrived.join().unwrap(), arrives);
    }
}

/// Nothing arrives this way, and the other way still works.
fn is_dumb(source: &mut impl End, destination: &mut impl End) {
    source.write_all(b"is anybody there?").unwrap();
    destination.impatient();
    let kind = destination.read(&mut [0; 100]).unwrap_err().kind();
    assert_eq!(kind, ErrorKind::WouldBlock);
    destination.write_all(b"yes").unwrap();
    let mut heard = [0; 3];
    source.read_exact(&mut heard).unwrap();
    assert_eq!(heard, *b"yes");
}

#[test]
fn silence_takes_everything_and_tells_nobody_but_of_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let (mut source, proxy, mut destination) = unix(&directory, |good| good);
    proxy.strike(Effect::Silence(Way::Forward));
    is_dumb(&mut source, &mut destination);
    source.write_all(&noise(8 << 20)).unwrap();
    drop(source);
    assert_eq!(read_all(destination).join().unwrap(), b"");
}

#[test]
fn a_stalled_network_takes_nothing_and_tells_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let (mut source, proxy, mut destination) = unix(&directory, |good| good);
    proxy.strike(Effect::Stall(Way::Forward));
    is_dumb(&mut source, &mut destination);
    source.impatient();
    let kind = source.write_all(&noise(8 << 20)).unwrap_err().kind();
    assert_eq!(kind, ErrorKind::WouldBlock);
    drop(source);
    let kind = destination.read(&mut [0; 100]).unwrap_err().kind();
    assert_eq!(kind, ErrorKind::WouldBlock);
    drop(proxy);
    assert_eq!(destination.read(&mut [0; 100]).unwrap(), 0);
}

#[test]
fn a_throttled_network_carries_what_it_is_told() {
    for jitter in [0.0, 1.0] {
        let rate = Rate {
            bytes_per_second: 10 << 20,
            jitter,
        };
        let (mut source, _proxy, destination) = tcp(|good| good.throttle(Way::Forward, rate));
        let arrived = read_all(destination);
        let start = Instant::now();
        source.write_all(&noise(5 << 20)).unwrap();
        // All but what lies in buffers has arrived, so the sender has felt the rate.
        let sent = start.elapsed();
        drop(source);
        assert_eq!(arrived.join().unwrap().len(), 5 << 20);
        let arrived = start.elapsed();
        // Half a second; a busy host may be slower.
        assert!(arrived > Duration::from_millis(400), "{arrived:?}");
        assert!(arrived < Duration::from_secs(5), "{arrived:?}");
        println!("jitter {jitter}: sent after {sent:?}, arrived after {arrived:?}");
    }
}

#[test]
fn a_long_network_delivers_late_but_carries_much() {
    const DELAY: Duration = Duration::from_millis(100);
    let (mut source, _proxy, mut destination) = tcp(|good| good.delay(Way::Forward, DELAY));
    let start = Instant::now();
    source.write_all(b"first").unwrap();
    destination.read_exact(&mut [0; 5]).unwrap();
    assert!(start.elapsed() >= DELAY);
    let arrived = read_all(destination);
    source.write_all(&noise(4 << 20)).unwrap();
    drop(source);
    assert_eq!(arrived.join().unwrap().len(), 4 << 20);
    assert!(start.elapsed() < PATIENCE);
}

/// Dropping it ends a connection in any state, and one that nobody has made.
#[test]
fn it_ends_when_it_is_dropped() {
    drop(Proxy::to("tcp:127.0.0.1:1").start());
    let (source, proxy, destination) = tcp(|good| good);
    drop(proxy);
    assert_eq!(read_all(source).join().unwrap(), b"");
    assert_eq!(read_all(destination).join().unwrap(), b"");
}
