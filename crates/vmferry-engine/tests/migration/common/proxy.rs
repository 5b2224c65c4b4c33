//! A network that fails at an exact byte: a TCP proxy between source and destination.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Mutex;
use std::thread::JoinHandle;

use vmferry_engine::Uri;

/// A direction through the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source to the destination: the stream.
    Forward,
    /// From the destination to the source: the return path.
    Back,
}

/// The moment of a fault.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// So many bytes have come through.
    Bytes(Way, u64),
    /// So many bytes have come through, counted from the beginning of the first occurrence of these.
    From(Way, &'static [u8], u64),
}

/// What happens then. Whatever else is under way stays where it is: not a byte more gets through, either
/// way, between the moment and the effect.
#[derive(Clone, Copy, Debug)]
pub enum Effect {
    /// The connection is closed both ways.
    Cut,
    /// From now on, what is sent this way vanishes. Neither side is told.
    Silence(Way),
}

#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub when: When,
    pub effect: Effect,
}

/// Takes one connection.
pub struct Proxy {
    port: u16,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    pub fn start(destination: &Uri, fault: Fault) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let Uri::Tcp {
            port: behind_port, ..
        } = *destination
        else {
            panic!("{destination} is not TCP");
        };
        let thread = std::thread::spawn(move || {
            let (source, _) = listener.accept().unwrap();
            let destination = TcpStream::connect(("127.0.0.1", behind_port)).unwrap();
            forward(source, destination, fault);
        });
        Proxy {
            port,
            thread: Some(thread),
        }
    }

    pub fn uri(&self) -> Uri {
        Uri::Tcp {
            host: "127.0.0.1".to_owned(),
            port: self.port,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// What both directions know. The lock is held while bytes are passed on, so that a fault in one direction
/// falls between two writes of the other.
struct Line {
    fault: Option<Fault>,
    silent: Vec<Way>,
    cut: bool,
}

fn forward(source: TcpStream, destination: TcpStream, fault: Fault) {
    for socket in [&source, &destination] {
        socket.set_nodelay(true).unwrap();
    }
    let line = Mutex::new(Line {
        fault: Some(fault),
        silent: Vec::new(),
        cut: false,
    });
    // A fault at byte 0 is there before the first byte.
    if let When::Bytes(_, 0) = fault.when {
        strike(&mut line.lock().unwrap(), &source, &destination);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| pump(Way::Back, &destination, &source, &line));
        pump(Way::Forward, &source, &destination, &line);
    });
}

fn strike(line: &mut Line, a: &TcpStream, b: &TcpStream) {
    match line.fault.take().map(|fault| fault.effect) {
        Some(Effect::Cut) => {
            line.cut = true;
            for socket in [a, b] {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
        Some(Effect::Silence(way)) => line.silent.push(way),
        None => {}
    }
}

fn pump(way: Way, mut from: &TcpStream, mut to: &TcpStream, line: &Mutex<Line>) {
    let mut buffer = vec![0; 1 << 16];
    let mut passed = 0;
    let mut tail = Vec::new();
    loop {
        let n = from.read(&mut buffer).unwrap_or(0);
        if n == 0 {
            // Whoever closed has closed both ways, or is about to.
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        let mut line = line.lock().unwrap();
        if line.cut {
            return;
        }
        if let Some(fault) = &mut line.fault
            && let When::From(w, text, count) = fault.when
            && w == way
            && let Some(start) = find(text, &mut tail, &buffer[..n], passed)
        {
            fault.when = When::Bytes(way, start + count);
        }
        let fault_at = match line.fault.map(|fault| fault.when) {
            Some(When::Bytes(w, at)) if w == way => Some(at.saturating_sub(passed) as usize),
            _ => None,
        };
        let before = fault_at.filter(|&at| at <= n).unwrap_or(n);
        if !line.silent.contains(&way) {
            let _ = to.write_all(&buffer[..before]);
        }
        if fault_at.is_some_and(|at| at <= n) {
            strike(&mut line, from, to);
            if !line.cut && !line.silent.contains(&way) {
                let _ = to.write_all(&buffer[before..n]);
            }
        }
        passed += n as u64;
    }
}

/// Where `text` begins, if it ends in `new`; `passed` bytes came before, the last of them are `tail`.
fn find(text: &[u8], tail: &mut Vec<u8>, new: &[u8], passed: u64) -> Option<u64> {
    let first = passed - tail.len() as u64;
    tail.extend_from_slice(new);
    let found = tail.windows(text.len()).position(|bytes| bytes == text);
    let keep = tail.len().min(text.len() - 1);
    tail.drain(..tail.len() - keep);
    Some(first + found? as u64)
}
