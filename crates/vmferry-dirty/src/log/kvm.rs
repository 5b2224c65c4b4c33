//! KVM's dirty log: one bitmap a memory slot, kept by the kernel.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` (Linux 5.1) fetching (`KVM_GET_DIRTY_LOG`) and re-arming
//! (`KVM_CLEAR_DIRTY_LOG`, in pieces of whole 64-page words) are two steps; with its initially-set flag
//! (Linux 5.7) the log starts out full instead of write-protecting all of memory at once when it is switched
//! on. Both are used where the kernel offers them; without, a fetch re-arms what it reports.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO, kvm_clear_dirty_log, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::kvm_slots::{KvmSlot, KvmSlots};
use super::{DirtyLog, LogError};
use crate::units::{BlockIndex, PAGE_SIZE, PageRange};
use crate::words::{WORD_BITS, mask};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// The dirty log of a KVM virtual machine, switched on and off for a set of slots.
pub struct KvmDirtyLog {
    slots: KvmSlots,
    manual_protect: bool,
}

impl KvmDirtyLog {
    /// Prepares the log of `vm`; the log is off until [`DirtyLog::start`].
    ///
    /// # Safety
    ///
    /// The slots must be registered with `vm` as described, without flags, and stay registered, and their
    /// memory mapped, while the returned value lives: the log is switched on by registering them again.
    pub unsafe fn new(vm: Arc<VmFd>, slots: Vec<KvmSlot>) -> Result<Self, LogError> {
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let offered = vm
            .check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into())
            .cast_unsigned();
        let flags = offered & wanted;
        if flags != 0 {
            let cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                args: [flags.into(), 0, 0, 0],
                ..Default::default()
            };
            vm.enable_cap(&cap).map_err(|e| LogError::Machine {
                action: "enable manual protection of the dirty log",
                source: e.into(),
            })?;
        }
        Ok(KvmDirtyLog {
            // SAFETY: passed on to the caller.
            slots: unsafe { KvmSlots::new(vm, slots) },
            manual_protect: flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0,
        })
    }
}

fn kernel_error(action: &'static str, block: BlockIndex) -> impl Fn(kvm_ioctls::Error) -> LogError {
    move |e| LogError::Kernel {
        action,
        block,
        source: e.into(),
    }
}

/// ORs the log of a slot into that of its block, without the bits beyond the slot's last page. Those are no pages, and a
/// block has no bits beyond its end; it does not count on KVM for that.
fn merge_slot(slot: &KvmSlot, log: &[u64], into: &mut [u64]) {
    let first = slot.first_page / WORD_BITS;
    let words = slot.pages.div_ceil(WORD_BITS);
    for (word, (to, from)) in into[first..].iter_mut().zip(&log[..words]).enumerate() {
        let pages = (slot.pages - word * WORD_BITS).min(WORD_BITS);
        *to |= from & mask(0, pages);
    }
}

impl DirtyLog for KvmDirtyLog {
    fn start(&self) -> Result<(), LogError> {
        self.slots.log_on()
    }

    fn stop(&self) -> Result<(), LogError> {
        self.slots.log_off()
    }

    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        for slot in self.slots.table().of(block) {
            let words = self
                .slots
                .vm()
                .get_dirty_log(slot.slot, slot.pages * PAGE_SIZE)
                .map_err(kernel_error("fetch the KVM dirty log", block))?;
            merge_slot(slot, &words, into);
        }
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        self.manual_protect
    }

    fn arm(&self, block: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError> {
        for slot in self.slots.table().of(block) {
            let here = PageRange::new(
                range.start.0.max(slot.first_page),
                range.end.0.min(slot.range().end.0),
            );
            if here.is_empty() {
                continue;
            }
            let first_word = (here.start.0 - range.start.0) / WORD_BITS;
            let words = &pages[first_word..first_word + here.len().div_ceil(WORD_BITS)];
            let mut clear = kvm_clear_dirty_log {
                slot: slot.slot,
                num_pages: here.len() as u32,
                first_page: (here.start.0 - slot.first_page) as u64,
                ..Default::default()
            };
            clear.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
            // SAFETY: the kernel reads num_pages bits, rounded up to whole words, from dirty_bitmap, which
            // `words` holds (sliced above, with bounds checked); it writes nothing through the pointer.
            let result = unsafe { ioctl_with_ref(self.slots.vm(), KVM_CLEAR_DIRTY_LOG(), &clear) };
            if result != 0 {
                return Err(LogError::Kernel {
                    action: "re-arm the KVM dirty log",
                    block,
                    source: std::io::Error::last_os_error(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_beyond_the_end_of_a_slot_are_no_pages() {
        let slot = |first_page, pages| KvmSlot {
            slot: 0,
            guest_addr: 0,
            host_addr: 0,
            block: BlockIndex(0),
            first_page,
            pages,
        };
        let full = [u64::MAX; 3];
        let mut into = [0, 1 << 63, 0, 0];
        merge_slot(&slot(0, 70), &full, &mut into);
        assert_eq!(into, [u64::MAX, 1 << 63 | 0x3f, 0, 0]);
        into = [0; 4];
        merge_slot(&slot(64, 128), &full, &mut into);
        assert_eq!(into, [0, u64::MAX, u64::MAX, 0]);
        merge_slot(&slot(192, 1), &full, &mut into);
        assert_eq!(into, [0, u64::MAX, u64::MAX, 1]);
    }
}
