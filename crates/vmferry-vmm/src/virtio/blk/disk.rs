//! What is behind a block device: a file of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::SECTOR;
use super::lock::{self, Answer};
use crate::config::{Access, Caching, DiskConfig};
use crate::error::MachineError;

/// The most pieces of one system call (`IOV_MAX`).
const MOST_PIECES: usize = 1024;
/// Alignment of memory that satisfies direct I/O everywhere.
const DIRECT_MEMORY: usize = 4096;
/// Zeroes written at once where the file system cannot make them.
const ZEROES: usize = 64 << 10;

/// An image or block device.
pub(crate) struct Disk {
    id: String,
    path: PathBuf,
    file: File,
    access: Access,
    caching: Caching,
    sectors: u64,
}

impl Disk {
    /// Opens what `config` names; `id` is the disk's name. Nothing is locked yet.
    pub fn open(config: &DiskConfig, id: String) -> Result<Self, MachineError> {
        let failed = |source| MachineError::Os {
            action: format!("open the disk '{id}' ({})", config.path.display()),
            source,
        };
        let flags = match config.caching {
            Caching::Cached => 0,
            Caching::Direct => libc::O_DIRECT,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(config.access == Access::ReadWrite)
            .custom_flags(flags)
            .open(&config.path)
            .map_err(failed)?;
        let refuse = |why: String| {
            let path = config.path.display();
            Err(MachineError::Config(format!(
                "{path} cannot be the disk '{id}': {why}"
            )))
        };
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return refuse("it is neither a file nor a block device".into());
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return refuse(format!(
                "it has {bytes} bytes, and a disk has a multiple of {SECTOR}; a raw image is expected, and \
                 'truncate --size=%{SECTOR}' completes one"
            ));
        }
        Ok(Disk {
            id,
            path: config.path.clone(),
            file,
            access: config.access,
            caching: config.caching,
            sectors: bytes / SECTOR,
        })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn access(&self) -> Access {
        self.access
    }

    pub fn caching(&self) -> Caching {
        self.caching
    }

    /// Its size, in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// Takes the lock: nobody else may use the disk from here on.
    pub fn lock(&self) -> Result<(), MachineError> {
        self.expect_free("lock", lock::take(&self.file, self.access))
    }

    /// Whether the lock could be taken, were the guest to start here.
    pub fn check_lock(&self) -> Result<(), MachineError> {
        self.expect_free("use", lock::probe(&self.file, self.access))
    }

    fn expect_free(&self, attempted: &str, answer: io::Result<Answer>) -> Result<(), MachineError> {
        let (id, path) = (&self.id, self.path.display());
        match answer {
            Ok(Answer::Free) => Ok(()),
            Ok(Answer::Taken) => Err(MachineError::Locked(format!(
                "cannot {attempted} the disk '{id}': another process uses {path}; end it, or let both only read \
                 it (ro=on)"
            ))),
            Err(source) => Err(MachineError::Os {
                action: format!("{attempted} the disk '{id}' ({path})"),
                source,
            }),
        }
    }

    /// Lets somebody else use the disk: everything written is safe, and the lock is free. The guest stands still.
    pub fn give_up(&self) -> Result<(), MachineError> {
        let failed = |action: &str| {
            let action = format!("{action} the disk '{}' ({})", self.id, self.path.display());
            move |source| MachineError::Os { action, source }
        };
        if self.access == Access::ReadWrite {
            self.flush().map_err(failed("flush"))?;
        }
        lock::release(&self.file).map_err(failed("unlock"))
    }

    /// Forgets what this host has cached of a disk that was written elsewhere.
    pub fn forget_cache(&self) {
        // SAFETY: the call has no effect on this process's memory.
        unsafe { libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }

    /// Makes everything that was written safe.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Reads from `at` on into guest memory.
    pub fn read<'a, B: BitmapSlice + 'a>(
        &self,
        at: u64,
        into: impl Iterator<Item = VolatileSlice<'a, B>>,
    ) -> io::Result<()> {
        let pieces: Vec<_> = into.collect();
        if self.suits(&pieces) {
            let done = self.transfer(at, &pieces, Direction::FromDisk);
            for piece in &pieces {
                // Even a read that fails may have changed some of it.
                piece.bitmap().mark_dirty(0, piece.len());
            }
            return done;
        }
        let mut bounce = Bounce::new(total(&pieces));
        self.file.read_exact_at(bounce.bytes(), at)?;
        let mut rest = &*bounce.bytes();
        for piece in &pieces {
            piece.copy_from(&rest[..piece.len()]);
            rest = &rest[piece.len()..];
        }
        Ok(())
    }

    /// Writes guest memory from `at` on.
    pub fn write<'a, B: BitmapSlice + 'a>(
        &self,
        at: u64,
        from: impl Iterator<Item = VolatileSlice<'a, B>>,
    ) -> io::Result<()> {
        let pieces: Vec<_> = from.collect();
        if self.suits(&pieces) {
            return self.transfer(at, &pieces, Direction::ToDisk);
        }
        let mut bounce = Bounce::new(total(&pieces));
        let mut filled = 0;
        for piece in &pieces {
            filled += piece.copy_to(&mut bounce.bytes()[filled..]);
        }
        self.file.write_all_at(bounce.bytes(), at)
    }

    /// Whether the kernel can read and write these pieces where they are.
    fn suits<B: BitmapSlice>(&self, pieces: &[VolatileSlice<'_, B>]) -> bool {
        let sector = SECTOR as usize;
        let aligned = |piece: &VolatileSlice<'_, B>| {
            let address = piece.ptr_guard().as_ptr().addr();
            address.is_multiple_of(sector) && piece.len().is_multiple_of(sector)
        };
        self.caching == Caching::Cached || pieces.iter().all(aligned)
    }

    fn transfer<B: BitmapSlice>(
        &self,
        mut at: u64,
        pieces: &[VolatileSlice<'_, B>],
        direction: Direction,
    ) -> io::Result<()> {
        let mut iovecs: Vec<_> = pieces
            .iter()
            .map(|piece| libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            })
            .collect();
        let mut rest = &mut iovecs[..];
        while !rest.is_empty() {
            let count = rest.len().min(MOST_PIECES) as i32;
            let fd = self.file.as_raw_fd();
            // SAFETY: every iovec is a piece of guest memory, which is mapped for as long as `pieces` borrows it and
            // may change at any time; the kernel reads or writes no more than that.
            let moved = unsafe {
                match direction {
                    Direction::FromDisk => libc::preadv(fd, rest.as_ptr(), count, at as i64),
                    Direction::ToDisk => libc::pwritev(fd, rest.as_ptr(), count, at as i64),
                }
            };
            match moved {
                -1 => {
                    let error = io::Error::last_os_error();
                    if error.kind() != ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                moved => {
                    at += moved as u64;
                    rest = advance(rest, moved as usize);
                }
            }
        }
        Ok(())
    }

    /// Discards `len` bytes: they read as anything afterwards, and need no space.
    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        match self.allocate(libc::FALLOC_FL_PUNCH_HOLE, at, len) {
            // It is only a hint.
            Err(e) if cannot(&e) => Ok(()),
            result => result,
        }
    }

    /// Makes `len` bytes zero; with `unmap` they may give up their space.
    pub fn zero(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mode = match unmap {
            true => libc::FALLOC_FL_PUNCH_HOLE,
            false => libc::FALLOC_FL_ZERO_RANGE,
        };
        match self.allocate(mode, at, len) {
            Err(e) if cannot(&e) => {
                let mut zeroes = Bounce::new(ZEROES);
                (at..at + len).step_by(ZEROES).try_for_each(|from| {
                    let piece = (at + len - from).min(ZEROES as u64) as usize;
                    self.file.write_all_at(&zeroes.bytes()[..piece], from)
                })
            }
            result => result,
        }
    }

    fn allocate(&self, mode: i32, at: u64, len: u64) -> io::Result<()> {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the call has no effect on this process's memory.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at as i64, len as i64) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    FromDisk,
    ToDisk,
}

/// Whether the file system just cannot do it.
fn cannot(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

fn total<B: BitmapSlice>(pieces: &[VolatileSlice<'_, B>]) -> usize {
    pieces.iter().map(VolatileSlice::len).sum()
}

/// What is left of `iovecs` after `moved` bytes.
fn advance(iovecs: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let whole = iovecs.iter().take_while(|iovec| {
        let all = moved >= iovec.iov_len;
        moved -= if all { iovec.iov_len } else { 0 };
        all
    });
    let whole = whole.count();
    let rest = &mut iovecs[whole..];
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(moved);
        first.iov_len -= moved;
    }
    rest
}

/// A buffer of zeroes that direct I/O can use.
struct Bounce {
    room: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bounce {
    fn new(len: usize) -> Self {
        let room = vec![0; len + DIRECT_MEMORY];
        let start = room.as_ptr().addr().next_multiple_of(DIRECT_MEMORY) - room.as_ptr().addr();
        Bounce { room, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
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
            (0, (100, 10)),
            (4, (104, 6)),
            (10, (200, 20)),
            (25, (215, 5)),
        ] {
            let mut iovecs = [iovec(100, 10), iovec(200, 20)];
            let rest = advance(&mut iovecs, moved);
            assert_eq!((rest[0].iov_base.addr(), rest[0].iov_len), first);
        }
        assert!(advance(&mut [iovec(100, 10)], 10).is_empty());
    }

    #[test]
    fn a_bounce_buffer_is_aligned() {
        let mut bounce = Bounce::new(512);
        assert_eq!(bounce.bytes().len(), 512);
        assert!(bounce.bytes().as_ptr().addr().is_multiple_of(DIRECT_MEMORY));
    }
}
