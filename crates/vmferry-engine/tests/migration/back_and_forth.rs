//! Law 1: a guest that writes all the time is moved again and again, and no page of it is ever stale.

use vmferry_dirty::Discipline;

use crate::common::{move_on, running_guest, with_discipline};

const TIMES: usize = 50;

fn there_and_back(discipline: Discipline) {
    let mut here = running_guest();
    for _ in 0..TIMES {
        for _ in ["there", "back"] {
            let there = move_on(&here, with_discipline(discipline));
            let left_at = here.verify();
            // For as long as it takes to write every page, so that none is right by never changing.
            there.run_some();
            assert!(there.steps() > left_at);
            here = there;
        }
    }
}

#[test]
fn under_the_per_bit_lock() {
    there_and_back(Discipline::PerBitLock);
}

#[test]
fn under_the_slice_lock() {
    there_and_back(Discipline::SliceLock);
}

#[test]
fn without_a_lock() {
    there_and_back(Discipline::LockFree);
}
