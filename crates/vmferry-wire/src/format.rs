//! The numbers of the stream, big-endian on the wire.

use std::fmt;

/// Size of a page in the stream, in bytes: QEMU's target page size on x86.
pub const PAGE_SIZE: usize = 4096;

/// `QEVM`, the first four bytes.
pub(crate) const MAGIC: u32 = 0x5145_564d;
/// The version of the stream format.
pub(crate) const VERSION: u32 = 3;

/// The byte before the section id in a footer.
pub(crate) const FOOTER: u8 = 0x7e;

/// idstr of the RAM section.
pub(crate) const RAM: &str = "ram";
/// Version of the RAM section.
pub(crate) const RAM_VERSION: u32 = 4;
/// What the idstr of vmferry's own FULL sections begins with.
pub(crate) const OWN_PREFIX: &str = "vmferry/";

/// The byte that a section begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum SectionKind {
    Eof = 0x00,
    Start = 0x01,
    Part = 0x02,
    End = 0x03,
    Full = 0x04,
    /// Only ever inside of a device's state or the configuration; none that vmferry understands.
    Subsection = 0x05,
    VmDescription = 0x06,
    Configuration = 0x07,
    Command = 0x08,
    /// A footer where a section should begin.
    Footer = FOOTER,
}

impl SectionKind {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0x00 => SectionKind::Eof,
            0x01 => SectionKind::Start,
            0x02 => SectionKind::Part,
            0x03 => SectionKind::End,
            0x04 => SectionKind::Full,
            0x05 => SectionKind::Subsection,
            0x06 => SectionKind::VmDescription,
            0x07 => SectionKind::Configuration,
            0x08 => SectionKind::Command,
            FOOTER => SectionKind::Footer,
            _ => return None,
        })
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SectionKind::Eof => "the EOF",
            SectionKind::Start => "a START section",
            SectionKind::Part => "a PART section",
            SectionKind::End => "an END section",
            SectionKind::Full => "a FULL section",
            SectionKind::Subsection => "a subsection",
            SectionKind::VmDescription => "a VMDESCRIPTION section",
            SectionKind::Configuration => "a CONFIGURATION section",
            SectionKind::Command => "a COMMAND section",
            SectionKind::Footer => "a section footer",
        })
    }
}

/// Flags in the low bits of a RAM record's first word; the page's offset in its block is the rest of it.
pub(crate) mod record {
    /// All bytes of the page are the fill byte that follows.
    pub(crate) const ZERO: u64 = 0x02;
    /// The rest of the word is the size of all RAM; the list of blocks follows.
    pub(crate) const MEM_SIZE: u64 = 0x04;
    /// The page's bytes follow.
    pub(crate) const PAGE: u64 = 0x08;
    /// End of this section's records.
    pub(crate) const EOS: u64 = 0x10;
    /// Same block as the record before: no block name.
    pub(crate) const CONTINUE: u64 = 0x20;
    /// All flags live in the bits below the page offset.
    pub(crate) const FLAGS: u64 = super::PAGE_SIZE as u64 - 1;

    /// Name of a record kind of QEMU's that vmferry recognises and refuses.
    pub(crate) fn refused(flags: u64) -> Option<&'static str> {
        Some(match flags & !CONTINUE {
            0x40 => "XBZRLE (a page sent as a difference)",
            0x80 => "HOOK (RDMA)",
            0x100 => "COMPRESS (a page compressed in the main channel)",
            0x200 => "MULTIFD_FLUSH (pages on further channels)",
            _ => return None,
        })
    }
}
