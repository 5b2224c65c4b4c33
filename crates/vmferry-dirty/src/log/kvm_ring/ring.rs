//! One vCPU's ring: the entries that KVM and this process share, and the place where reading goes on.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_DIRTY_GFN_F_MASK, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};

use super::RingSize;
use crate::units::PAGE_SIZE;

/// KVM has filled the entry in.
pub(super) const DIRTY: u32 = 1;
/// This process has taken it; `KVM_RESET_DIRTY_RINGS` arms the page and frees the entry.
pub(super) const RESET: u32 = 2;

/// `struct kvm_dirty_gfn`, written by KVM at any time.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub flags: AtomicU32,
    /// Number of the address space in the upper 16 bits, of the slot in the lower.
    pub slot: AtomicU32,
    /// Page in the slot.
    pub offset: AtomicU64,
}

const _: () = {
    assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());
    assert!(align_of::<Entry>() == align_of::<kvm_dirty_gfn>());
    assert!(std::mem::offset_of!(Entry, flags) == std::mem::offset_of!(kvm_dirty_gfn, flags));
    assert!(std::mem::offset_of!(Entry, slot) == std::mem::offset_of!(kvm_dirty_gfn, slot));
    assert!(std::mem::offset_of!(Entry, offset) == std::mem::offset_of!(kvm_dirty_gfn, offset));
    assert!(DIRTY | RESET == KVM_DIRTY_GFN_F_MASK);
};

/// A ring mapped from its vCPU.
///
/// # Invariant
///
/// `entries` points to `size` entries that stay mapped, readable and writable, while the value lives, and are
/// accessed by atomic operations only, here and (as KVM's side of the protocol has it) there.
pub(super) struct MappedRing {
    entries: NonNull<Entry>,
    size: RingSize,
}

// SAFETY: the entries are atomics, and a mapping can be used and unmapped from any thread.
unsafe impl Send for MappedRing {}

impl MappedRing {
    /// Maps the ring of `vcpu`, a vCPU that was created when rings of `size` had been enabled.
    pub fn map(vcpu: &impl AsRawFd, size: RingSize) -> io::Result<Self> {
        let fd: RawFd = vcpu.as_raw_fd();
        let at = KVM_DIRTY_LOG_PAGE_OFFSET as usize * PAGE_SIZE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory. It keeps the
        // vCPU and so the ring alive, whatever becomes of `fd`.
        let mapped = unsafe {
            libc::mmap(
                null_mut(),
                size.bytes(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                at as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(mapped.cast()).expect("nothing is mapped at address 0");
        Ok(MappedRing { entries, size })
    }

    pub fn entries(&self) -> &[Entry] {
        // SAFETY: by the type's invariant; the length is that of the mapping.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.size.entries() as usize) }
    }
}

impl Drop for MappedRing {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map`, and no reference to it outlives `self`.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.size.bytes()) };
    }
}

/// Where reading a ring goes on. Entries must be taken in order, each once: KVM frees them in order, too.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// Entries taken since the ring was created, modulo 2^32.
    next: u32,
}

impl Reader {
    /// Takes all entries that KVM has filled in and shows their `slot` and `offset` to `take`, as they are: KVM
    /// is trusted, but nothing is accessed on its word. Returns how many there were.
    ///
    /// Each must have left its trace when `take` returns: from then on KVM may arm the page.
    pub fn collect(&mut self, entries: &[Entry], mut take: impl FnMut(u32, u64)) -> u64 {
        let mask = entries.len() - 1;
        debug_assert!(entries.len().is_power_of_two());
        let mut taken = 0;
        // Once round at most: what was taken here is not free before the next reset.
        while taken < entries.len() as u64 {
            let entry = &entries[self.next as usize & mask];
            // Acquire: the rest of the entry is read after KVM has filled it in. An entry that is to be reset
            // may keep its DIRTY bit, and was taken before.
            if entry.flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK != DIRTY {
                break;
            }
            take(
                entry.slot.load(Ordering::Relaxed),
                entry.offset.load(Ordering::Relaxed),
            );
            // Release: KVM may use the entry again once it sees this, so it has been read by then.
            entry.flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            taken += 1;
        }
        taken
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A ring in plain memory, with KVM's side of it.
    pub(in super::super) struct FakeRing {
        pub entries: Vec<Entry>,
        dirty: usize,
        reset: usize,
    }

    impl FakeRing {
        pub fn new(size: usize) -> Self {
            FakeRing {
                entries: (0..size).map(|_| Entry::default()).collect(),
                dirty: 0,
                reset: 0,
            }
        }

        /// What KVM does when the guest writes; panics where KVM would lose the page.
        pub fn push(&mut self, slot: u32, offset: u64) {
            assert!(self.dirty - self.reset < self.entries.len(), "overrun");
            let entry = &self.entries[self.dirty % self.entries.len()];
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(offset, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
            self.dirty += 1;
        }

        /// `KVM_RESET_DIRTY_RINGS`, at most `limit` entries of it; returns how many.
        pub fn reset(&mut self, limit: usize) -> usize {
            let before = self.reset;
            while self.reset - before < limit {
                let entry = &self.entries[self.reset % self.entries.len()];
                if entry.flags.load(Ordering::Acquire) & RESET == 0 {
                    break;
                }
                entry.flags.store(0, Ordering::Release);
                self.reset += 1;
            }
            self.reset - before
        }
    }

    fn collect(reader: &mut Reader, ring: &FakeRing) -> Vec<u64> {
        let mut offsets = Vec::new();
        let taken = reader.collect(&ring.entries, |slot, offset| {
            assert_eq!(slot, 3);
            offsets.push(offset);
        });
        assert_eq!(taken, offsets.len() as u64);
        offsets
    }

    #[test]
    fn entries_are_taken_in_order_around_the_end() {
        let mut ring = FakeRing::new(8);
        let mut reader = Reader {
            next: u32::MAX - 15, // and around the end of the counter
        };
        for round in 0..10 {
            let some: Vec<u64> = (0..5).map(|n| round * 100 + n).collect();
            some.iter().for_each(|&offset| ring.push(3, offset));
            assert_eq!(collect(&mut reader, &ring), some);
            assert_eq!(collect(&mut reader, &ring), [0; 0], "taken twice");
            assert_eq!(ring.reset(99), 5);
        }
    }

    #[test]
    fn a_full_ring_is_taken_once_and_goes_on_when_it_was_reset() {
        let mut ring = FakeRing::new(8);
        let mut reader = Reader::default();
        (0..8).for_each(|offset| ring.push(3, offset));
        assert_eq!(collect(&mut reader, &ring), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(collect(&mut reader, &ring), [0; 0]);
        assert_eq!(ring.reset(3), 3);
        ring.push(3, 8);
        assert_eq!(collect(&mut reader, &ring), [8]);
        assert_eq!(ring.reset(99), 6);
    }

    #[test]
    fn nothing_is_taken_past_an_entry_that_is_not_filled_in() {
        let mut ring = FakeRing::new(8);
        let mut reader = Reader::default();
        (0..3).for_each(|offset| ring.push(3, offset));
        // The second is not there yet, as another processor may see it: flags come in any order.
        ring.entries[1].flags.store(0, Ordering::Relaxed);
        assert_eq!(collect(&mut reader, &ring), [0]);
        for not_new in [RESET, RESET | DIRTY] {
            ring.entries[1].flags.store(not_new, Ordering::Relaxed);
            assert_eq!(collect(&mut reader, &ring), [0; 0]);
        }
        ring.entries[1].flags.store(DIRTY, Ordering::Relaxed);
        assert_eq!(collect(&mut reader, &ring), [1, 2]);
    }
}
