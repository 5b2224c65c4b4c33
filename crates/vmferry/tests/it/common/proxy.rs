//! A TCP connection that breaks where the test wants it to.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::eventually;

/// Where the connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Behind so many bytes on the way to the destination.
    Bytes(usize),
    /// Before the destination's word that it has loaded the guest.
    BeforeLoaded,
    /// Behind that word.
    BehindLoaded,
}

/// The destination's word that it has loaded the guest, which it says once: type 0x7601, no payload.
const HANDOVER_LOADED: [u8; 4] = [0x76, 1, 0, 0];

/// What happens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Both sides are told that the connection is over.
    Cut,
    /// Nothing comes through any more, and nobody is told.
    Silence,
}

/// A proxy for one connection. Ends it when dropped.
pub struct Proxy {
    pub uri: String,
    over: Arc<AtomicBool>,
    reached: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Leads to `uri`, a `tcp:` one. At `place` comes the fault, in the direction that the place is in.
    pub fn new(uri: &str, place: Place, fault: Fault) -> Self {
        let target = uri.strip_prefix("tcp:").expect("a tcp: URI").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("it has one").port();
        let over = Arc::new(AtomicBool::new(false));
        let reached = Arc::new(AtomicBool::new(false));
        let (flag, at_place) = (over.clone(), reached.clone());
        let thread = std::thread::spawn(move || {
            let Ok((source, _)) = listener.accept() else {
                return;
            };
            if flag.load(Ordering::SeqCst) {
                return;
            }
            let destination = TcpStream::connect(target).expect("the destination listens");
            let (there, back) = match place {
                Place::Bytes(_) => (Some(place), None),
                Place::BeforeLoaded | Place::BehindLoaded => (None, Some(place)),
            };
            let (source, destination) = (&source, &destination);
            let (flag, at_place) = (&*flag, &*at_place);
            std::thread::scope(|scope| {
                scope.spawn(move || forward(source, destination, there, fault, flag, at_place));
                scope.spawn(move || forward(destination, source, back, fault, flag, at_place));
            });
        });
        Proxy {
            uri: format!("tcp:127.0.0.1:{port}"),
            over,
            reached,
            thread: Some(thread),
        }
    }

    /// Waits until the connection has come to its place.
    #[track_caller]
    pub fn wait_until_reached(&self) {
        eventually("the fault of the connection", || {
            self.reached.load(Ordering::SeqCst).then_some(())
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // In case nobody ever connected.
        let _ = TcpStream::connect(self.uri.trim_start_matches("tcp:"));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Copies until the end, the fault, or the end of the proxy.
fn forward(
    from: &TcpStream,
    to: &TcpStream,
    place: Option<Place>,
    fault: Fault,
    over: &AtomicBool,
    reached: &AtomicBool,
) {
    let (mut reader, mut writer) = (from, to);
    let _ = from.set_read_timeout(Some(Duration::from_millis(20)));
    let mut buffer = vec![0; 1 << 16];
    let mut copied = 0;
    let mut broken = place == Some(Place::Bytes(0));
    while !over.load(Ordering::SeqCst) {
        if broken && fault == Fault::Cut {
            break;
        }
        if broken {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        let n = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => break,
        };
        let passes = place.and_then(|place| passing(place, copied, &buffer[..n]));
        broken = passes.is_some();
        let passes = passes.unwrap_or(n);
        copied += passes;
        if writer.write_all(&buffer[..passes]).is_err() {
            break;
        }
        reached.fetch_or(broken, Ordering::SeqCst);
    }
    // The end of one direction ends a migration's connection.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// How many of these bytes, which come behind `copied` others, still pass if the place is among them.
fn passing(place: Place, copied: usize, bytes: &[u8]) -> Option<usize> {
    // The destination writes it in one piece.
    let loaded = || bytes.windows(4).position(|word| word == HANDOVER_LOADED);
    match place {
        Place::Bytes(limit) => (copied + bytes.len() >= limit).then(|| limit - copied),
        Place::BeforeLoaded => loaded(),
        Place::BehindLoaded => loaded().map(|at| at + HANDOVER_LOADED.len()),
    }
}
