//! The guest's RAM blocks, as both ends of a migration must agree on them.

use crate::format::PAGE_SIZE;
use crate::{limits, text};

/// One RAM block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlockLayout {
    /// Its name in the stream, for example `microvm.ram`.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
}

/// All RAM blocks of a guest. Blocks are named by their index in it.
///
/// # Invariants
///
/// Names are printable, of 1 to [`limits::NAME`] bytes, and unique; lengths are multiples of [`PAGE_SIZE`],
/// not zero, and their sum fits in a `u64`. There is at least one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    blocks: Vec<RamBlockLayout>,
    total: u64,
}

/// Why a list of blocks is not a [`RamLayout`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A stream without RAM has nothing to say.
    #[error("a guest needs at least one RAM block")]
    Empty,
    /// The name cannot go into a stream.
    #[error("RAM block name {0:?} is not 1 to {max} bytes of printable text", max = limits::NAME)]
    Name(String),
    /// Pages could not be told apart.
    #[error("two RAM blocks are named {0:?}")]
    Duplicate(String),
    /// A page is the smallest thing that can be sent.
    #[error(
        "RAM block {name:?} has {len:#x} bytes, which is not a positive multiple of {PAGE_SIZE}"
    )]
    Length {
        /// The block's name.
        name: String,
        /// Its length in bytes.
        len: u64,
    },
    /// More than the stream's 64-bit total can say.
    #[error("the RAM blocks together have more than 2^64 bytes")]
    Total,
}

impl RamLayout {
    /// A layout of blocks, given as name and length in bytes, in the order of the stream.
    ///
    /// # Errors
    ///
    /// The list breaks one of the type's invariants.
    pub fn new<N: Into<String>>(
        blocks: impl IntoIterator<Item = (N, u64)>,
    ) -> Result<Self, LayoutError> {
        let mut layout = RamLayout {
            blocks: Vec::new(),
            total: 0,
        };
        for (name, len) in blocks {
            let name = name.into();
            if name.len() > limits::NAME || !text::is_name(&name) {
                return Err(LayoutError::Name(name));
            }
            if layout.index_of(name.as_bytes()).is_some() {
                return Err(LayoutError::Duplicate(name));
            }
            if len == 0 || len % PAGE_SIZE as u64 != 0 {
                return Err(LayoutError::Length { name, len });
            }
            layout.total = layout.total.checked_add(len).ok_or(LayoutError::Total)?;
            layout.blocks.push(RamBlockLayout { name, len });
        }
        if layout.blocks.is_empty() {
            return Err(LayoutError::Empty);
        }
        Ok(layout)
    }

    /// The blocks, in the order of the stream.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlockLayout] {
        &self.blocks
    }

    /// Bytes of all blocks together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Index of the block of that name. Linear: a guest has a handful of blocks.
    pub(crate) fn index_of(&self, name: &[u8]) -> Option<usize> {
        self.blocks.iter().position(|b| b.name.as_bytes() == name)
    }
}

/// How the RAM of a stream differs from the RAM of the guest that is to receive it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutMismatch {
    /// The source has a block that the destination does not have.
    #[error(
        "the source has a RAM block {name:?} of {len} bytes that does not exist here; start the destination \
         with the same machine type, --memory and devices as the source"
    )]
    Unknown {
        /// The block's name.
        name: String,
        /// Its length on the source, in bytes.
        len: u64,
    },
    /// Both have the block, but not in the same size.
    #[error(
        "RAM block {name:?} has {source_len} bytes on the source and {here} bytes here; start the destination \
         with the same --memory as the source"
    )]
    Size {
        /// The block's name.
        name: String,
        /// Its length on the source, in bytes.
        source_len: u64,
        /// Its length here, in bytes.
        here: u64,
    },
    /// The destination has a block that the source does not have.
    #[error(
        "RAM block {name:?} of {here} bytes exists here but not on the source; start the destination with \
         the same machine type, --memory and devices as the source"
    )]
    Missing {
        /// The block's name.
        name: String,
        /// Its length here, in bytes.
        here: u64,
    },
    /// The source lists a block twice.
    #[error("the source lists RAM block {name:?} twice; its stream is damaged")]
    Twice {
        /// The block's name.
        name: String,
    },
    /// The sizes of the source's blocks do not add up.
    #[error("the source announces {total} bytes of RAM, but its blocks up to {name:?} have {sum}")]
    Total {
        /// What it announced, in bytes.
        total: u64,
        /// Bytes of the blocks listed so far.
        sum: u64,
        /// The last of these blocks.
        name: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_a_stream_cannot_carry() {
        let page = PAGE_SIZE as u64;
        let long = "x".repeat(256);
        type Blocks<'a> = &'a [(&'a str, u64)];
        let cases: &[(Blocks<'_>, LayoutError)] = &[
            (&[], LayoutError::Empty),
            (&[("", page)], LayoutError::Name(String::new())),
            (&[("a\n", page)], LayoutError::Name("a\n".into())),
            (&[(&long, page)], LayoutError::Name(long.clone())),
            (
                &[("a", page), ("a", page)],
                LayoutError::Duplicate("a".into()),
            ),
            (
                &[("a", 0)],
                LayoutError::Length {
                    name: "a".into(),
                    len: 0,
                },
            ),
            (
                &[("a", 4097)],
                LayoutError::Length {
                    name: "a".into(),
                    len: 4097,
                },
            ),
            (&[("a", u64::MAX - 4095), ("b", page)], LayoutError::Total),
        ];
        for (blocks, want) in cases {
            let got = RamLayout::new(blocks.iter().copied());
            assert_eq!(got.as_ref().unwrap_err(), want);
        }
    }
}
