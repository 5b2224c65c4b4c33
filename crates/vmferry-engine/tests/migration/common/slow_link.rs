//! A slow link: a TCP proxy that passes on so many bytes a second, and holds few.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use vmferry_engine::Uri;

/// How steady the link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    Steady,
    /// Each piece takes between no time and twice its time, in waves of some hundred milliseconds.
    Jittery,
}

/// Takes one connection, which ends when one of its sides ends it.
pub struct SlowLink {
    port: u16,
    rate: Arc<AtomicU64>,
}

/// Bytes that are passed on at a time.
const PIECE: usize = 4 << 10;
/// Bytes that the proxy's sockets hold; the kernel takes twice that.
const BUFFER: usize = 32 << 10;

impl SlowLink {
    /// Leads to `destination`, with `rate` bytes a second on the way there.
    pub fn to(destination: &Uri, rate: u64, pace: Pace) -> Self {
        let Uri::Tcp { port: behind, .. } = *destination else {
            panic!("{destination} is not TCP");
        };
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        set_socket_recv_buffer_size(&listener, BUFFER).unwrap();
        let port = listener.local_addr().unwrap().port();
        let rate = Arc::new(AtomicU64::new(rate));
        let shared = rate.clone();
        std::thread::spawn(move || {
            let (source, _) = listener.accept().unwrap();
            let destination = TcpStream::connect(("127.0.0.1", behind)).unwrap();
            set_socket_send_buffer_size(&destination, BUFFER).unwrap();
            for socket in [&source, &destination] {
                socket.set_nodelay(true).unwrap();
            }
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let _ = std::io::copy(&mut &destination, &mut &source);
                    let _ = source.shutdown(Shutdown::Both);
                });
                pass_on(&source, &destination, &shared, pace);
                let _ = destination.shutdown(Shutdown::Write);
            });
        });
        SlowLink { port, rate }
    }

    pub fn uri(&self) -> Uri {
        format!("tcp:127.0.0.1:{}", self.port).parse().unwrap()
    }

    /// From now on, so many bytes a second.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
    }
}

fn pass_on(mut from: &TcpStream, mut to: &TcpStream, rate: &AtomicU64, pace: Pace) {
    let start = Instant::now();
    let mut next = start;
    let mut piece = [0; PIECE];
    while let Ok(n @ 1..) = from.read(&mut piece) {
        let mut cost = n as f64 / rate.load(Ordering::Relaxed) as f64;
        if pace == Pace::Jittery {
            cost *= 1.0 + (start.elapsed().as_secs_f64() * 20.0).sin();
        }
        // What a sleep is too long is made good, but idle time is no credit for a burst.
        next = next.max(Instant::now() - Duration::from_millis(5)) + Duration::from_secs_f64(cost);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        if to.write_all(&piece[..n]).is_err() {
            return;
        }
    }
}
