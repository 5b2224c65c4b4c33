//! The decoder's buffer.

use std::io::{self, Read};

use crate::{EofPlace, StreamError};

/// Bytes of the stream held at a time: hundreds of pages a `read`, and still small enough that a page is
/// in the processor's cache when it is copied on into guest memory.
const CAPACITY: usize = 1 << 20;

/// A reader behind a buffer from which whole items can be borrowed.
pub(super) struct Input<R> {
    reader: R,
    buf: Box<[u8]>,
    /// `buf[start..end]` has been read but not consumed.
    start: usize,
    end: usize,
    /// Stream offset of `buf[0]`.
    base: u64,
}

impl<R: Read> Input<R> {
    pub(super) fn new(reader: R) -> Self {
        Input {
            reader,
            buf: vec![0; CAPACITY].into_boxed_slice(),
            start: 0,
            end: 0,
            base: 0,
        }
    }

    /// Stream offset of the next byte: how many have been consumed.
    #[inline]
    pub(super) fn offset(&self) -> u64 {
        self.base + self.start as u64
    }

    /// How many bytes have been read ahead.
    pub(super) fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// The next `n` bytes, which [`Input::need`] has made sure of, are at this place in the buffer; they are
    /// consumed, and stay there until the next call of `need`.
    #[inline]
    pub(super) fn consume(&mut self, n: usize) -> usize {
        debug_assert!(n <= self.buffered());
        let at = self.start;
        self.start += n;
        at
    }

    /// `N` bytes at a place that [`Input::consume`] returned.
    #[inline]
    pub(super) fn at<const N: usize>(&self, at: usize) -> &[u8; N] {
        let (bytes, _) = self.buf[at..]
            .split_first_chunk()
            .expect("consumed bytes lie in the buffer");
        bytes
    }

    /// Reads until `n` bytes are there to be consumed; `reading` is for errors. `n` is at most a page and
    /// its header, far below the buffer's capacity.
    #[inline]
    pub(super) fn need(&mut self, n: usize, reading: &'static str) -> Result<(), StreamError> {
        if self.buffered() >= n {
            return Ok(());
        }
        self.fill(n, reading, EofPlace::Inside(reading))
    }

    /// The byte that a section begins with. Only here may a stream end between two sections.
    pub(super) fn section_byte(&mut self, expected: &'static str) -> Result<u8, StreamError> {
        if self.buffered() == 0 {
            self.fill(1, "a section", EofPlace::SectionBoundary { expected })?;
        }
        let at = self.consume(1);
        Ok(self.buf[at])
    }

    #[cold]
    fn fill(
        &mut self,
        n: usize,
        reading: &'static str,
        at_eof: EofPlace,
    ) -> Result<(), StreamError> {
        // Less than one item is left: moving it costs little, and each read gets the whole buffer.
        self.buf.copy_within(self.start..self.end, 0);
        self.base += self.start as u64;
        self.end -= self.start;
        self.start = 0;
        while self.end < n {
            match self.reader.read(&mut self.buf[self.end..]) {
                Ok(0) => {
                    return Err(StreamError::UnexpectedEof {
                        offset: self.base + self.end as u64,
                        place: at_eof,
                    });
                }
                Ok(read) => self.end += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(StreamError::Io {
                        offset: self.base + self.end as u64,
                        reading,
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self, reading: &'static str) -> Result<[u8; N], StreamError> {
        self.need(N, reading)?;
        let at = self.consume(N);
        Ok(*self.at(at))
    }

    pub(super) fn u8(&mut self, reading: &'static str) -> Result<u8, StreamError> {
        self.array(reading).map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self, reading: &'static str) -> Result<u16, StreamError> {
        self.array(reading).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, reading: &'static str) -> Result<u32, StreamError> {
        self.array(reading).map(u32::from_be_bytes)
    }

    #[inline]
    pub(super) fn u64(&mut self, reading: &'static str) -> Result<u64, StreamError> {
        self.array(reading).map(u64::from_be_bytes)
    }

    /// A length byte and that many bytes.
    pub(super) fn short(&mut self, reading: &'static str) -> Result<&[u8], StreamError> {
        let len = usize::from(self.u8(reading)?);
        self.need(len, reading)?;
        let at = self.consume(len);
        Ok(&self.buf[at..at + len])
    }

    /// `len` bytes, which the caller has compared with their limit. The vector grows as they arrive.
    pub(super) fn bytes(
        &mut self,
        len: usize,
        reading: &'static str,
    ) -> Result<Vec<u8>, StreamError> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            self.need(1, reading)?;
            let n = self.buffered().min(len - bytes.len());
            let at = self.consume(n);
            bytes.extend_from_slice(&self.buf[at..at + n]);
        }
        Ok(bytes)
    }
}
