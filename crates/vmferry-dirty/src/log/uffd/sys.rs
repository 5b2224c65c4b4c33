//! The kernel's side: userfaultfd with asynchronous write protection, and the `PAGEMAP_SCAN` ioctl.
//!
//! Nothing here can harm memory. In asynchronous mode the kernel lifts a page's protection by itself at the
//! first write: no thread ever waits for us, and no byte changes. An address range that is not what the caller
//! thinks it is costs time, or is refused. That is why all functions are safe.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use linux_raw_sys::general::{
    PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING,
    UFFD_API, UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, UFFD_USER_MODE_ONLY,
    UFFDIO_REGISTER_MODE_WP, page_region, pm_scan_arg, uffdio_api, uffdio_range, uffdio_register,
    uffdio_writeprotect,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WRITEPROTECT};
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags, mmap_anonymous, munmap, userfaultfd};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::log::LogError;

// From linux/userfaultfd.h and linux/fs.h, as everything else here; these two are expressions there, which
// `linux_raw_sys` does not carry over.
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
ioctl_iowr_nr!(PAGEMAP_SCAN, 'f' as u32, 16, pm_scan_arg);

/// A userfaultfd whose write protection the kernel resolves by itself.
pub(super) struct WriteProtector(OwnedFd);

impl WriteProtector {
    pub(super) fn open() -> Result<Self, LogError> {
        // User mode only: anybody may open such a one, without CAP_SYS_PTRACE or vm.unprivileged_userfaultfd.
        // What it cannot do is to hand a fault in the kernel (KVM's, or a system call's) to user space; in
        // asynchronous mode no fault goes there.
        let flags =
            UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        // SAFETY: the descriptor is only used in this module, for what the module's documentation shows to
        // be harmless.
        let fd = unsafe { userfaultfd(flags) }.map_err(|e| LogError::Unsupported {
            what: "userfaultfd",
            needs: match e {
                rustix::io::Errno::PERM => {
                    "a seccomp or security policy that permits the userfaultfd system call"
                }
                rustix::io::Errno::INVAL => "Linux 6.7",
                _ => "Linux 6.7, built with CONFIG_USERFAULTFD",
            },
            source: e.into(),
        })?;
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: (UFFD_FEATURE_PAGEFAULT_FLAG_WP
                | UFFD_FEATURE_WP_ASYNC
                | UFFD_FEATURE_WP_UNPOPULATED
                | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
                .into(),
            ioctls: 0,
        };
        // SAFETY: the ioctl reads and writes one uffdio_api.
        unsafe { control(&fd, UFFDIO_API.into(), &mut api) }.map_err(|source| {
            LogError::Unsupported {
                what: "asynchronous write protection with userfaultfd",
                needs: "Linux 6.7 on x86-64 or arm64",
                source,
            }
        })?;
        Ok(WriteProtector(fd))
    }

    /// Makes `range` one that can be protected.
    pub(super) fn register(&self, range: &Range<u64>) -> io::Result<()> {
        let mut register = uffdio_register {
            range: uffd_range(range),
            mode: UFFDIO_REGISTER_MODE_WP.into(),
            ioctls: 0,
        };
        // SAFETY: the ioctl reads and writes one uffdio_register.
        unsafe { control(&self.0, UFFDIO_REGISTER.into(), &mut register) }
    }

    /// Lifts all protection from `range` and makes it a common range again.
    pub(super) fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        // SAFETY: the ioctl reads one uffdio_range.
        unsafe { control(&self.0, UFFDIO_UNREGISTER.into(), &mut uffd_range(range)) }
    }

    /// Protects every page of `range`, populated or not.
    pub(super) fn protect(&self, range: &Range<u64>) -> io::Result<()> {
        let mut protect = uffdio_writeprotect {
            range: uffd_range(range),
            mode: UFFDIO_WRITEPROTECT_MODE_WP,
        };
        // SAFETY: the ioctl reads one uffdio_writeprotect.
        unsafe { control(&self.0, UFFDIO_WRITEPROTECT.into(), &mut protect) }
    }
}

/// Room for a range of pages that is yet to be found.
pub(super) const NOTHING: page_region = page_region {
    start: 0,
    end: 0,
    categories: 0,
};

/// Which pages [`Pagemap::find_and_protect`] looks for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Find {
    /// Those without protection: written to, or discarded and perhaps populated again.
    Written,
    /// Those without even a page table: discarded together with their neighbours.
    Hole,
}

/// The page tables of this process.
pub(super) struct Pagemap(File);

impl Pagemap {
    pub(super) fn open() -> Result<Self, LogError> {
        let unsupported = |source| LogError::Unsupported {
            what: "the PAGEMAP_SCAN ioctl of /proc/self/pagemap",
            needs: "Linux 6.7, built with CONFIG_PROC_PAGE_MONITOR, and /proc of this process readable",
            source,
        };
        let pagemap = Pagemap(File::open("/proc/self/pagemap").map_err(unsupported)?);
        pagemap
            .find_and_protect(Find::Written, &(0..0), &mut [])
            .map_err(unsupported)?;
        Ok(pagemap)
    }

    /// Finds pages of `range`, protects them in the same step, and writes them to `found` as address ranges.
    /// Returns how many ranges were found, and the address where the search ended for want of room.
    ///
    /// After an error nothing is known of the pages of `range`: some may have been protected.
    pub(super) fn find_and_protect(
        &self,
        find: Find,
        range: &Range<u64>,
        found: &mut [page_region],
    ) -> io::Result<(usize, u64)> {
        // A page is in `mask` if it has all these categories, those in `inverted` turned round. The kernel
        // has a fast path for the first case.
        let (inverted, mask) = match find {
            Find::Written => (0, PAGE_IS_WRITTEN),
            Find::Hole => {
                // A protected page that is not populated counts as swapped: it has a marker in its place.
                let neither = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
                (neither, neither)
            }
        };
        let mut scan = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: (PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC).into(),
            start: range.start,
            end: range.end,
            walk_end: 0,
            vec: found.as_mut_ptr().expose_provenance() as u64,
            vec_len: found.len() as u64,
            max_pages: 0, // no limit
            category_inverted: inverted.into(),
            category_mask: mask.into(),
            category_anyof_mask: 0,
            return_mask: mask.into(),
        };
        // SAFETY: the ioctl reads and writes one pm_scan_arg of the size given in it, and writes at most
        // vec_len page_regions at vec, which `found` has room for and which is borrowed mutably.
        let regions = unsafe { ioctl_with_mut_ref(&self.0, PAGEMAP_SCAN(), &mut scan) };
        match usize::try_from(regions) {
            Ok(regions) => Ok((regions, scan.walk_end)),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

/// What the kernel says of discarded pages whose page table has gone too, as that of a huge page does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Holes {
    /// They are [`Find::Written`] (Linux 6.18.44, if not before).
    Written,
    /// They are not, and must be looked for with [`Find::Hole`]; that is five times as slow.
    NotWritten,
}

impl Holes {
    /// Finds out with memory that has never had a page table.
    pub(super) fn probe(uffd: &WriteProtector, pagemap: &Pagemap) -> io::Result<Self> {
        const PAGE_TABLE_SPAN: usize = 2 << 20;
        let length = 2 * PAGE_TABLE_SPAN; // so that one span lies in it as a whole
        // SAFETY: a new mapping, wherever the kernel has room for it.
        let mapping = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                length,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )
        }?;
        let start = mapping.addr().next_multiple_of(PAGE_TABLE_SPAN) as u64;
        let hole = start..start + PAGE_TABLE_SPAN as u64;
        let mut found = [NOTHING; 2];
        let result = uffd
            .register(&hole)
            .and_then(|()| pagemap.find_and_protect(Find::Written, &hole, &mut found));
        // SAFETY: mapped above, and nobody else knows of it.
        unsafe { munmap(mapping, length) }?;
        Ok(match result? {
            (0, _) => Holes::NotWritten,
            _ => Holes::Written,
        })
    }
}

/// # Safety
///
/// `arg` must be what the kernel reads and writes for `request`.
unsafe fn control<T>(fd: &impl AsRawFd, request: u64, arg: &mut T) -> io::Result<()> {
    // SAFETY: the caller's promise.
    match unsafe { ioctl_with_mut_ref(fd, request, arg) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn uffd_range(range: &Range<u64>) -> uffdio_range {
    uffdio_range {
        start: range.start,
        len: range.end - range.start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_search_finds_a_hole_once() {
        let (uffd, pagemap) = match WriteProtector::open().and_then(|u| Ok((u, Pagemap::open()?))) {
            Ok(both) => both,
            Err(e) => return eprintln!("SKIPPED: {e}"),
        };
        let searches = match Holes::probe(&uffd, &pagemap).unwrap() {
            Holes::Written => [Find::Written, Find::Hole].as_slice(),
            Holes::NotWritten => &[Find::Hole],
        };
        for &find in searches {
            // SAFETY: a new mapping, wherever the kernel has room for it.
            let mapping = unsafe {
                mmap_anonymous(
                    ptr::null_mut(),
                    8 << 20,
                    ProtFlags::empty(),
                    MapFlags::PRIVATE,
                )
            }
            .unwrap();
            let start = mapping.addr().next_multiple_of(2 << 20) as u64;
            let hole = start..start + (4 << 20);
            uffd.register(&hole).unwrap();
            let mut found = [NOTHING; 8];
            let first = pagemap.find_and_protect(find, &hole, &mut found).unwrap();
            assert_eq!(first, (1, hole.end), "{find:?}");
            assert_eq!((found[0].start, found[0].end), (hole.start, hole.end));
            for find in [Find::Written, Find::Hole] {
                let again = pagemap.find_and_protect(find, &hole, &mut found).unwrap();
                assert_eq!(again, (0, hole.end), "{find:?}");
            }
            // SAFETY: mapped above, and nobody else knows of it.
            unsafe { munmap(mapping, 8 << 20) }.unwrap();
        }
    }
}
