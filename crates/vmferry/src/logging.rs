//! Lines for people on standard error: the log, and notes.
//!
//! Nobody waits for whoever reads them. Lines are written while a guest is paused and while locks are held, and the
//! reader may be a pipe that is full. So a thread of their own writes them; what finds its queue full is dropped and
//! counted, and the count is written as soon as there is room again.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// The environment variable that says what is logged.
const VARIABLE: &str = "VMFERRY_LOG";

/// Lines that may wait to be written.
const QUEUE: usize = 1024;

/// How long a process that ends waits for its last lines to be read.
const LAST_LINES: Duration = Duration::from_secs(1);

/// How often a process that ends looks whether there is room to ask for its last lines.
const POLL: Duration = Duration::from_millis(10);

static LINES: OnceLock<Lines> = OnceLock::new();

struct Lines {
    queue: SyncSender<Message>,
    lost: AtomicU64,
}

enum Message {
    Line(Vec<u8>),
    /// To be answered when everything before it has been written.
    Flush(SyncSender<()>),
}

/// The thread that writes lines. When this is dropped, the lines that wait are written, or given up after a second.
pub struct Logging(());

impl Logging {
    /// Starts the thread, the log, and the words of a thread that panics.
    ///
    /// # Errors
    ///
    /// `VMFERRY_LOG` cannot be understood, or the thread cannot be started.
    pub fn start() -> anyhow::Result<Self> {
        let filter = filter()?;
        let (queue, lines) = sync_channel(QUEUE);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write(&lines))
            .context("cannot start the thread that writes the log")?;
        let lost = AtomicU64::new(0);
        if LINES.set(Lines { queue, lost }).is_err() {
            unreachable!("a process starts its log once");
        }
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(|| Line)
            .with_ansi(io::stderr().is_terminal())
            .init();
        std::panic::set_hook(Box::new(|panic| {
            let trace = Backtrace::capture();
            match trace.status() {
                BacktraceStatus::Captured => note(format_args!("vmferry: {panic}\n{trace}")),
                _ => note(format_args!("vmferry: {panic}")),
            }
        }));
        Ok(Logging(()))
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        let Some(lines) = LINES.get() else { return };
        let end = Instant::now() + LAST_LINES;
        let (written, all_written) = sync_channel(1);
        let mut message = Message::Flush(written);
        while let Err(TrySendError::Full(unsent)) = lines.queue.try_send(message) {
            if Instant::now() >= end {
                return;
            }
            message = unsent;
            thread::sleep(POLL);
        }
        // Either way there is nothing more to do.
        let _ = all_written.recv_timeout(end.saturating_duration_since(Instant::now()));
    }
}

/// Tells people something, a line on standard error. If nobody reads it, nobody misses it.
pub fn note(line: impl std::fmt::Display) {
    let line = format!("{line}\n").into_bytes();
    match LINES.get() {
        Some(lines) => lines.put(line),
        // The process has only just begun.
        None => drop(io::stderr().write_all(&line)),
    }
}

impl Lines {
    fn put(&self, line: Vec<u8>) {
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The thread's work.
fn write(lines: &Receiver<Message>) {
    let mut stderr = io::stderr();
    for message in lines {
        let line = match message {
            Message::Line(line) => line,
            Message::Flush(written) => {
                // Whoever has asked may have given up.
                let _ = written.try_send(());
                continue;
            }
        };
        if stderr.write_all(&line).is_err() {
            lost().fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let missing = lost().swap(0, Ordering::Relaxed);
        if missing > 0 {
            let _ = writeln!(
                stderr,
                "vmferry: {missing} lines of the log are missing: standard error was not read in time"
            );
        }
    }
}

fn lost() -> &'static AtomicU64 {
    &LINES.get().expect("lines come from there").lost
}

/// A line of the log: the subscriber writes each with one call.
struct Line;

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(lines) = LINES.get() {
            lines.put(line.to_owned());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is logged: errors, unless the user wants more.
fn filter() -> anyhow::Result<EnvFilter> {
    let Some(wanted) = std::env::var_os(VARIABLE).filter(|wanted| !wanted.is_empty()) else {
        return Ok(EnvFilter::new("error"));
    };
    let help = "it takes error, warn, info, debug, trace or off, or PART=LEVEL, several with commas between them";
    let Some(wanted) = wanted.to_str() else {
        bail!("{VARIABLE} is not UTF-8: {help}");
    };
    for directive in wanted.split(',') {
        // The filter would take a word for a part of the program, of which everything is logged, and so it does if the
        // level is missing.
        if directive.contains(['[', ']']) {
            // Of a span, which has a grammar of its own.
            continue;
        }
        let level = match directive.split_once('=') {
            Some((_, level)) => level,
            None if directive.chars().all(char::is_alphanumeric) => directive,
            None => continue,
        };
        // An empty one would be read as "error".
        if level.is_empty() || level.parse::<LevelFilter>().is_err() {
            bail!("{VARIABLE}={wanted}: there is no level '{level}': {help}");
        }
    }
    EnvFilter::builder()
        .parse(wanted)
        .with_context(|| format!("{VARIABLE}={wanted} cannot be understood: {help}"))
}
