//! A guest's serial output, with the host's time at which each line began to come.

use std::io::{ErrorKind, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::Context;
use vmferry_guests::Heartbeat;

/// One whole line.
#[derive(Clone, Debug)]
pub struct Line {
    /// When its first byte came.
    pub at: Instant,
    /// The line, without its end.
    pub text: String,
}

/// A heartbeat of the guest's, and when it came.
#[derive(Clone, Copy, Debug)]
pub struct Beat {
    /// When its first byte came.
    pub at: Instant,
    /// What it says.
    pub heartbeat: Heartbeat,
}

/// What a guest has printed so far. A thread of its own reads it, until the other end is closed.
#[derive(Debug)]
pub struct Serial(Arc<Mutex<Vec<Line>>>);

impl Serial {
    /// Begins to read.
    ///
    /// # Errors
    /// There can be no more threads.
    pub fn read(from: impl Read + Send + 'static) -> anyhow::Result<Self> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let shared = lines.clone();
        std::thread::Builder::new()
            .name("serial".to_owned())
            .spawn(move || read_lines(from, |line| lock(&shared).push(line)))
            .context("cannot start a thread")?;
        Ok(Serial(lines))
    }

    /// Whether a line has come with this in it.
    pub fn contains(&self, part: &str) -> bool {
        lock(&self.0).iter().any(|line| line.text.contains(part))
    }

    /// All whole heartbeats.
    pub fn beats(&self) -> Vec<Beat> {
        let beat = |line: &Line| {
            Some(Beat {
                at: line.at,
                heartbeat: Heartbeat::parse(&line.text)?,
            })
        };
        lock(&self.0).iter().filter_map(beat).collect()
    }

    /// The last line, for error messages.
    pub fn last_words(&self) -> String {
        let lines = lock(&self.0);
        lines.last().map_or("none", |line| &line.text).to_owned()
    }
}

fn lock(lines: &Mutex<Vec<Line>>) -> MutexGuard<'_, Vec<Line>> {
    // No holder leaves the list half changed.
    lines.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_lines(mut from: impl Read, mut each: impl FnMut(Line)) {
    let mut buffer = [0; 4096];
    let mut pending: Option<(Instant, Vec<u8>)> = None;
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // The other end is gone; why is for those who wait for lines to find out.
            Err(_) => return,
        };
        let now = Instant::now();
        for &byte in &buffer[..length] {
            let (at, mut bytes) = pending.take().unwrap_or((now, Vec::new()));
            if byte == b'\n' {
                let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                each(Line { at, text });
            } else {
                bytes.push(byte);
                pending = Some((at, bytes));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_put_together_and_what_is_no_whole_line_is_left_out() {
        let chunks = [&b"fill"[..], b"ed\r\nse", b"cond\n\nthi", b"rd"];
        let from = chunks.into_iter().fold(
            Box::new(std::io::empty()) as Box<dyn Read>,
            |before, chunk| Box::new(before.chain(chunk)),
        );
        let mut lines = Vec::new();
        read_lines(from, |line| lines.push(line.text));
        assert_eq!(lines, ["filled", "second", ""]);
    }
}
