//! The size of a disk: what its guest knows, and what its image has.
//!
//! A guest learns the size when its driver starts, and keeps to it. An image that has grown since serves the guest as it
//! did before, here and where the guest is moved to, until somebody tells it of the new size (`block_resize`).

use std::io::{self, Seek, SeekFrom};
use std::sync::atomic::Ordering;

use super::disk::{Disk, SECTOR};
use crate::config::Access;
use crate::error::MachineError;

impl Disk {
    /// The size that the guest knows, in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// The size that the guest knows.
    pub fn bytes(&self) -> u64 {
        self.sectors() * SECTOR
    }

    /// The size of the image, now.
    pub(super) fn image_bytes(&self) -> io::Result<u64> {
        // What moves is the file's position, which nothing here uses.
        (&self.file).seek(SeekFrom::End(0))
    }

    /// Takes the image's size, which may have grown since it was opened, for a guest that has not arrived yet.
    pub fn take_image_size(&self) -> Result<(), MachineError> {
        let bytes = self
            .image_bytes()
            .map_err(|source| self.failed("find the size of", source))?;
        self.set_bytes(bytes - bytes % self.block_size());
        Ok(())
    }

    /// Takes the size that a guest from elsewhere knows.
    pub fn take_size_of_guest(&self, sectors: u64) -> Result<(), MachineError> {
        let bytes = self
            .image_bytes()
            .map_err(|source| self.failed("find the size of", source))?;
        let wanted = sectors.checked_mul(SECTOR);
        match wanted.filter(|wanted| self.can_have(*wanted) && *wanted <= bytes) {
            Some(wanted) => {
                self.set_bytes(wanted);
                Ok(())
            }
            None => Err(MachineError::Misfit(format!(
                "its guest knows {sectors} sectors of 512 bytes, and {} has {bytes} bytes, in blocks of {}",
                self.path().display(),
                self.block_size()
            ))),
        }
    }

    /// Gives the disk another size, and so the image, if it is a file. What lies behind a smaller size is lost. Nothing is
    /// in flight, and the guest is still to be told.
    pub fn resize(&self, bytes: u64) -> Result<(), MachineError> {
        let refuse = |why: String| {
            let id = self.id();
            Err(MachineError::Config(format!(
                "cannot resize the disk '{id}' to {bytes} bytes: {why}"
            )))
        };
        if !self.can_have(bytes) {
            let block = self.block_size();
            return refuse(format!("it needs a multiple of {block} bytes"));
        }
        if !self.is_locked() {
            return refuse(
                "this machine does not hold its lock; the guest may be elsewhere".into(),
            );
        }
        let failed = |source| self.failed("resize", source);
        let is_file = self.file.metadata().map_err(failed)?.is_file();
        let there = self.image_bytes().map_err(failed)?;
        match self.access() {
            Access::ReadWrite if is_file && there != bytes => {
                self.before_write();
                self.file.set_len(bytes).map_err(failed)?;
                self.safety.written();
            }
            // In QEMU's words.
            Access::ReadWrite if there < bytes => return refuse("Cannot grow device files".into()),
            Access::ReadOnly if there < bytes => return refuse("Image is read-only".into()),
            _ => {}
        }
        self.set_bytes(bytes);
        Ok(())
    }

    /// Whether a disk can be so large.
    pub(super) fn can_have(&self, bytes: u64) -> bool {
        bytes != 0 && bytes.is_multiple_of(self.block_size())
    }

    fn set_bytes(&self, bytes: u64) {
        self.sectors.store(bytes / SECTOR, Ordering::Release);
    }
}
