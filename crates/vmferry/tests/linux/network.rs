//! A network of the test's own: a bridge that both hosts of a guest are plugged into, and somebody on it who talks to
//! the guest all the time.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::LOST;
use crate::common::command::Running;
use crate::common::{PATIENCE, eventually, say};
use crate::host::tool;

/// The program of iproute2.
pub const IP: &str = "ip";

/// The guest's address, as its script wants it.
pub const GUEST: &str = "10.77.0.2/24";
const ECHO: ([u8; 4], u16) = ([10, 77, 0, 2], 7);
const OURS: &str = "10.77.0.1/24";
const MAC: &str = "52:54:00:12:34:56";

/// How long is waited between two lines of the conversation.
const BREATH: Duration = Duration::from_millis(100);

/// A bridge with two TAP interfaces, in a network namespace that this thread and all that it starts are in from now on.
pub struct Network(());

impl Network {
    /// None, loudly, where that cannot be had.
    pub fn new(test: &str) -> Option<Self> {
        let Some(ip) = tool(IP) else {
            say(&format!(
                "SKIPPED: {test}: the network: there is no {IP}: install the package iproute2"
            ));
            return None;
        };
        // SAFETY: only the network namespace changes; the table of descriptors stays shared.
        if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
            say(&format!(
                "SKIPPED: {test}: the network: no namespace for it: {error}; be root"
            ));
            return None;
        }
        let commands = format!(
            "link set lo up\n\
             link add br0 type bridge forward_delay 0\n\
             addr add {OURS} dev br0\n\
             link set br0 up\n\
             tuntap add tap0 mode tap\n\
             link set tap0 master br0 up\n\
             tuntap add tap1 mode tap\n\
             link set tap1 master br0 up\n"
        );
        for command in commands.lines() {
            let mut ip = Command::new(&ip);
            Running::start(ip.args(command.split(' ')))
                .finish_within(PATIENCE)
                .succeeded();
        }
        Some(Network(()))
    }

    /// The option of `vmferry run`, for the host that the guest comes to after so many hops.
    pub fn option(&self, hops: usize) -> String {
        format!("tap=tap{},mac={MAC}", hops % 2)
    }

    /// Connects to the guest, and keeps talking.
    pub fn talk(&self) -> Conversation {
        let address = SocketAddr::from(ECHO);
        let stream = eventually("a connection to the guest", || {
            TcpStream::connect_timeout(&address, PATIENCE).ok()
        });
        let done = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(AtomicU64::new(0));
        let thread = {
            let (done, heard) = (done.clone(), heard.clone());
            thread::spawn(move || talk(&stream, &done, &heard))
        };
        Conversation {
            done,
            heard,
            thread,
        }
    }
}

/// A connection over which a line comes back for each that is sent.
pub struct Conversation {
    done: Arc<AtomicBool>,
    heard: Arc<AtomicU64>,
    thread: JoinHandle<Duration>,
}

impl Conversation {
    /// Waits for more of it.
    ///
    /// # Panics
    ///
    /// It is over.
    #[track_caller]
    pub fn goes_on(&self) {
        let before = self.heard.load(Ordering::Relaxed);
        eventually("the guest's echo", || {
            assert!(!self.thread.is_finished(), "the connection has broken");
            // One line may have been on its way.
            (self.heard.load(Ordering::Relaxed) >= before + 2).then_some(())
        });
    }

    /// Ends it. How many lines came back, and the longest that one took.
    ///
    /// # Panics
    ///
    /// The connection has broken, or not every line came back, each once and in order.
    #[track_caller]
    pub fn end(self) -> (u64, Duration) {
        self.done.store(true, Ordering::Relaxed);
        let longest = self.thread.join().expect("the conversation lasts");
        (self.heard.load(Ordering::Relaxed), longest)
    }
}

fn talk(stream: &TcpStream, done: &AtomicBool, heard: &AtomicU64) -> Duration {
    let words = "the connection to the guest lasts";
    stream.set_read_timeout(Some(PATIENCE)).expect(words);
    stream.set_nodelay(true).expect(words);
    let mut answers = BufReader::new(stream);
    let mut longest = Duration::ZERO;
    while !done.load(Ordering::Relaxed) {
        let line = format!("line {}\n", heard.load(Ordering::Relaxed));
        let start = Instant::now();
        (&mut &*stream).write_all(line.as_bytes()).expect(words);
        let mut answer = String::new();
        let read = answers.read_line(&mut answer).expect(words);
        assert_ne!(read, 0, "the connection was closed");
        assert_eq!(answer, line, "{LOST}a line of the connection");
        longest = longest.max(start.elapsed());
        heard.fetch_add(1, Ordering::Relaxed);
        thread::sleep(BREATH);
    }
    longest
}
