//! ELF images, checked before anything trusts them.

use super::BootError;

/// How an ELF file begins.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const CLASS_64: u8 = 2;
const PT_LOAD: u32 = 1;

/// A 64-bit ELF file whose program headers lie inside it.
pub(super) struct Image {
    bytes: Vec<u8>,
    zeroed: Vec<Zeroed>,
}

/// Memory that the image wants to be zero (`.bss`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Zeroed {
    pub start: u64,
    pub len: u64,
}

impl Image {
    /// Checks what the loader takes for granted: that every segment's bytes are in the file.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, BootError> {
        let bad = |why: &str| BootError::BadImage(format!("its ELF headers are damaged ({why})"));
        if bytes.len() < HEADER_LEN {
            return Err(bad("the file is too short"));
        }
        if bytes[4] != CLASS_64 {
            return Err(BootError::BadImage("it is not a 64-bit ELF file".into()));
        }
        let table = u64_at(&bytes, 32);
        let count = usize::from(u16_at(&bytes, 56));
        let table = usize::try_from(table)
            .ok()
            .filter(|t| {
                t.checked_add(count * PROGRAM_HEADER_LEN)
                    .is_some_and(|end| end <= bytes.len())
            })
            .ok_or_else(|| bad("the program headers are not in the file"))?;
        let mut zeroed = Vec::new();
        for n in 0..count {
            let at = table + n * PROGRAM_HEADER_LEN;
            let offset = u64_at(&bytes, at + 8);
            let start = u64_at(&bytes, at + 24);
            let in_file = u64_at(&bytes, at + 32);
            let in_memory = u64_at(&bytes, at + 40);
            if offset
                .checked_add(in_file)
                .is_none_or(|end| end > bytes.len() as u64)
            {
                return Err(bad("a segment is not in the file"));
            }
            if u32_at(&bytes, at) != PT_LOAD {
                continue;
            }
            if start.checked_add(in_memory.max(in_file)).is_none() {
                return Err(bad("a segment is larger than the address space"));
            }
            if in_memory > in_file {
                zeroed.push(Zeroed {
                    start: start + in_file,
                    len: in_memory - in_file,
                });
            }
        }
        Ok(Image { bytes, zeroed })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn zeroed(&self) -> &[Zeroed] {
        &self.zeroed
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
