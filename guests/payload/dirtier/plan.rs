//! Which memory holds what.
//!
//! From the guest's free RAM come first the ledgers, one after the other, in the first region that has
//! room for them all; then the pages. Pages are numbered over the whole guest, vCPU by vCPU, first its
//! working set, then its cold pages, and lie one after the other in the regions, with nothing but the
//! holes between the regions between them.

use super::ledger::BLOCK;
use super::page::BYTES;

const PAGE: u64 = BYTES as u64;
const SPANS: usize = 17;

/// A run of pages in memory.
#[derive(Clone, Copy, Default)]
struct Span {
    /// Number of its first page.
    first: u64,
    /// Address of that page.
    address: u64,
    pages: u64,
}

/// The plan for all vCPUs.
pub struct Plan {
    spans: [Span; SPANS],
    ledgers: u64,
    vcpus: u64,
    ws: u64,
    cold: u64,
}

/// What belongs to one vCPU.
pub struct Share {
    /// Number of its first page.
    pub first: u64,
    /// Pages in its working set.
    pub ws: u64,
    /// Cold pages, which follow.
    pub cold: u64,
    /// Address of its ledger's generations.
    pub generations: u64,
    /// Address of its ledger's sums.
    pub sums: u64,
}

/// There is not enough RAM.
#[derive(Debug)]
pub struct Shortage {
    /// Bytes needed, for ledgers and pages.
    pub need: u64,
    /// Bytes of free RAM.
    pub have: u64,
}

/// The part of `total` that vCPU `index` of `count` gets.
pub fn part(total: u64, index: u64, count: u64) -> u64 {
    total / count + u64::from(index < total % count)
}

/// The parts of all vCPUs before `index`, together.
fn parts_before(total: u64, index: u64, count: u64) -> u64 {
    total / count * index + index.min(total % count)
}

/// Bytes for the generations of `pages` pages, and for their sums; each starts a new page.
fn ledger_bytes(pages: u64) -> [u64; 2] {
    let sums = pages.div_ceil(BLOCK as u64);
    [
        (pages * 8).next_multiple_of(PAGE),
        (sums * 8).next_multiple_of(PAGE),
    ]
}

impl Plan {
    /// Divides `ws` and `cold` pages among the vCPUs and places them in `regions` of RAM, given as
    /// first address and first address after.
    pub fn new(
        regions: impl Iterator<Item = (u64, u64)> + Clone,
        vcpus: u64,
        ws: u64,
        cold: u64,
    ) -> Result<Self, Shortage> {
        let mut plan = Self {
            spans: [Span::default(); SPANS],
            ledgers: 0,
            vcpus,
            ws,
            cold,
        };
        let ledgers = plan.ledgers_before(vcpus);
        let shortage = Shortage {
            need: (ws + cold).saturating_mul(PAGE).saturating_add(ledgers),
            have: regions.clone().map(|(start, end)| end - start).sum(),
        };
        let mut left = ws + cold;
        let mut placed = false;
        for (span, (mut start, end)) in plan.spans.iter_mut().zip(regions) {
            if !placed && end - start >= ledgers {
                plan.ledgers = start;
                start += ledgers;
                placed = true;
            }
            let pages = ((end - start) / PAGE).min(left);
            *span = Span {
                first: ws + cold - left,
                address: start,
                pages,
            };
            left -= pages;
        }
        if placed && left == 0 {
            Ok(plan)
        } else {
            Err(shortage)
        }
    }

    /// Bytes of all ledgers before that of `vcpu`.
    fn ledgers_before(&self, vcpu: u64) -> u64 {
        (0..vcpu)
            .flat_map(|before| {
                let pages = part(self.ws, before, self.vcpus) + part(self.cold, before, self.vcpus);
                ledger_bytes(pages)
            })
            .sum()
    }

    /// What belongs to `vcpu`: nothing that belongs to another.
    pub fn share(&self, vcpu: u64) -> Share {
        let ws = part(self.ws, vcpu, self.vcpus);
        let cold = part(self.cold, vcpu, self.vcpus);
        let generations = self.ledgers + self.ledgers_before(vcpu);
        Share {
            first: parts_before(self.ws, vcpu, self.vcpus)
                + parts_before(self.cold, vcpu, self.vcpus),
            ws,
            cold,
            generations,
            sums: generations + ledger_bytes(ws + cold)[0],
        }
    }

    /// Where a page lies.
    pub fn address(&self, page: u64) -> u64 {
        for span in &self.spans {
            if page.wrapping_sub(span.first) < span.pages {
                return span.address + (page - span.first) * PAGE;
            }
        }
        panic!("page {page} is not in the plan");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn parts_add_up() {
        for (total, count) in [(0, 1), (7, 3), (8, 4), (2, 4)] {
            let all: u64 = (0..count).map(|index| part(total, index, count)).sum();
            assert_eq!(all, total);
            assert_eq!(parts_before(total, count, count), total);
        }
    }

    #[test]
    fn nothing_overlaps_and_all_is_ram() {
        // 3 GiB below the hole (scaled down), the rest above 4 GiB; nearly full.
        let regions = [(3 * MIB, 12 * MIB), (4 * GIB, 4 * GIB + 8 * MIB)];
        for vcpus in [1, 2, 3, 7] {
            let (ws, cold) = (1001, 3000);
            let plan = Plan::new(regions.into_iter(), vcpus, ws, cold).unwrap();
            let mut owners = HashMap::new();
            let mut claim = |address: u64, owner: u64| {
                assert!(address.is_multiple_of(PAGE));
                assert!(
                    regions
                        .iter()
                        .any(|&(start, end)| (start..end).contains(&address))
                );
                assert_eq!(owners.insert(address, owner), None, "{address:#x} twice");
            };
            let mut next = 0;
            for vcpu in 0..vcpus {
                let share = plan.share(vcpu);
                assert_eq!(share.first, next);
                next += share.ws + share.cold;
                for page in share.first..next {
                    claim(plan.address(page), page);
                }
                let pages = share.ws + share.cold;
                for offset in (0..pages * 8).step_by(4096) {
                    claim(share.generations + offset, u64::MAX);
                }
                claim(share.sums, u64::MAX);
            }
            assert_eq!(next, ws + cold);
        }
    }

    #[test]
    fn large_memory() {
        let regions = [(2 * MIB, 3 * GIB), (4 * GIB, 65 * GIB)];
        let pages = 63 * GIB / PAGE;
        let plan = Plan::new(regions.into_iter(), 4, pages, 0).unwrap();
        let last = plan.address(pages - 1);
        assert!(last > 63 * GIB && last < 65 * GIB);
    }

    #[test]
    fn a_shortage_says_how_much() {
        let shortage = Plan::new([(MIB, 2 * MIB)].into_iter(), 1, 256, 0)
            .err()
            .unwrap();
        assert_eq!(shortage.have, MIB);
        assert_eq!(shortage.need, MIB + 2 * PAGE);
        assert!(Plan::new([(MIB, 2 * MIB)].into_iter(), 1, 254, 0).is_ok());
    }

    #[test]
    fn nothing_to_own() {
        let plan = Plan::new([(MIB, 2 * MIB)].into_iter(), 2, 1, 0).unwrap();
        let share = plan.share(1);
        assert_eq!((share.ws, share.cold), (0, 0));
    }
}
