//! Writing a stream.

use crate::format::{
    FOOTER, MAGIC, OWN_PREFIX, PAGE_SIZE, RAM, RAM_VERSION, SectionKind, VERSION, record,
};
use crate::{Command, DeviceState, RamLayout, limits, text};

/// Section id of `ram`; FULL sections count up from the next one.
const RAM_SECTION_ID: u32 = 0;

/// What cannot go into a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// More than [`limits`] lets a reader accept.
    #[error("{what} has {len} bytes, and a stream carries at most {limit}")]
    TooLong {
        /// What it is.
        what: String,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// Not a name that a reader accepts.
    #[error(
        "{0:?} is no name for a device section: it takes {OWN_PREFIX:?} and more, at most {max} bytes of \
         printable text",
        max = limits::NAME
    )]
    DeviceName(String),
    /// Not a machine type that a reader accepts.
    #[error("{0:?} is no machine type: it takes 1 to {max} bytes of printable text", max = limits::MACHINE_NAME)]
    MachineName(String),
    /// One more FULL section than [`limits::DEVICE_SECTIONS`].
    #[error("a stream carries at most {max} device sections", max = limits::DEVICE_SECTIONS)]
    TooManyDevices,
}

/// Appends the parts of a stream to a `Vec<u8>`.
///
/// The bytes of pages never pass through it: after [`Encoder::page`] the caller sends the page's 4096 bytes
/// itself, straight out of guest memory. The order of calls is the caller's, see the [crate documentation](crate);
/// what must be remembered from one call to the next (the block of the last page, section ids, limits) is
/// remembered here, so one stream takes one encoder from beginning to end.
#[derive(Debug)]
pub struct Encoder {
    layout: RamLayout,
    /// Block of the record before, in this section part.
    last_block: Option<usize>,
    next_section: u32,
    device_bytes: usize,
    device_sections: usize,
}

impl Encoder {
    /// An encoder for the stream of a guest with this RAM.
    #[must_use]
    pub fn new(layout: RamLayout) -> Self {
        Encoder {
            layout,
            last_block: None,
            next_section: RAM_SECTION_ID + 1,
            device_bytes: 0,
            device_sections: 0,
        }
    }

    /// The RAM that this stream is about; pages name its blocks by index.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Magic and version: the first bytes.
    pub fn stream_header(&self, out: &mut Vec<u8>) {
        put_u32(out, MAGIC);
        put_u32(out, VERSION);
    }

    /// CONFIGURATION: the machine type, for example `microvm`.
    ///
    /// # Errors
    ///
    /// [`EncodeError::MachineName`].
    pub fn configuration(&self, out: &mut Vec<u8>, machine: &str) -> Result<(), EncodeError> {
        if machine.len() > limits::MACHINE_NAME || !text::is_name(machine) {
            return Err(EncodeError::MachineName(machine.to_owned()));
        }
        out.push(SectionKind::Configuration as u8);
        put_u32(out, machine.len() as u32);
        out.extend_from_slice(machine.as_bytes());
        Ok(())
    }

    /// A COMMAND section.
    pub fn command(&self, out: &mut Vec<u8>, command: Command) {
        out.push(SectionKind::Command as u8);
        command.encode(out);
    }

    /// The whole START section of `ram`: names and sizes of the blocks, footer.
    pub fn ram_start(&self, out: &mut Vec<u8>) {
        out.push(SectionKind::Start as u8);
        put_u32(out, RAM_SECTION_ID);
        put_name(out, RAM);
        put_u32(out, 0); // instance
        put_u32(out, RAM_VERSION);
        put_u64(out, self.layout.total() | record::MEM_SIZE);
        for block in self.layout.blocks() {
            put_name(out, &block.name);
            put_u64(out, block.len);
        }
        self.end_of_ram_records(out);
    }

    /// Begins a PART section of `ram`; records follow, then [`Encoder::end_of_ram_records`].
    pub fn ram_part(&mut self, out: &mut Vec<u8>) {
        self.begin_records(out, SectionKind::Part);
    }

    /// Begins the END section of `ram`; records follow, then [`Encoder::end_of_ram_records`].
    pub fn ram_end(&mut self, out: &mut Vec<u8>) {
        self.begin_records(out, SectionKind::End);
    }

    fn begin_records(&mut self, out: &mut Vec<u8>, kind: SectionKind) {
        // QEMU's records may continue the block of the part before. Ours name it again: a part can be
        // read by itself, for a few bytes.
        self.last_block = None;
        out.push(kind as u8);
        put_u32(out, RAM_SECTION_ID);
    }

    /// The record before a page's 4096 bytes, which the caller sends next. `offset` is in bytes, in the
    /// block with that index in [`Encoder::layout`].
    ///
    /// # Panics
    ///
    /// The layout has no such block.
    #[inline]
    pub fn page(&mut self, out: &mut Vec<u8>, block: usize, offset: u64) {
        self.record(out, block, offset, record::PAGE);
    }

    /// A page of zeros, complete. Arguments as for [`Encoder::page`].
    ///
    /// # Panics
    ///
    /// The layout has no such block.
    #[inline]
    pub fn zero_page(&mut self, out: &mut Vec<u8>, block: usize, offset: u64) {
        self.record(out, block, offset, record::ZERO);
        out.push(0);
    }

    #[inline]
    fn record(&mut self, out: &mut Vec<u8>, block: usize, offset: u64, kind: u64) {
        debug_assert_eq!(offset % PAGE_SIZE as u64, 0);
        debug_assert!(offset < self.layout.blocks()[block].len);
        if self.last_block == Some(block) {
            put_u64(out, offset | kind | record::CONTINUE);
        } else {
            put_u64(out, offset | kind);
            put_name(out, &self.layout.blocks()[block].name);
            self.last_block = Some(block);
        }
    }

    /// Ends the records of a PART or END section of `ram`, with its footer.
    pub fn end_of_ram_records(&self, out: &mut Vec<u8>) {
        put_u64(out, record::EOS);
        put_footer(out, RAM_SECTION_ID);
    }

    /// A whole FULL section.
    ///
    /// # Errors
    ///
    /// The name or the amount of state is more than a reader accepts; nothing was appended.
    pub fn device_state(
        &mut self,
        out: &mut Vec<u8>,
        state: &DeviceState,
    ) -> Result<(), EncodeError> {
        let name_ok = state.idstr.len() <= limits::NAME
            && state.idstr.len() > OWN_PREFIX.len()
            && state.idstr.starts_with(OWN_PREFIX)
            && text::is_name(&state.idstr);
        if !name_ok {
            return Err(EncodeError::DeviceName(state.idstr.clone()));
        }
        let len = state.data.len();
        check_len(
            || format!("the state of {}", state.idstr),
            len,
            limits::DEVICE_STATE,
        )?;
        let all = self.device_bytes + len;
        check_len(
            || "the state of all devices".to_owned(),
            all,
            limits::ALL_DEVICE_STATES,
        )?;
        if self.device_sections == limits::DEVICE_SECTIONS {
            return Err(EncodeError::TooManyDevices);
        }
        self.device_bytes = all;
        self.device_sections += 1;
        let id = self.next_section;
        self.next_section += 1;

        out.push(SectionKind::Full as u8);
        put_u32(out, id);
        put_name(out, &state.idstr);
        put_u32(out, state.instance_id);
        put_u32(out, state.version_id);
        put_u32(out, len as u32);
        out.extend_from_slice(&state.data);
        put_footer(out, id);
        Ok(())
    }

    /// VMDESCRIPTION: the JSON of [`crate::vm_description`].
    ///
    /// # Errors
    ///
    /// It is longer than [`limits::VM_DESCRIPTION`]; nothing was appended.
    pub fn vm_description(&self, out: &mut Vec<u8>, json: &str) -> Result<(), EncodeError> {
        check_len(
            || "the description of the stream".to_owned(),
            json.len(),
            limits::VM_DESCRIPTION,
        )?;
        out.push(SectionKind::VmDescription as u8);
        put_u32(out, json.len() as u32);
        out.extend_from_slice(json.as_bytes());
        Ok(())
    }

    /// The EOF.
    pub fn eof(&self, out: &mut Vec<u8>) {
        out.push(SectionKind::Eof as u8);
    }
}

fn check_len(what: impl Fn() -> String, len: usize, limit: usize) -> Result<(), EncodeError> {
    if len <= limit {
        return Ok(());
    }
    Err(EncodeError::TooLong {
        what: what(),
        len,
        limit,
    })
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

#[inline]
fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// One length byte and the name, which every caller has checked against [`limits::NAME`].
fn put_name(out: &mut Vec<u8>, name: &str) {
    debug_assert!(name.len() <= limits::NAME);
    out.push(name.len() as u8);
    out.extend_from_slice(name.as_bytes());
}

fn put_footer(out: &mut Vec<u8>, id: u32) {
    out.push(FOOTER);
    put_u32(out, id);
}
