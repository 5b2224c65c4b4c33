//! The memory of one vCPU: its pages and its ledger.

use super::ledger::{BLOCK, Ledger};
use super::page::Page;
use super::plan::{Plan, Share};

/// The pages of one vCPU.
pub struct Pages<'a> {
    plan: &'a Plan,
    first: u64,
    count: u64,
}

/// Takes possession of what the plan gives one vCPU.
///
/// # Safety
///
/// The plan must have been made from RAM that is mapped and that nothing else uses, and each vCPU's
/// share may be taken once.
pub unsafe fn take<'a>(plan: &'a Plan, share: &Share) -> (Pages<'a>, Ledger<'a>) {
    let count = share.ws + share.cold;
    let blocks = (count as usize).div_ceil(BLOCK);
    // SAFETY: the plan gives the vCPU so many words there, page-aligned, which overlap with nothing
    // else; any bits are a valid number; the caller promises that they are RAM and its own.
    let (generations, sums) = unsafe {
        (
            core::slice::from_raw_parts_mut(share.generations as *mut u64, count as usize),
            core::slice::from_raw_parts_mut(share.sums as *mut u64, blocks),
        )
    };
    let pages = Pages {
        plan,
        first: share.first,
        count,
    };
    (pages, Ledger::new(generations, sums))
}

impl Pages<'_> {
    /// The guest-wide number of page `index` of this vCPU.
    pub fn number(&self, index: usize) -> u64 {
        self.first + index as u64
    }

    /// The address of page `index` of this vCPU.
    pub fn address(&self, index: usize) -> u64 {
        self.plan.address(self.number(index))
    }

    /// Page `index` of this vCPU.
    pub fn get(&mut self, index: usize) -> &mut Page {
        assert!((index as u64) < self.count);
        let page = self.address(index) as *mut Page;
        // SAFETY: the plan gives this page of RAM to this vCPU alone (see `take`), `self` is borrowed
        // for as long as the reference lives, and any bits are a valid page.
        unsafe { &mut *page }
    }
}
