//! KVM's dirty ring: one ring a vCPU, in which the kernel notes each page that this vCPU makes dirty.
//!
//! The bitmap of [`KvmDirtyLog`](super::KvmDirtyLog) costs time by how much RAM there is, at every sync. A ring
//! costs time by how much was written, and tells which vCPU wrote it. It needs Linux 5.11.
//!
//! # An entry's way
//!
//! KVM write-protects a page (or clears its dirty bit, where the CPU logs writes). The next write to it makes it
//! writable, and KVM fills in an entry of the writing vCPU's ring (`DIRTY`). *Collecting* reads the entry, sets
//! the page's bit in memory of this process, and hands the entry back (`RESET`). `KVM_RESET_DIRTY_RINGS` protects
//! the pages of all entries handed back, flushes the TLBs, and frees the entries. Collecting and reset happen under
//! one mutex, always together: *harvesting*. There is no state in between that another thread could see.
//!
//! # Who harvests
//!
//! [`fetch`](super::DirtyLog::fetch), and a vCPU whose ring is full: KVM does not let it go on before a reset, and
//! its thread calls [`make_room`](KvmDirtyRing::make_room). It could ask the migration thread instead. But that
//! thread may be in the middle of a pass, or wait for its peer, and meanwhile the guest would stand still for
//! nothing. The vCPU has nothing better to do, and what it harvests (the rings of all vCPUs, since the flush of
//! the TLBs that comes with a reset disturbs them all anyway) waits in this process for the next fetch.
//!
//! # No lost page (law 1), protect before read (law 3)
//!
//! A page is *reported* by a fetch, then read by the migration, and every write after that reading must be
//! reported by a later fetch. Whatever harvested the page, its reset came before the fetch returned, so before the
//! page is read because of it: a fetch arms what it reports, and `needs_arming` is false. Now take a write that
//! comes
//!
//! - before its page's entry is collected: the page's bit is set after it and the page is read after that, with
//!   the write in it;
//! - between collecting and reset: it is not logged, but the page's bit is set, and the page will be read after
//!   the reset because of it. A reset that KVM does only in part (a signal came) is repeated until it is whole; if
//!   it fails, so does the fetch, the bits stay, and the next harvest begins with that reset;
//! - after the reset: it faults (or sets the CPU's dirty bit) and makes an entry of its own.
//!
//! A harvest by a full ring in the middle of a pass changes nothing of that. Say page P waits in the bitmap, or is
//! being read right now, and is written, harvested by a vCPU and reset: its bit waits for the next fetch, so it
//! will be read once more. Harvests can report a page too often and never too seldom.
//!
//! A CPU that logs writes itself (Intel's PML) keeps up to 512 pages in a buffer of its own, which KVM moves into
//! the ring at the vCPU's next exit. Until then a fetch does not see them; they are not lost but late, like a
//! write that comes after the fetch. The fetch that must see everything is the last one, when the guest is
//! paused: then each vCPU has left the guest, and its buffer is empty. The ring has room for the buffer beyond the
//! point at which it counts as full.
//!
//! KVM notes writes in the ring of the vCPU that makes them, also those it makes itself on behalf of one (kvmclock,
//! for instance). It makes none on x86-64 without a vCPU; devices are the VMM's, and in
//! [`VmmWriteLog`](super::VmmWriteLog).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVMIO, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use super::kvm_slots::{KvmSlot, KvmSlots};
use super::{DirtyLog, LogError};
use crate::units::{BlockIndex, PAGE_SIZE, PageRange};

mod ring;
mod written;

use ring::{MappedRing, Reader};
use written::Written;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Bytes of an entry.
const ENTRY: usize = size_of::<kvm_dirty_gfn>();

/// How often a reset may do nothing in a row, as a signal came, before it counts as failed.
const RESET_ATTEMPTS: u32 = 1000;

/// How many pages the ring of one vCPU has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize {
    entries: u32,
}

impl RingSize {
    /// The smallest that KVM accepts: a page of entries. Where the CPU logs writes by itself KVM needs more
    /// (1024 entries with Intel's PML), and says so when the rings are enabled.
    pub const MIN: RingSize = RingSize {
        entries: (PAGE_SIZE / ENTRY) as u32,
    };

    /// A ring of so many entries.
    ///
    /// # Errors
    ///
    /// It must be a power of two and at least [`MIN`](Self::MIN).
    pub fn new(entries: u32) -> Result<Self, LogError> {
        if entries.is_power_of_two() && entries >= Self::MIN.entries {
            Ok(RingSize { entries })
        } else {
            Err(LogError::RingSize {
                entries,
                hint: format!("it must be a power of two from {} on", Self::MIN.entries),
            })
        }
    }

    /// Entries of the ring, each for one page.
    pub fn entries(self) -> u32 {
        self.entries
    }

    fn bytes(self) -> usize {
        self.entries as usize * ENTRY
    }
}

impl Default for RingSize {
    /// 65,536 entries, the most that KVM allows so far: 1 MiB of memory a vCPU.
    ///
    /// A full ring arms pages long before the next sync, and the guest's next writes to them fault once more: a
    /// guest that rewrote 4 MiB as fast as it could got to 1,340,000 pages/s with such rings, to 66,000 with 1,024
    /// entries and to 21,000 with 256 (KVM/PVM, a sync every 100 ms).
    fn default() -> Self {
        RingSize { entries: 1 << 16 }
    }
}

/// The dirty rings of a virtual machine, enabled but without vCPUs.
///
/// They can be enabled only before the first vCPU is created, and mapped only afterwards:
/// [`into_log`](Self::into_log) completes them.
pub struct KvmDirtyRings {
    vm: Arc<VmFd>,
    size: RingSize,
}

impl KvmDirtyRings {
    /// The capability by which the rings are enabled and the size up to which they may be, or `None` if `vm` cannot
    /// have any.
    fn offer(vm: &VmFd) -> Option<(u32, RingSize)> {
        // x86-64 has both, where the kernel knows both; the newer name promises no more there.
        [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
            .into_iter()
            .find_map(|cap| {
                let bytes = vm.check_extension_raw(cap.into());
                let entries = u32::try_from(bytes).ok()? / ENTRY as u32;
                Some((cap, RingSize::new(entries).ok()?))
            })
    }

    /// The largest ring that `vm` can have, or `None` if it cannot have any.
    pub fn largest(vm: &VmFd) -> Option<RingSize> {
        Self::offer(vm).map(|(_, largest)| largest)
    }

    /// Gives every vCPU of `vm` that will be created a ring. From then on `vm` cannot have another dirty log.
    ///
    /// # Errors
    ///
    /// KVM has no dirty ring ([`LogError::NoRing`]), or not of this size ([`LogError::RingSize`]), or a vCPU exists
    /// already.
    pub fn enable(vm: Arc<VmFd>, size: RingSize) -> Result<Self, LogError> {
        let (cap, largest) = Self::offer(&vm).ok_or(LogError::NoRing)?;
        if size.entries > largest.entries {
            return Err(LogError::RingSize {
                entries: size.entries,
                hint: format!("this host's KVM has at most {}", largest.entries),
            });
        }
        let enable = kvm_enable_cap {
            cap,
            args: [size.bytes() as u64, 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&enable)
            .map_err(|e| match size.entries < 1024 {
                true => LogError::RingSize {
                    entries: size.entries,
                    hint: format!(
                        "this host's KVM refuses it ({e}), as its CPU logs writes: use 1024 or more"
                    ),
                },
                false => LogError::Machine {
                    action: "enable the dirty rings of the vCPUs",
                    source: e.into(),
                },
            })?;
        Ok(KvmDirtyRings { vm, size })
    }

    /// Maps the rings of all vCPUs; `vcpus` has them in the order in which
    /// [`written_per_vcpu`](DirtyLog::written_per_vcpu) counts. The log is off until [`DirtyLog::start`].
    ///
    /// # Errors
    ///
    /// A ring cannot be mapped.
    ///
    /// # Safety
    ///
    /// The slots must be registered with the virtual machine as described, without flags, and stay registered, and
    /// their memory mapped, while the returned value lives: the log is switched on by registering them again.
    pub unsafe fn into_log(
        self,
        slots: Vec<KvmSlot>,
        vcpus: &[&VcpuFd],
    ) -> Result<KvmDirtyRing, LogError> {
        let vcpus = vcpus
            .iter()
            .map(|&vcpu| {
                Ok(VcpuRing {
                    ring: MappedRing::map(vcpu, self.size)?,
                    reader: Reader::default(),
                    written: 0,
                })
            })
            .collect::<Result<_, _>>()
            .map_err(|source| LogError::Machine {
                action: "map the dirty ring of a vCPU",
                source,
            })?;
        // SAFETY: passed on to the caller.
        let slots = unsafe { KvmSlots::new(self.vm, slots) };
        let state = State {
            logging: Logging::Off,
            vcpus,
            collected: Written::new(&slots.table().block_pages()),
            unreset: 0,
        };
        Ok(KvmDirtyRing(Arc::new(Shared {
            slots,
            size: self.size,
            state: Mutex::new(state),
        })))
    }
}

/// The dirty log of a KVM virtual machine with dirty rings. A clone is the same log, for the thread of a vCPU that
/// may have to [make room](Self::make_room).
///
/// See the head of the source file for how it works, and why it keeps laws 1 and 3.
#[derive(Clone)]
pub struct KvmDirtyRing(Arc<Shared>);

struct Shared {
    slots: KvmSlots,
    size: RingSize,
    state: Mutex<State>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Logging {
    On,
    /// What is found in the rings is left over, and of no interest.
    Off,
}

struct VcpuRing {
    ring: MappedRing,
    reader: Reader,
    /// Pages logged since the log was started.
    written: u64,
}

struct State {
    logging: Logging,
    vcpus: Vec<VcpuRing>,
    /// Collected and not fetched.
    collected: Written,
    /// Entries handed back to KVM that it has not reset: none, but after a failure.
    unreset: u64,
}

impl KvmDirtyRing {
    /// How many entries each vCPU's ring has.
    pub fn size(&self) -> RingSize {
        self.0.size
    }

    /// Empties the rings, so that a vCPU whose ring was full can go on. To be called by its thread when `KVM_RUN`
    /// ends with `KVM_EXIT_DIRTY_RING_FULL`, whether the log is on or not. What was in the rings is reported by the
    /// next fetch.
    ///
    /// # Errors
    ///
    /// KVM cannot reset the rings, so the vCPU cannot go on. Nothing that was collected is lost.
    pub fn make_room(&self) -> Result<(), LogError> {
        self.lock().harvest(&self.0.slots)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No step of a harvest can panic half done.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Collects everything that is in the rings, and has KVM reset it.
    fn harvest(&mut self, slots: &KvmSlots) -> Result<(), LogError> {
        for vcpu in &mut self.vcpus {
            let taken = vcpu.reader.collect(vcpu.ring.entries(), |slot, offset| {
                if self.logging == Logging::On {
                    self.collected.add(slots.table(), slot, offset);
                }
            });
            if self.logging == Logging::On {
                vcpu.written += taken;
            }
            self.unreset += taken;
        }
        let strays = self.collected.take_strays();
        if strays > 0 {
            tracing::warn!(
                strays,
                "the dirty ring names pages outside of the guest's RAM; ignored"
            );
        }
        self.reset(slots.vm())
    }

    /// Has KVM reset what was handed back.
    fn reset(&mut self, vm: &VmFd) -> Result<(), LogError> {
        reset_all(&mut self.unreset, || {
            // SAFETY: the ioctl has no argument and touches no memory of this process but the rings' entries.
            let reset = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
            u64::try_from(reset).map_err(|_| io::Error::last_os_error())
        })
        .map_err(|source| LogError::Machine {
            action: "reset the dirty rings of the vCPUs",
            source,
        })
    }

    fn set_logging(&mut self, logging: Logging) {
        self.logging = logging;
        self.collected.clear();
    }
}

/// Repeats `reset`, which returns how many entries it has reset, until `unreset` of them are. KVM stops early when a
/// signal comes, and reports success all the same.
fn reset_all(unreset: &mut u64, mut reset: impl FnMut() -> io::Result<u64>) -> io::Result<()> {
    let mut in_vain = 0;
    while *unreset > 0 {
        let done = match reset() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            done => done?,
        };
        *unreset = unreset.saturating_sub(done);
        in_vain = if done == 0 { in_vain + 1 } else { 0 };
        if in_vain > RESET_ATTEMPTS {
            return Err(io::Error::other("KVM finds nothing to reset"));
        }
    }
    Ok(())
}

impl DirtyLog for KvmDirtyRing {
    fn start(&self) -> Result<(), LogError> {
        let mut state = self.lock();
        // What is left of an earlier time goes.
        state.set_logging(Logging::Off);
        state.harvest(&self.0.slots)?;
        state.set_logging(Logging::On);
        state.vcpus.iter_mut().for_each(|vcpu| vcpu.written = 0);
        // A vCPU fills its ring from now on.
        drop(state);
        self.0.slots.log_on()
    }

    fn stop(&self) -> Result<(), LogError> {
        // From now on entries are only drained. First, so that it holds whatever fails.
        self.lock().set_logging(Logging::Off);
        self.0.slots.log_off()?;
        self.lock().harvest(&self.0.slots)
    }

    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        let mut state = self.lock();
        state.harvest(&self.0.slots)?;
        state.collected.drain_into(block.0, into);
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        false
    }

    fn arm(&self, _: BlockIndex, _: PageRange, _: &[u64]) -> Result<(), LogError> {
        Ok(())
    }

    fn written_per_vcpu(&self) -> Option<Vec<u64>> {
        Some(self.lock().vcpus.iter().map(|vcpu| vcpu.written).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::ring::tests::FakeRing;
    use super::*;

    #[test]
    fn sizes_are_powers_of_two_from_a_page_of_entries_on() {
        for entries in [256, 1024, 1 << 16, 1 << 31] {
            assert_eq!(RingSize::new(entries).unwrap().entries(), entries);
        }
        for entries in [0, 1, 128, 257, 1000, u32::MAX] {
            let error = RingSize::new(entries).unwrap_err().to_string();
            assert!(error.contains("power of two from 256 on"), "{error}");
            assert!(error.contains(&entries.to_string()), "{error}");
        }
    }

    #[test]
    fn a_reset_that_is_interrupted_is_completed() {
        let mut ring = FakeRing::new(16);
        (0..12).for_each(|page| ring.push(0, page));
        let mut unreset = Reader::default().collect(&ring.entries, |_, _| {});
        let mut calls = 0;
        reset_all(&mut unreset, || {
            calls += 1;
            match calls % 3 {
                0 => Err(io::ErrorKind::Interrupted.into()),
                1 => Ok(0),
                _ => Ok(ring.reset(5) as u64),
            }
        })
        .unwrap();
        assert_eq!((unreset, calls), (0, 8));
        assert_eq!(ring.reset(99), 0, "all were reset");
    }

    #[test]
    fn a_reset_that_fails_is_still_to_be_done() {
        let mut unreset = 7;
        let error = reset_all(&mut unreset, || Ok(0)).unwrap_err();
        assert_eq!(error.to_string(), "KVM finds nothing to reset");
        reset_all(&mut unreset, || Err(io::ErrorKind::Other.into())).unwrap_err();
        assert_eq!(unreset, 7);
    }
}
