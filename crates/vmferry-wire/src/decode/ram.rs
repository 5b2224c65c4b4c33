//! The RAM section: its blocks and its records.

use std::io::Read;

use super::phase::Phase;
use super::{Decoder, Step};
use crate::format::{PAGE_SIZE, RAM_VERSION, record};
use crate::{LayoutMismatch, StreamError, text};

const SETUP: &str = "the list of RAM blocks";
const RECORD: &str = "a RAM record";

impl<R: Read> Decoder<R> {
    /// The START of the RAM section, behind its idstr.
    pub(super) fn ram_setup(&mut self, offset: u64, id: u32) -> Result<Step, StreamError> {
        let instance = self.input.u32(SETUP)?;
        let version = self.input.u32(SETUP)?;
        if (instance, version) != (0, RAM_VERSION) {
            return Err(StreamError::RamVersion {
                offset,
                version,
                instance,
            });
        }
        let at = self.input.offset();
        let word = self.input.u64(SETUP)?;
        if word & record::FLAGS != record::MEM_SIZE {
            return Err(StreamError::UnknownRecord { offset: at, word });
        }
        self.check_blocks(word & !record::FLAGS)?;
        let at = self.input.offset();
        let word = self.input.u64(SETUP)?;
        if word != record::EOS {
            return Err(StreamError::UnknownRecord { offset: at, word });
        }
        self.footer(id, || "the START of the RAM section".to_owned())?;
        self.ram_id = id;
        self.phase = Phase::Ram;
        Ok(Step::RamSetup)
    }

    /// Compares the stream's blocks, up to `total` bytes of them, with ours. Their order may differ: records
    /// name their block. Each is accepted once only, which bounds the list.
    fn check_blocks(&mut self, total: u64) -> Result<(), StreamError> {
        let mut seen = vec![false; self.layout.blocks().len()];
        let mut sum = 0u64;
        while sum < total {
            let name = self.input.short(SETUP)?;
            let index = self.layout.index_of(name);
            let name = text::one_line(name);
            let len = self.input.u64(SETUP)?;
            let Some(index) = index else {
                return Err(LayoutMismatch::Unknown { name, len }.into());
            };
            let here = self.layout.blocks()[index].len;
            if len != here {
                return Err(LayoutMismatch::Size {
                    name,
                    source_len: len,
                    here,
                }
                .into());
            }
            if std::mem::replace(&mut seen[index], true) {
                return Err(LayoutMismatch::Twice { name }.into());
            }
            // Each of our blocks at most once: at most the layout's total, which fits.
            sum += len;
            if sum > total {
                return Err(LayoutMismatch::Total { total, sum, name }.into());
            }
        }
        if let Some(index) = seen.iter().position(|seen| !seen) {
            let block = &self.layout.blocks()[index];
            return Err(LayoutMismatch::Missing {
                name: block.name.clone(),
                here: block.len,
            }
            .into());
        }
        Ok(())
    }

    /// One record of a PART or END section. The hot path: one call a page.
    #[inline]
    pub(super) fn ram_record(&mut self) -> Result<Step, StreamError> {
        let offset = self.input.offset();
        let word = self.input.u64(RECORD)?;
        let page = word & !record::FLAGS;
        match word & record::FLAGS & !record::CONTINUE {
            record::PAGE => {
                let block = self.record_block(offset, word, page)?;
                self.input.need(PAGE_SIZE, "a page")?;
                let at = self.input.consume(PAGE_SIZE);
                Ok(Step::Page {
                    block,
                    offset: page,
                    at,
                })
            }
            record::ZERO => {
                let block = self.record_block(offset, word, page)?;
                let fill = self.input.u8(RECORD)?;
                if fill != 0 {
                    return Err(StreamError::FilledPage { offset, fill });
                }
                Ok(Step::ZeroPage {
                    block,
                    offset: page,
                })
            }
            _ if word == record::EOS => self.end_of_records(),
            flags => Err(match record::refused(flags) {
                Some(name) => StreamError::UnsupportedRecord { offset, name },
                None => StreamError::UnknownRecord { offset, word },
            }),
        }
    }

    /// The block of the record whose first word came, after checking that `page` lies in it.
    #[inline]
    fn record_block(&mut self, offset: u64, word: u64, page: u64) -> Result<usize, StreamError> {
        if word & record::CONTINUE == 0 {
            self.name_block(offset)?;
        }
        // QEMU continues a block even from one PART to the next, so this outlives a section.
        let Some(block) = self.last_block else {
            return Err(StreamError::NoBlock { offset });
        };
        // Both are multiples of the page size: if the page begins in the block, it ends there.
        if page >= self.layout.blocks()[block].len {
            return Err(self.outside(offset, block, page));
        }
        Ok(block)
    }

    fn name_block(&mut self, offset: u64) -> Result<(), StreamError> {
        let name = self.input.short(RECORD)?;
        let Some(block) = self.layout.index_of(name) else {
            let name = text::one_line(name);
            return Err(StreamError::UnknownBlock { offset, name });
        };
        self.last_block = Some(block);
        Ok(())
    }

    #[cold]
    fn outside(&self, offset: u64, block: usize, page: u64) -> StreamError {
        let block = &self.layout.blocks()[block];
        StreamError::PageOutsideBlock {
            offset,
            block: block.name.clone(),
            page,
            len: block.len,
        }
    }

    fn end_of_records(&mut self) -> Result<Step, StreamError> {
        let last = self.phase == Phase::EndRecords;
        self.footer(self.ram_id, || {
            let part = if last { "the END" } else { "a PART" };
            format!("{part} of the RAM section")
        })?;
        self.phase = if last { Phase::Devices } else { Phase::Ram };
        Ok(Step::RamPartEnd { last })
    }
}
