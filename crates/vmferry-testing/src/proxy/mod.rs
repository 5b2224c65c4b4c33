//! A network between the source and the destination of a migration that a test has in its hands.
//!
//! A [`Proxy`] takes one connection and passes it on to a destination. It is a good network unless told otherwise. It
//! can be slow ([`Builder::throttle`], [`Builder::delay`]), and it can fail: at an exact byte ([`Builder::fault`]) or
//! at the moment when the test says so ([`Proxy::strike`]).
//!
//! ```no_run
//! use vmferry_testing::proxy::{Effect, Proxy, Rate, Way, When};
//!
//! let destination = "tcp:127.0.0.1:4444";
//! let proxy = Proxy::to(destination)
//!     .throttle(Way::Forward, Rate::steady(25_000_000))
//!     .fault(When::Bytes(Way::Forward, 1 << 20), Effect::Cut)
//!     .start();
//! println!("migrate to {}", proxy.uri);
//! ```

mod line;
mod pump;
mod socket;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use line::Line;
use pump::pump;
use socket::{Listener, connect};

use crate::wait::wait_until;

/// A direction through the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source to the destination: the stream.
    Forward,
    /// From the destination to the source: the return path.
    Back,
}

/// The place of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Behind so many bytes that went this way. Zero is before anything else.
    Bytes(Way, u64),
    /// Behind so many bytes that went this way, counted from the beginning of the first occurrence of this text.
    /// Exact if the peer writes the text in one piece.
    From(Way, &'static [u8], u64),
}

impl When {
    /// Length of the destination's word that it has loaded the guest.
    pub const LOADED_LEN: u64 = 4;

    /// Before the destination's word that it has loaded the guest.
    pub const BEFORE_LOADED: When = When::from_loaded(0);

    /// Behind the destination's word that it has loaded the guest.
    pub const BEHIND_LOADED: When = When::from_loaded(Self::LOADED_LEN);

    /// So many bytes from the beginning of the destination's word that it has loaded the guest. It says the word once:
    /// the return path's message of type 0x7601, without payload.
    pub const fn from_loaded(bytes: u64) -> Self {
        When::From(Way::Back, b"\x76\x01\0\0", bytes)
    }
}

/// What a fault does. Not a byte more gets through, in either direction, between the place of the fault and its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The connection is closed. Both sides are told.
    Cut,
    /// From now on, what is sent this way is taken and vanishes. Neither side is told, until one of them closes its
    /// end: that still gets through.
    Silence(Way),
    /// From now on, nothing more is taken that is sent this way, so that the sender's buffers fill up. Neither side is
    /// told, also if one of them closes its end, until the proxy is dropped.
    Stall(Way),
}

/// A place and what happens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fault {
    when: When,
    effect: Effect,
}

/// How fast bytes reach the receiver.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// The average.
    pub bytes_per_second: u64,
    /// By how much the time that a piece takes may differ from the average, as a share of it: from 0 (steady) to 1
    /// (between nothing and twice as long).
    pub jitter: f64,
}

impl Rate {
    /// A rate that is always the same.
    pub const fn steady(bytes_per_second: u64) -> Self {
        Rate {
            bytes_per_second,
            jitter: 0.0,
        }
    }
}

/// What one direction is like while it works.
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    rate: Option<Rate>,
    delay: Duration,
}

/// A proxy that is not there yet.
#[derive(Debug)]
#[must_use = "nothing happens before it is started"]
pub struct Builder {
    uri: String,
    forward: Link,
    back: Link,
    faults: Vec<Fault>,
}

impl Builder {
    fn link(&mut self, way: Way) -> &mut Link {
        match way {
            Way::Forward => &mut self.forward,
            Way::Back => &mut self.back,
        }
    }

    /// Limits the rate at which bytes reach the receiver this way. The proxy holds little back: what the sender's
    /// kernel has handed over reaches the receiver some 20 ms later at most, but a slow rate has a buffer of 256 KiB.
    pub fn throttle(mut self, way: Way, rate: Rate) -> Self {
        self.link(way).rate = Some(rate);
        self
    }

    /// Lets every byte that is sent this way arrive so much later. Up to 4 MiB are under way at the same time.
    pub fn delay(mut self, way: Way, delay: Duration) -> Self {
        self.link(way).delay = delay;
        self
    }

    /// Adds a fault. Each happens once.
    pub fn fault(mut self, when: When, effect: Effect) -> Self {
        self.faults.push(Fault { when, effect });
        self
    }

    /// Starts the proxy: from now on it waits for its connection.
    ///
    /// # Panics
    ///
    /// The destination's URI is neither `tcp:` nor `unix:`, or the system gives no socket.
    pub fn start(self) -> Proxy {
        let listener = Listener::beside(&self.uri, self.forward.rate);
        let (line, uri) = (Arc::new(Line::new(&self.faults)), listener.uri.clone());
        let thread = {
            let line = line.clone();
            std::thread::spawn(move || serve(&line, listener, &self))
        };
        Proxy {
            uri,
            line,
            thread: Some(thread),
        }
    }
}

/// A proxy for one connection. Ends the connection when dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens: a URI to migrate to, of the same kind as the destination's.
    pub uri: String,
    line: Arc<Line>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Prepares a proxy to `uri`, where a destination listens: `tcp:HOST:PORT` or `unix:PATH`. It will listen at a
    /// TCP port of the loopback interface, or at a Unix socket beside the destination's.
    pub fn to(uri: impl std::fmt::Display) -> Builder {
        Builder {
            uri: uri.to_string(),
            forward: Link::default(),
            back: Link::default(),
            faults: Vec::new(),
        }
    }

    /// Lets a fault happen now.
    pub fn strike(&self, effect: Effect) {
        self.line.strike(effect);
    }

    /// Waits until one fault at least has happened.
    ///
    /// # Panics
    ///
    /// None does in a reasonable time.
    #[track_caller]
    pub fn wait_until_struck(&self) {
        wait_until("the fault of the connection", || self.line.is_struck());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.line.end();
        if let Some(thread) = self.thread.take() {
            // If it panicked, the test has seen its message, and a connection that ended.
            let _ = thread.join();
        }
    }
}

/// Takes the one connection and passes it on.
fn serve(line: &Line, listener: Listener, proxy: &Builder) {
    let Some(source) = listener.accept(|| line.is_over()) else {
        return;
    };
    let destination = match connect(&proxy.uri, proxy.forward.rate) {
        Ok(destination) => destination,
        // The source sees that nobody is there.
        Err(error) => {
            eprintln!("proxy: cannot connect to {}: {error}", proxy.uri);
            return;
        }
    };
    line.connected(source, destination);
    std::thread::scope(|scope| {
        scope.spawn(|| pump(line, Way::Back, proxy.back));
        pump(line, Way::Forward, proxy.forward);
    });
}
