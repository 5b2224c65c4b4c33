//! The stream on its way out: bytes of our own, and pages straight from guest memory.

use std::time::{Duration, Instant};

use vmferry_dirty::PageRange;
use vmferry_wire::{Command, DeviceState, EncodeError, Encoder};

use crate::error::MigrationError;
use crate::ram::RamBlock;
use crate::transport::{Channel, Waited};
use crate::wait::{Wait, Waits};

/// `IOV_MAX`: how many pieces one `writev` takes.
const MAX_PIECES: usize = 1024;

/// Collects a batch of the stream, then writes it with as few system calls as possible.
///
/// A batch is filled, flushed to its end (in several attempts if the channel is slow), and only then is the
/// next one begun: so pieces may point into `own`, which does not change while it is flushed.
pub(super) struct StreamWriter {
    encoder: Encoder,
    /// Bytes that are not pages, in order.
    own: Vec<u8>,
    /// The batch in order: pages, and between them the numbers of bytes of `own` that come before.
    parts: Vec<Part>,
    /// The pieces still to be written, once flushing has begun; `next` is the first.
    pieces: Vec<libc::iovec>,
    next: usize,
    /// Bytes written since the beginning of the stream.
    written: u64,
    last_progress: Instant,
}

enum Part {
    Own { start: usize, end: usize },
    Page(libc::iovec),
}

/// How flushing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushed {
    /// The whole batch was written.
    All,
    /// The deadline came first.
    Partly,
}

impl StreamWriter {
    pub(super) fn new(encoder: Encoder) -> Self {
        StreamWriter {
            encoder,
            own: Vec::new(),
            parts: Vec::new(),
            pieces: Vec::new(),
            next: 0,
            written: 0,
            last_progress: Instant::now(),
        }
    }

    /// Bytes written so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// When the channel has last taken something.
    pub(super) fn last_progress(&self) -> Instant {
        self.last_progress
    }

    /// Appends whatever `encode` puts out.
    pub(super) fn put<T>(&mut self, encode: impl FnOnce(&mut Encoder, &mut Vec<u8>) -> T) -> T {
        debug_assert!(self.pieces.is_empty(), "a batch is being flushed");
        let start = self.own.len();
        let result = encode(&mut self.encoder, &mut self.own);
        let end = self.own.len();
        match self.parts.last_mut() {
            Some(Part::Own { end: last, .. }) if *last == start => *last = end,
            _ => self.parts.push(Part::Own { start, end }),
        }
        result
    }

    /// Appends a command.
    pub(super) fn command(&mut self, command: Command) {
        self.put(|e, out| e.command(out, command));
    }

    /// Appends a device section.
    pub(super) fn device(&mut self, state: &DeviceState) -> Result<(), EncodeError> {
        self.put(|e, out| e.device_state(out, state))
    }

    /// Appends a page with its content, which is read when it is written out.
    pub(super) fn page(&mut self, index: usize, block: &RamBlock, page: usize) {
        let range = PageRange::new(page, page + 1);
        self.put(|e, out| e.page(out, index, range.start.offset() as u64));
        self.parts.push(Part::Page(block.iovec(range)));
    }

    /// Appends a page of zeros.
    pub(super) fn zero_page(&mut self, index: usize, page: usize) {
        let offset = PageRange::new(page, page).start.offset() as u64;
        self.put(|e, out| e.zero_page(out, index, offset));
    }

    /// Writes the batch, until it is written or `deadline` has come. Fails when the channel takes nothing for
    /// `peer_timeout`.
    pub(super) fn flush(
        &mut self,
        channel: &Channel,
        deadline: Option<Instant>,
        peer_timeout: Duration,
        waits: &Waits,
    ) -> Result<Flushed, MigrationError> {
        let broken = |source| MigrationError::Connection {
            peer: "destination",
            source,
        };
        if self.pieces.is_empty() {
            self.begin_flush();
        }
        while self.next < self.pieces.len() {
            let end = (self.next + MAX_PIECES).min(self.pieces.len());
            // SAFETY: the pieces are guest pages, mapped as long as their RamBlock lives, which the
            // migration holds; and parts of `own`, which is left alone until the batch is flushed.
            let n =
                unsafe { channel.write_pieces(&self.pieces[self.next..end]) }.map_err(broken)?;
            let now = Instant::now();
            if n > 0 {
                self.advance(n);
                self.last_progress = now;
                continue;
            }
            let stalled = now.saturating_duration_since(self.last_progress);
            if stalled >= peer_timeout {
                return Err(MigrationError::PeerTimeout {
                    what: "not taken any data",
                    waited: stalled,
                });
            }
            let mut wait = peer_timeout - stalled;
            if let Some(deadline) = deadline {
                let left = deadline.saturating_duration_since(now);
                if left.is_zero() {
                    return Ok(Flushed::Partly);
                }
                wait = wait.min(left);
            }
            let _waiting = waits.go_on(Wait::Transmission, self.last_progress);
            match channel.wait_writable(wait).map_err(broken)? {
                Waited::Ready | Waited::TimedOut => {}
            }
        }
        self.own.clear();
        self.parts.clear();
        self.pieces.clear();
        self.next = 0;
        Ok(Flushed::All)
    }

    fn begin_flush(&mut self) {
        self.last_progress = Instant::now();
        let own = &self.own;
        self.pieces
            .extend(self.parts.iter().map(|part| match *part {
                Part::Own { start, end } => libc::iovec {
                    iov_base: own[start..end].as_ptr().cast_mut().cast(),
                    iov_len: end - start,
                },
                Part::Page(page) => page,
            }));
    }

    /// Takes `n` written bytes off the front.
    fn advance(&mut self, mut n: usize) {
        self.written += n as u64;
        while n > 0 {
            let piece = &mut self.pieces[self.next];
            let step = n.min(piece.iov_len);
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(step).cast();
            piece.iov_len -= step;
            n -= step;
            if piece.iov_len == 0 {
                self.next += 1;
            }
        }
    }
}
