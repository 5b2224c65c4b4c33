//! RAM blocks: the guest's memory as the engine reads and writes it.
//!
//! Guest memory is shared with code that obeys no Rust rule (the guest), so no reference to its bytes is
//! ever formed: it is touched by the kernel (`writev`), by volatile or SIMD loads, and by raw copies.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use vmferry_dirty::{PAGE_SIZE, PageIndex, PageRange};

use crate::zero::is_zero_page;

/// Longest name that the stream can carry, in bytes.
pub const MAX_NAME: usize = 255;

/// One contiguous piece of guest memory, mapped into this process.
///
/// # Invariants
///
/// `host..host + pages * PAGE_SIZE` is mapped readable and writable for as long as `_mapping` lives, and
/// `host` is page-aligned. [`RamBlock::new`] asks its caller for exactly this.
#[derive(Clone)]
pub struct RamBlock {
    name: Arc<str>,
    host: *mut u8,
    pages: usize,
    /// Only kept: dropping the last clone unmaps the memory.
    _mapping: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is only an address of shared memory; every access goes through methods that are sound
// under concurrent access, and `_mapping` (itself Send + Sync) keeps the memory mapped.
unsafe impl Send for RamBlock {}
// SAFETY: as for Send.
unsafe impl Sync for RamBlock {}

/// Why a memory region cannot be a RAM block.
#[derive(Debug, thiserror::Error)]
pub enum RamBlockError {
    /// The stream has one length byte for the name.
    #[error("RAM block name '{0}' is empty or longer than {MAX_NAME} bytes")]
    Name(String),
    /// A page is the smallest thing that can be sent.
    #[error(
        "RAM block '{name}' is at {host:#x} with {len:#x} bytes: both must be multiples of {PAGE_SIZE}"
    )]
    Alignment {
        /// The block's name.
        name: String,
        /// Its address in this process.
        host: usize,
        /// Its length in bytes.
        len: usize,
    },
}

impl RamBlock {
    /// Describes a mapping as a RAM block. `name` is the block's identity in the stream ("microvm.ram").
    ///
    /// # Safety
    ///
    /// `host..host + len` must be mapped readable and writable, not be accessed through Rust references
    /// while the block exists, and stay mapped until `mapping` is dropped.
    pub unsafe fn new(
        name: &str,
        host: *mut u8,
        len: usize,
        mapping: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, RamBlockError> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(RamBlockError::Name(name.to_owned()));
        }
        if !(host as usize).is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(RamBlockError::Alignment {
                name: name.to_owned(),
                host: host as usize,
                len,
            });
        }
        Ok(RamBlock {
            name: name.into(),
            host,
            pages: len / PAGE_SIZE,
            _mapping: mapping,
        })
    }

    /// The block's name in the stream.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The block's size in pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The block's size in bytes.
    pub fn len(&self) -> usize {
        self.pages * PAGE_SIZE
    }

    /// Whether the block has no page.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Whether a page holds nothing but zeros at the moment of asking.
    pub fn is_zero(&self, page: PageIndex) -> bool {
        // SAFETY: page_ptr returns a mapped, aligned page.
        unsafe { is_zero_page(self.page_ptr(page)) }
    }

    /// Replaces a page's content.
    pub fn write_page(&self, page: PageIndex, content: &[u8; PAGE_SIZE]) {
        // SAFETY: page_ptr returns a mapped, writable page; `content` is a Rust reference, which by
        // RamBlock::new's contract does not point into guest memory, so the two do not overlap.
        unsafe {
            self.page_ptr(page)
                .copy_from_nonoverlapping(content.as_ptr(), PAGE_SIZE);
        }
    }

    /// Makes a page all zeros.
    pub fn write_zeros(&self, page: PageIndex) {
        // SAFETY: page_ptr returns a mapped, writable page.
        unsafe { self.page_ptr(page).write_bytes(0, PAGE_SIZE) };
    }

    /// Copies a page's content out, as it is at the moment.
    pub fn read_page(&self, page: PageIndex, content: &mut [u8; PAGE_SIZE]) {
        // SAFETY: page_ptr returns a mapped page, which `content` does not overlap (see write_page).
        unsafe {
            self.page_ptr(page)
                .copy_to_nonoverlapping(content.as_mut_ptr(), PAGE_SIZE);
        }
    }

    /// The memory of a range of pages, for system calls that read it.
    pub(crate) fn iovec(&self, range: PageRange) -> libc::iovec {
        assert!(range.end.0 <= self.pages, "{range:?} is outside {self:?}");
        libc::iovec {
            // Inside the mapping, or its end if the range is empty.
            iov_base: self.host.wrapping_add(range.start.offset()).cast(),
            iov_len: range.len() * PAGE_SIZE,
        }
    }

    /// Has the kernel back a range with memory now, before it is written to. Content stays as it is.
    pub(crate) fn populate(&self, range: PageRange) -> std::io::Result<()> {
        let memory = self.iovec(range);
        // SAFETY: the range lies in the mapping, and populating it does not change its content.
        match unsafe { libc::madvise(memory.iov_base, memory.iov_len, libc::MADV_POPULATE_WRITE) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// Lets the kernel take the memory of a range back when anybody needs some. Pages that are written from now on are
    /// kept, the others then read as zeros, which is what they hold now. Fails for shared memory.
    pub(crate) fn lend(&self, range: PageRange) -> std::io::Result<()> {
        let memory = self.iovec(range);
        // SAFETY: the range lies in the mapping, and reads as zeros whether or not the kernel takes it.
        match unsafe { libc::madvise(memory.iov_base, memory.iov_len, libc::MADV_FREE) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// Gives the memory of a range back to the kernel, with what it holds: it reads as zeros afterwards.
    pub(crate) fn release(&self, range: PageRange) {
        let memory = self.iovec(range);
        // Shared memory has to be dropped from its file. Private memory has none, and is dropped from the mapping.
        for advice in [libc::MADV_REMOVE, libc::MADV_DONTNEED] {
            // SAFETY: the range lies in the mapping, and what it holds is not needed. Failing costs memory only.
            if unsafe { libc::madvise(memory.iov_base, memory.iov_len, advice) } == 0 {
                return;
            }
        }
        tracing::debug!(error = %std::io::Error::last_os_error(), "guest memory is not given back");
    }

    fn page_ptr(&self, page: PageIndex) -> *mut u8 {
        assert!(page.0 < self.pages, "{page} is outside {self:?}");
        // SAFETY: the page lies inside the mapping.
        unsafe { self.host.add(page.offset()) }
    }
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock")
            .field("name", &self.name)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}
