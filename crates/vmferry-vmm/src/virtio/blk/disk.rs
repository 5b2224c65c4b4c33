//! What is behind a block device: a file of the host.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::flush::{Safety, Writes};
use super::lock::{self, Answer};
use super::stamp::{self, Comparison, Stamp};
use super::transfer::{Bounce, Durability};
use crate::config::{Access, Caching, DiskConfig};
use crate::error::MachineError;

/// Bytes of virtio's sectors, whatever the disk has.
pub(super) const SECTOR: u64 = 512;
/// The largest block of a medium, in bytes, that direct I/O is tried with.
const LARGEST_BLOCK: u64 = 4096;
/// Zeroes written at once where the file system cannot make them.
const ZEROES: usize = 64 << 10;

/// An image or block device.
pub(crate) struct Disk {
    id: String,
    path: PathBuf,
    pub(super) file: File,
    access: Access,
    caching: Caching,
    /// As the guest knows it.
    pub(super) sectors: AtomicU64,
    block_size: u64,
    /// Whether the lock is held. Who takes it and gives it up has the machine's run state to itself.
    locked: AtomicBool,
    /// Whether a flush of cached writes has failed. Linux tells a file of a page that it could not write once, and takes it for
    /// clean afterwards (fsync(2)): no later success means anything, whoever was told, the guest or a migration.
    lost_writes: AtomicBool,
    pub(super) safety: Safety,
    /// Whether the image has a generation that no snapshot remembers.
    marked: AtomicBool,
    /// The image as it was when the guest was saved that has arrived here.
    arrived_with: Mutex<Option<Stamp>>,
}

impl AsRawFd for Disk {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
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
        let refuse = |why: String| {
            let path = config.path.display();
            Err(MachineError::Config(format!(
                "{path} cannot be the disk '{id}': {why}"
            )))
        };
        // Before it is opened: that could wait for ever for a FIFO's writer, and have effects on a device.
        let kind = config.path.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return refuse("it is neither a file nor a block device".into());
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(config.access == Access::ReadWrite)
            .custom_flags(flags)
            .open(&config.path)
            .map_err(failed)?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let block_size = match config.caching {
            Caching::Cached => SECTOR,
            Caching::Direct => direct_block(&file).map_err(failed)?,
        };
        if bytes == 0 || !bytes.is_multiple_of(block_size) {
            return refuse(format!(
                "it has {bytes} bytes, and a disk has a multiple of {block_size}; a raw image is expected, and \
                 'truncate --size=%{block_size}' completes one"
            ));
        }
        Ok(Disk {
            id,
            path: config.path.clone(),
            file,
            access: config.access,
            caching: config.caching,
            sectors: AtomicU64::new(bytes / SECTOR),
            block_size,
            locked: AtomicBool::new(false),
            lost_writes: AtomicBool::new(false),
            safety: Safety::new(),
            marked: AtomicBool::new(false),
            arrived_with: Mutex::new(None),
        })
    }

    /// A disk whose reads wait until there is something at the other end of a pipe.
    #[cfg(test)]
    pub fn of_pipe(pipe: File, sectors: u64, caching: Caching) -> Self {
        Disk {
            id: "pipe".into(),
            path: "pipe".into(),
            file: pipe,
            access: Access::ReadWrite,
            caching,
            sectors: AtomicU64::new(sectors),
            block_size: SECTOR,
            locked: AtomicBool::new(false),
            lost_writes: AtomicBool::new(false),
            safety: Safety::new(),
            marked: AtomicBool::new(false),
            arrived_with: Mutex::new(None),
        }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether `path` leads to this disk's image, by whatever name.
    pub fn is_at(&self, path: &Path) -> bool {
        let identity = |metadata: Metadata| match metadata.file_type().is_block_device() {
            true => (metadata.rdev(), 0),
            false => (metadata.dev(), metadata.ino()),
        };
        let (Ok(own), Ok(other)) = (self.file.metadata(), fs::metadata(path)) else {
            return false;
        };
        identity(own) == identity(other)
    }

    pub fn access(&self) -> Access {
        self.access
    }

    pub fn caching(&self) -> Caching {
        self.caching
    }

    /// Bytes of its blocks: requests are for whole ones. More than a sector where direct I/O needs that.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// Alignment, in bytes, of memory that the kernel can use as it lies.
    pub fn memory_alignment(&self) -> usize {
        match self.caching {
            Caching::Cached => 1,
            Caching::Direct => self.block_size as usize,
        }
    }

    /// Takes the lock: nobody else may use the disk from here on. Whether it was not held already.
    pub fn lock(&self) -> Result<bool, MachineError> {
        self.expect_free("lock", lock::take(&self.file, self.access))?;
        Ok(!self.locked.swap(true, Ordering::Relaxed))
    }

    /// Whether the lock is held.
    pub fn is_locked(&self) -> bool {
        self.locked.load(Ordering::Relaxed)
    }

    /// Gives the lock up.
    pub fn unlock(&self) -> Result<(), MachineError> {
        lock::release(&self.file).map_err(|source| self.failed("unlock", source))?;
        self.locked.store(false, Ordering::Relaxed);
        Ok(())
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
            Err(source) => Err(self.failed(attempted, source)),
        }
    }

    pub(super) fn failed(&self, action: &str, source: io::Error) -> MachineError {
        let action = format!("{action} the disk '{}' ({})", self.id, self.path.display());
        MachineError::Os { action, source }
    }

    /// The guest is about to change what is on the disk: a snapshot of before does not fit any longer.
    pub fn before_write(&self) {
        if !self.marked.load(Ordering::Relaxed) {
            if let Err(error) = stamp::renew(&self.file) {
                tracing::debug!(id = self.id, %error, "the image cannot keep a generation");
            }
            self.marked.store(true, Ordering::Relaxed);
        }
    }

    /// What tells later whether the image of a guest that stands still has changed since. None of a disk that the guest
    /// cannot write to.
    pub fn stamp(&self) -> Option<Stamp> {
        if self.access == Access::ReadOnly {
            return None;
        }
        self.marked.store(false, Ordering::Relaxed);
        self.stamp_now()
            .inspect_err(|error| tracing::warn!("{error}"))
            .ok()
    }

    fn stamp_now(&self) -> Result<Stamp, MachineError> {
        let stamp = self
            .image_bytes()
            .and_then(|bytes| Stamp::of(&self.file, bytes));
        stamp.map_err(|source| self.failed("look at the state of", source))
    }

    /// Takes note of how the image was when the guest was saved that arrives here.
    pub fn set_arrived_with(&self, stamp: Option<Stamp>) {
        *self.arrived_with() = stamp;
    }

    fn arrived_with(&self) -> MutexGuard<'_, Option<Stamp>> {
        self.arrived_with
            .lock()
            .expect("no holder of a stamp panics")
    }

    /// Whether the image is still as it was when the guest was saved that has arrived here. None if that is the same for
    /// the guest: it cannot write to it.
    pub fn compare_with_arrived(&self) -> Result<Option<Comparison>, MachineError> {
        if self.access == Access::ReadOnly {
            return Ok(None);
        }
        let now = self.stamp_now()?;
        Ok(Some(match &*self.arrived_with() {
            Some(then) => then.compare(&now),
            None => Comparison::Unknown,
        }))
    }

    /// Forgets what this host has cached of a disk that was written elsewhere.
    pub fn forget_cache(&self) {
        // SAFETY: the call has no effect on this process's memory.
        unsafe { libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }

    /// Makes everything safe that was written before.
    pub fn flush(&self) -> io::Result<()> {
        let covered = self.covered_now();
        self.hear_flush(covered, self.sync())
    }

    /// The writes that a flush which begins now makes safe.
    pub fn covered_now(&self) -> Writes {
        self.safety.covered_now()
    }

    /// Asks the kernel to make everything that was written safe. What its answer means, [`hear_flush`](Self::hear_flush)
    /// tells.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// How a flush has ended that the kernel answers so. It began when there were the writes `covered`.
    pub fn hear_flush(&self, covered: Writes, answer: io::Result<()>) -> io::Result<()> {
        self.learn(&answer);
        answer.and_then(|()| self.has_all_writes())?;
        self.safety.flushed(covered);
        Ok(())
    }

    /// Hears the kernel's answer to a step of a write that was to reach as much as `durability` says.
    pub fn hear_write<T>(&self, durability: Durability, answer: &io::Result<T>) {
        match durability {
            Durability::Safe if answer.is_ok() => return,
            Durability::Safe => self.learn_from_write(answer),
            Durability::Written => {}
        }
        // One that has failed may have changed something.
        self.safety.written();
    }

    /// Learns from the kernel's answer to a flush.
    pub fn learn<T>(&self, answer: &io::Result<T>) {
        if let Err(error) = answer
            && self.caching == Caching::Cached
            && !says_nothing_of_writes(error)
        {
            let known = self.lost_writes.swap(true, Ordering::Relaxed);
            if !known {
                tracing::error!(id = self.id, %error, "a disk has lost writes: it can be flushed no more");
            }
        }
    }

    /// The same of a write that was to be safe at once: one that finds no room has not begun.
    fn learn_from_write<T>(&self, answer: &io::Result<T>) {
        let refused = answer.as_ref().is_err_and(|error| {
            let refusals = [libc::ENOSPC, libc::EDQUOT, libc::EFBIG, libc::EINVAL];
            error.raw_os_error().is_some_and(|n| refusals.contains(&n))
        });
        if !refused {
            self.learn(answer);
        }
    }

    /// Fails if a write has been lost.
    pub fn has_all_writes(&self) -> io::Result<()> {
        match self.lost_writes.load(Ordering::Relaxed) {
            true => Err(io::Error::other("a write before has failed and is lost")),
            false => Ok(()),
        }
    }

    /// Discards `len` bytes: they read as anything afterwards, and need no space.
    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        let result = match self.allocate(libc::FALLOC_FL_PUNCH_HOLE, at, len) {
            // It is only a hint.
            Err(e) if cannot(&e) => Ok(()),
            result => result,
        };
        self.safety.written();
        result
    }

    /// Makes `len` bytes zero; with `unmap` they may give up their space.
    pub fn zero(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mode = match unmap {
            true => libc::FALLOC_FL_PUNCH_HOLE,
            false => libc::FALLOC_FL_ZERO_RANGE,
        };
        let result = match self.allocate(mode, at, len) {
            Err(e) if cannot(&e) => {
                let zeroes = Bounce::new(ZEROES);
                (at..at + len).step_by(ZEROES).try_for_each(|from| {
                    let piece = (at + len - from).min(ZEROES as u64) as usize;
                    self.file.write_all_at(&zeroes.bytes()[..piece], from)
                })
            }
            result => result,
        };
        self.safety.written();
        result
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

/// The block size of direct I/O to `file`. It is found by trying: not every kernel and file system tells.
fn direct_block(file: &File) -> io::Result<u64> {
    let mut size = SECTOR;
    loop {
        let mut block = Bounce::new(size as usize);
        match file.read_at(block.bytes_mut(), 0) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && size < LARGEST_BLOCK => size *= 2,
            Err(e) => return Err(e),
            Ok(_) => return Ok(size),
        }
    }
}

/// Whether an error is that of an attempt, and not of what was written before.
fn says_nothing_of_writes(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED | libc::ENOMEM)
    )
}

/// Whether the file system just cannot do it.
fn cannot(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}
