//! KVM memory slots: what both of KVM's dirty logs stand on.

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::LogError;
use crate::units::{BlockIndex, PAGE_SIZE, PageRange};
use crate::words::WORD_BITS;

/// A KVM memory slot and the pages of a RAM block that it shows to the guest.
#[derive(Clone, Copy, Debug)]
pub struct KvmSlot {
    /// The slot's number.
    pub slot: u32,
    /// Where the guest sees it, in bytes.
    pub guest_addr: u64,
    /// Where this process has it mapped, in bytes.
    pub host_addr: u64,
    /// The RAM block that the slot is part of.
    pub block: BlockIndex,
    /// The slot's first page in that block; a multiple of 64.
    pub first_page: usize,
    /// Pages in the slot.
    pub pages: usize,
}

impl KvmSlot {
    pub(super) fn range(&self) -> PageRange {
        PageRange::new(self.first_page, self.first_page + self.pages)
    }
}

/// Slots, found by block and by number.
pub(super) struct SlotTable {
    /// In the order of their numbers.
    slots: Vec<KvmSlot>,
}

impl SlotTable {
    pub fn new(mut slots: Vec<KvmSlot>) -> Self {
        assert!(
            slots.iter().all(|s| s.first_page % WORD_BITS == 0),
            "a slot begins in the middle of a bitmap word"
        );
        slots.sort_unstable_by_key(|s| s.slot);
        SlotTable { slots }
    }

    /// The slots that are part of `block`.
    pub fn of(&self, block: BlockIndex) -> impl Iterator<Item = &KvmSlot> {
        self.slots.iter().filter(move |s| s.block == block)
    }

    /// The block and the page in it that page `offset` of slot number `slot` is; `None` if there is no such
    /// slot or it has no such page.
    pub fn locate(&self, slot: u32, offset: u64) -> Option<(BlockIndex, usize)> {
        let found = self.slots.binary_search_by_key(&slot, |s| s.slot).ok()?;
        let slot = &self.slots[found];
        let offset = usize::try_from(offset).ok().filter(|o| *o < slot.pages)?;
        Some((slot.block, slot.first_page + offset))
    }

    /// How many pages each block has, as far as its slots reach.
    pub fn block_pages(&self) -> Vec<usize> {
        let mut pages = Vec::new();
        for slot in &self.slots {
            if pages.len() <= slot.block.0 {
                pages.resize(slot.block.0 + 1, 0);
            }
            let block = &mut pages[slot.block.0];
            *block = slot.range().end.0.max(*block);
        }
        pages
    }
}

/// Slots of a virtual machine, whose writes KVM can be told to log.
///
/// # Invariant
///
/// Every slot in `table` is registered with `vm` exactly as described there, from [`KvmSlots::new`] on for as
/// long as this value lives.
pub(super) struct KvmSlots {
    vm: Arc<VmFd>,
    table: SlotTable,
}

impl KvmSlots {
    /// # Safety
    ///
    /// The slots must be registered with `vm` as described, without flags, and stay registered, and their
    /// memory mapped, while the returned value lives.
    pub unsafe fn new(vm: Arc<VmFd>, slots: Vec<KvmSlot>) -> Self {
        KvmSlots {
            vm,
            table: SlotTable::new(slots),
        }
    }

    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub fn table(&self) -> &SlotTable {
        &self.table
    }

    /// Has KVM log the writes to all slots from its return on.
    pub fn log_on(&self) -> Result<(), LogError> {
        self.set_flags(KVM_MEM_LOG_DIRTY_PAGES, "switch the KVM dirty log on")
    }

    /// Ends that.
    pub fn log_off(&self) -> Result<(), LogError> {
        self.set_flags(0, "switch the KVM dirty log off")
    }

    fn set_flags(&self, flags: u32, action: &'static str) -> Result<(), LogError> {
        for slot in &self.table.slots {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags,
                guest_phys_addr: slot.guest_addr,
                memory_size: (slot.pages * PAGE_SIZE) as u64,
                userspace_addr: slot.host_addr,
            };
            // SAFETY: by the type's invariant this very region is registered already and its memory is
            // mapped; only its flags change.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| LogError::Kernel {
                action,
                block: slot.block,
                source: e.into(),
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_found_by_slot_and_nothing_else_is() {
        let slot = |slot, block, first_page, pages| KvmSlot {
            slot,
            guest_addr: 0,
            host_addr: 0,
            block: BlockIndex(block),
            first_page,
            pages,
        };
        let table = SlotTable::new(vec![
            slot(7, 0, 128, 10),
            slot(2, 1, 0, 64),
            slot(5, 0, 0, 100),
        ]);
        assert_eq!(table.block_pages(), [138, 64]);
        for (number, offset, found) in [
            (7, 0, Some((BlockIndex(0), 128))),
            (7, 9, Some((BlockIndex(0), 137))),
            (7, 10, None),
            (5, 99, Some((BlockIndex(0), 99))),
            (2, 63, Some((BlockIndex(1), 63))),
            (2, u64::MAX, None),
            (3, 0, None),
            (1 << 16 | 2, 0, None), // another address space
        ] {
            assert_eq!(table.locate(number, offset), found, "{number}, {offset}");
        }
    }
}
