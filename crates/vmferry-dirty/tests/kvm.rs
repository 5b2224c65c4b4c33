//! KVM's dirty log on a virtual machine without vCPUs: what can be seen of it before anybody writes.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use vm_memory::mmap::MmapRegion;
use vmferry_dirty::log::{KvmDirtyLog, KvmSlot};
use vmferry_dirty::{BlockIndex, DirtyLog, PAGE_SIZE, PageRange};

const BLOCK: BlockIndex = BlockIndex(0);

/// A virtual machine with two slots of `BLOCK`, neither of which ends with a word of the bitmap: pages 0 to 69, and 128
/// to 137. `None`, said loudly, where there is no KVM.
fn log() -> Option<(KvmDirtyLog, MmapRegion)> {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("SKIPPED: /dev/kvm is missing or not usable");
        return None;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let memory = MmapRegion::new(138 * PAGE_SIZE).unwrap();
    let slots = [(0, 0, 70), (1, 128, 10)].map(|(slot, first_page, pages)| KvmSlot {
        slot,
        guest_addr: (first_page * PAGE_SIZE) as u64,
        host_addr: memory.as_ptr() as u64 + (first_page * PAGE_SIZE) as u64,
        block: BLOCK,
        first_page,
        pages,
    });
    for slot in &slots {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: 0,
            guest_phys_addr: slot.guest_addr,
            memory_size: (slot.pages * PAGE_SIZE) as u64,
            userspace_addr: slot.host_addr,
        };
        // SAFETY: the slot lies in `memory`, which outlives the virtual machine: the caller gets both, and the log
        // first.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
    }
    // SAFETY: the slots were registered just now, as described, and stay so.
    let log = unsafe { KvmDirtyLog::new(vm, slots.to_vec()) }.unwrap();
    Some((log, memory))
}

fn fetch(log: &KvmDirtyLog) -> [u64; 3] {
    let mut words = [0; 3];
    log.fetch(BLOCK, &mut words).unwrap();
    words
}

#[test]
fn a_log_reports_no_page_beyond_the_end_of_a_slot() {
    let Some((log, _memory)) = log() else { return };
    log.start().unwrap();
    let fetched = fetch(&log);
    if log.needs_arming() {
        // Initially-set, where KVM has it (Linux 5.7).
        let all = [u64::MAX, (1 << 6) - 1, (1 << 10) - 1];
        assert!(fetched == all || fetched == [0; 3], "{fetched:x?}");
        log.arm(BLOCK, PageRange::new(0, 138), &fetched).unwrap();
    }
    assert_eq!(fetch(&log), [0; 3]);
    log.stop().unwrap();
}
