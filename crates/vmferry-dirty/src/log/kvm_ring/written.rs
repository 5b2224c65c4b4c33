//! What was collected from the rings and not fetched yet.

use crate::log::kvm_slots::SlotTable;

/// Written pages of all blocks, as bits.
///
/// Finding them again costs time by how many there are, not by how much RAM there is.
pub(super) struct Written {
    blocks: Vec<BlockWritten>,
    /// Entries that named no page of any slot.
    strays: u64,
}

struct BlockWritten {
    words: Box<[u64]>,
    /// The words that are not zero.
    touched: Vec<usize>,
}

impl Written {
    /// Nothing, of blocks with so many pages.
    pub fn new(block_pages: &[usize]) -> Self {
        let block = |pages: &usize| BlockWritten {
            words: vec![0; pages.div_ceil(64)].into(),
            touched: Vec::new(),
        };
        Written {
            blocks: block_pages.iter().map(block).collect(),
            strays: 0,
        }
    }

    /// Adds what an entry of a ring names. An entry that names no page of the table's slots is counted and
    /// ignored: RAM that is migrated is in the table, so there is no page that could get lost.
    pub fn add(&mut self, table: &SlotTable, slot: u32, offset: u64) {
        let Some((block, page)) = table.locate(slot, offset) else {
            self.strays += 1;
            return;
        };
        let block = &mut self.blocks[block.0];
        let word = &mut block.words[page / 64];
        if *word == 0 {
            block.touched.push(page / 64);
        }
        *word |= 1 << (page % 64);
    }

    /// Moves the bits of a block into `into` (ORed).
    pub fn drain_into(&mut self, block: usize, into: &mut [u64]) {
        let Some(block) = self.blocks.get_mut(block) else {
            return; // a block without slots
        };
        for word in block.touched.drain(..) {
            into[word] |= std::mem::take(&mut block.words[word]);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for block in &mut self.blocks {
            for word in block.touched.drain(..) {
                block.words[word] = 0;
            }
        }
    }

    /// How many entries were ignored since this was last asked.
    pub fn take_strays(&mut self) -> u64 {
        std::mem::take(&mut self.strays)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::Reader;
    use super::super::ring::tests::FakeRing;
    use super::*;
    use crate::log::KvmSlot;
    use crate::units::BlockIndex;

    fn table() -> SlotTable {
        let slot = |slot, first_page, pages| KvmSlot {
            slot,
            guest_addr: 0,
            host_addr: 0,
            block: BlockIndex(0),
            first_page,
            pages,
        };
        SlotTable::new(vec![slot(0, 0, 128), slot(1, 128, 10)])
    }

    #[test]
    fn what_entries_name_becomes_bits_and_garbage_is_ignored() {
        let (table, mut ring) = (table(), FakeRing::new(16));
        let mut written = Written::new(&table.block_pages());
        for (slot, offset) in [
            (1, 9),
            (0, 0),
            (0, 127),
            (0, 127),
            // No such page, slot, address space.
            (1, 10),
            (0, u64::MAX),
            (9, 0),
            (1 << 16, 0),
        ] {
            ring.push(slot, offset);
        }
        let mut reader = Reader::default();
        let taken = reader.collect(&ring.entries, |s, o| written.add(&table, s, o));
        assert_eq!((taken, written.take_strays()), (8, 4));
        let mut words = [0, 0, 1];
        written.drain_into(0, &mut words);
        assert_eq!(words, [1, 1 << 63, 1 | 1 << 9]);
        words = [0; 3];
        written.drain_into(0, &mut words);
        assert_eq!(words, [0; 3], "fetched twice");
        written.drain_into(5, &mut []);
    }

    #[test]
    fn what_is_forgotten_does_not_come_back() {
        let table = table();
        let mut written = Written::new(&table.block_pages());
        written.add(&table, 0, 70);
        written.clear();
        written.add(&table, 0, 71);
        let mut words = [0; 3];
        written.drain_into(0, &mut words);
        assert_eq!(words, [0, 1 << 7, 0]);
    }
}
