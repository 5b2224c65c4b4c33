//! Bytes on their way between a disk and guest memory.

use std::io::{self, ErrorKind};
use std::ops::ControlFlow;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The most pieces of one system call (`IOV_MAX`).
const MOST_PIECES: usize = 1024;
/// Alignment of memory that satisfies direct I/O everywhere.
pub(super) const DIRECT_MEMORY: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    FromDisk,
    /// With whether it has to be safe when it is done.
    ToDisk(Durability),
}

/// What a write that is done has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// The host: a flush makes it safe.
    Written,
    /// The medium.
    Safe,
}

/// A part of a disk and the memory that it comes from or goes to, and how far that has come.
pub(super) struct Transfer {
    pub direction: Direction,
    at: u64,
    len: u64,
    pieces: Pieces,
    /// Stands in for memory that the kernel cannot use as it lies.
    bounce: Option<Bounce>,
}

/// What a system call is to move next.
pub(super) struct Step<'a> {
    pub at: u64,
    pub iovecs: &'a [libc::iovec],
}

impl Transfer {
    /// A transfer between guest memory and the disk from `at` on. Memory that is not `aligned` gets a copy; 1 suits
    /// everything.
    ///
    /// # Safety
    ///
    /// The memory of `slices` must stay mapped for as long as the transfer lives.
    pub unsafe fn new<'a, B: BitmapSlice + 'a>(
        direction: Direction,
        at: u64,
        slices: impl Iterator<Item = VolatileSlice<'a, B>>,
        aligned: usize,
    ) -> Self {
        let slices: Vec<_> = slices.collect();
        let len = slices.iter().map(VolatileSlice::len).sum();
        let suits = |slice: &VolatileSlice<'_, B>| {
            let address = slice.ptr_guard().as_ptr().addr();
            address.is_multiple_of(aligned) && slice.len().is_multiple_of(aligned)
        };
        let mut bounce = None;
        let iovecs = if slices.iter().all(suits) {
            let iovec = |slice: &VolatileSlice<'_, B>| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            };
            slices.iter().map(iovec).collect()
        } else {
            let bounce = bounce.insert(Bounce::new(len));
            if direction != Direction::FromDisk {
                let mut filled = 0;
                for slice in &slices {
                    filled += slice.copy_to(&mut bounce.bytes_mut()[filled..]);
                }
            }
            vec![libc::iovec {
                iov_base: bounce.bytes_mut().as_mut_ptr().cast(),
                iov_len: len,
            }]
        };
        Transfer {
            direction,
            at,
            len: len as u64,
            pieces: Pieces { iovecs, done: 0 },
            bounce,
        }
    }

    /// Where on the disk the rest begins.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Bytes of all of it.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn step(&self) -> Step<'_> {
        let rest = self.pieces.rest();
        Step {
            at: self.at,
            iovecs: &rest[..rest.len().min(MOST_PIECES)],
        }
    }

    /// Hears how many bytes the kernel has moved. Goes on with the next step, or ends.
    pub fn hear(&mut self, moved: io::Result<usize>) -> ControlFlow<io::Result<()>> {
        match moved {
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(e) => return ControlFlow::Break(Err(e)),
            // The image became shorter behind our back.
            Ok(0) => return ControlFlow::Break(Err(ErrorKind::UnexpectedEof.into())),
            Ok(moved) => {
                self.at += moved as u64;
                self.pieces.advance(moved);
                if self.pieces.rest().is_empty() {
                    return ControlFlow::Break(Ok(()));
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Tells guest memory what has come from the disk; `slices` are those of [`new`](Self::new).
    ///
    /// Law 1: the kernel writes at some time before it says that it is done, and the dirty log does not see it.
    /// A mark made before that time could be taken by the migration, which would then read a page that is still to
    /// change; so the pages are marked now. A read that failed may have changed some of them, too.
    pub fn arrive<'a, B: BitmapSlice + 'a>(
        &self,
        slices: impl Iterator<Item = VolatileSlice<'a, B>>,
        outcome: &io::Result<()>,
    ) {
        match (&self.bounce, outcome) {
            (None, _) => slices.for_each(|slice| slice.bitmap().mark_dirty(0, slice.len())),
            (Some(bounce), Ok(())) => {
                let mut rest = bounce.bytes();
                for slice in slices {
                    let piece;
                    (piece, rest) = rest.split_at(slice.len());
                    slice.copy_from(piece);
                }
            }
            // Nothing has reached the guest.
            (Some(_), Err(_)) => {}
        }
    }
}

/// Pieces of memory, of which the first ones are done.
struct Pieces {
    iovecs: Vec<libc::iovec>,
    done: usize,
}

// SAFETY: the pointers are not used here; who uses them may be any thread, as guest memory is nobody's own, and a bounce
// buffer belongs to the transfer.
unsafe impl Send for Pieces {}

impl Pieces {
    fn rest(&self) -> &[libc::iovec] {
        &self.iovecs[self.done..]
    }

    /// So many bytes more are done.
    fn advance(&mut self, mut moved: usize) {
        for iovec in &mut self.iovecs[self.done..] {
            let part = moved.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(part);
            iovec.iov_len -= part;
            moved -= part;
            if iovec.iov_len > 0 {
                return;
            }
            self.done += 1;
        }
    }
}

/// A buffer that direct I/O can use.
pub(super) struct Bounce {
    room: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bounce {
    /// So many zeroes.
    pub fn new(len: usize) -> Self {
        let room = vec![0; len + DIRECT_MEMORY];
        let start = room.as_ptr().addr().next_multiple_of(DIRECT_MEMORY) - room.as_ptr().addr();
        Bounce { room, start, len }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.room[self.start..self.start + self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.room[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let iovec = |base: usize, len| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(base),
            iov_len: len,
        };
        for (moved, first) in [
            (&[0][..], (100, 10)),
            (&[4], (104, 6)),
            (&[4, 4], (108, 2)),
            (&[10], (200, 20)),
            (&[4, 21], (215, 5)),
        ] {
            let mut pieces = Pieces {
                iovecs: vec![iovec(100, 10), iovec(200, 20)],
                done: 0,
            };
            moved.iter().for_each(|moved| pieces.advance(*moved));
            let rest = pieces.rest()[0];
            assert_eq!((rest.iov_base.addr(), rest.iov_len), first);
            pieces.advance(usize::MAX);
            assert!(pieces.rest().is_empty());
        }
    }

    #[test]
    fn a_bounce_buffer_is_aligned() {
        let bounce = Bounce::new(512);
        assert_eq!(bounce.bytes().len(), 512);
        assert!(bounce.bytes().as_ptr().addr().is_multiple_of(DIRECT_MEMORY));
    }
}
