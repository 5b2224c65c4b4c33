//! The stream on its way in.

use std::io::{self, Read};
use std::time::Instant;

use crate::transport::Channel;
use crate::wait::{Wait, Waits};

/// Reads a channel, and lets be seen when there is nothing to read.
pub(super) struct StreamReader<'a> {
    channel: &'a Channel,
    waits: &'a Waits,
    /// When something was last read.
    last_progress: Instant,
}

impl<'a> StreamReader<'a> {
    pub(super) fn new(channel: &'a Channel, waits: &'a Waits) -> Self {
        StreamReader {
            channel,
            waits,
            last_progress: Instant::now(),
        }
    }
}

/// Waits without end, until bytes, the end of the stream, an error, or cancellation.
impl Read for StreamReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(n) = self.channel.read_some(buf)? {
                self.last_progress = Instant::now();
                return Ok(n);
            }
            let _waiting = self.waits.go_on(Wait::Stream, self.last_progress);
            self.channel.wait_readable(None)?;
        }
    }
}
