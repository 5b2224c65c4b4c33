//! Maps all RAM, identity, in 2 MiB pages: they suit shadow paging better than 1 GiB pages.
//!
//! `entry.s` has mapped the first GiB. The rest is done here, in ring 3, because the page tables are
//! ordinary writable memory and this code runs natively. New tables are complete before they are
//! linked in, so that a shadowing hypervisor sees one write per GiB.

use super::pvh::{RamMap, Region};

const GIB: u64 = 1 << 30;
const LARGE: u64 = 2 << 20;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// The same, and dirty, 2 MiB.
const PAGE: u64 = 0xe7;
/// One table of 512 GiB is all there is.
const LIMIT: u64 = 512 * GIB;

unsafe extern "C" {
    static mut boot_pdpt: [u64; 512];
    static mut boot_pd3: [u64; 512];
    static image_end: u8;
}

/// First address after the guest's image.
pub fn image_end_address() -> u64 {
    (&raw const image_end) as u64
}

/// Maps the RAM above 1 GiB and returns the regions that the program may use: all RAM from 1 MiB,
/// without the image and the page tables, which are taken from the memory right after the image.
pub fn map(ram: &RamMap) -> RamMap {
    let mut free = image_end_address();
    for region in ram.regions() {
        let end = region.end.min(LIMIT);
        let mut gib = (region.start / GIB).max(1);
        while gib * GIB < end {
            let table = match gib {
                3 => &raw mut boot_pd3,
                // SAFETY: only this function writes the page tables, and the other processors do not
                // run yet.
                _ => match unsafe { boot_pdpt[gib as usize] } {
                    0 => {
                        let new = free as *mut [u64; 512];
                        free += 4096;
                        // SAFETY: the memory after the image is RAM that nothing else uses (a guest
                        // without even that cannot run), mapped by the boot tables.
                        unsafe { new.write([0; 512]) };
                        new
                    }
                    entry => (entry & !0xfff) as *mut [u64; 512],
                },
            };
            let from = region.start.max(gib * GIB) / LARGE;
            let to = end.min((gib + 1) * GIB).div_ceil(LARGE);
            for page in from..to {
                // SAFETY: `table` is a page table as above; the index is below 512.
                unsafe { (*table)[(page % 512) as usize] = (page * LARGE) | PAGE };
            }
            // SAFETY: as above. Nothing was mapped there before, so no TLB flush is needed.
            unsafe { boot_pdpt[gib as usize] = table as u64 | TABLE };
            gib += 1;
        }
    }
    let mut usable = RamMap::default();
    for region in ram.regions() {
        usable.push(Region {
            start: region.start.max(if region.start < free { free } else { 0 }),
            end: region.end.min(LIMIT),
        });
    }
    usable
}
