//! Kernels: how an image gets into guest memory and where the boot processor starts.
//!
//! Both kinds of image are entered in 32-bit protected mode with flat segments and without paging: a PVH ELF
//! image with EBX at its `hvm_start_info`, a bzImage (32-bit boot protocol) with ESI at its `boot_params`.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::config::{KernelSource, MachineConfig};
use crate::error::{Attempt, MachineError};
use crate::layout::{
    ACPI_TABLES, BOOT_GDT, CMDLINE, CMDLINE_ROOM, HIGH_MEMORY, HIGH_RAM_START, LOW_AREA_END,
    LOW_RAM_END, RESET_VECTOR,
};
use crate::memory::GuestMemory;

mod bzimage;
mod elf;
mod pvh;

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    Read {
        /// What the file should hold ("the kernel").
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file that is no kernel to start.
    #[error("cannot start the kernel {}: {why}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What is wrong with its content.
        #[source]
        why: Box<BootError>,
    },
    /// The image is of neither kind.
    #[error(
        "the kernel image is neither an ELF file nor a bzImage: give a PVH-capable vmlinux, a bzImage or a \
         payload guest"
    )]
    UnknownFormat,
    /// The image is of a known kind, but cannot be used.
    #[error("the kernel image cannot be started: {0}")]
    BadImage(String),
    /// It does not fit.
    #[error("{what} does not fit into the guest's memory: give the guest more memory")]
    NoRoom {
        /// What does not fit.
        what: &'static str,
    },
    /// The command line does not fit, or holds a NUL.
    #[error(
        "the kernel command line has {len} bytes or a NUL in it: at most {max} bytes are possible"
    )]
    Cmdline {
        /// Its length.
        len: usize,
        /// The longest one possible.
        max: usize,
    },
}

/// What a guest finds at [`RESET_VECTOR`]: code that resets the machine.
///
/// Linux comes here. Where ACPI is hardware-reduced it leaves the reset to EFI, whatever the FADT offers, and where
/// there is no EFI either it jumps to the firmware.
const RESET_CODE: [u8; 7] = [
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al: the keyboard controller pulls the reset line
    0xf4, // hlt
    0xeb, 0xfd, // jmp back to the hlt
];

/// When an image is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// All RAM is zero.
    PowerOn,
    /// RAM holds what the guest has written.
    Reset,
}

/// What a machine boots, read into memory once so that a reset finds it unchanged.
pub(crate) struct Images {
    kernel: Kernel,
    initrd: Option<Vec<u8>>,
    cmdline: String,
    acpi: Vec<u8>,
}

enum Kernel {
    Pvh(elf::Image),
    BzImage(Vec<u8>),
}

impl Kernel {
    fn recognize(image: Vec<u8>) -> Result<Self, BootError> {
        if image.starts_with(elf::MAGIC) {
            Ok(Kernel::Pvh(elf::Image::parse(image)?))
        } else if bzimage::is_bzimage(&image) {
            Ok(Kernel::BzImage(image))
        } else {
            Err(BootError::UnknownFormat)
        }
    }
}

/// How the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    rip: u64,
    rbx: u64,
    rsi: u64,
}

impl Images {
    /// Reads the images that `config` names, if any. The kernel will find the tables `acpi`.
    pub fn read(config: &MachineConfig, acpi: Vec<u8>) -> Result<Option<Self>, BootError> {
        let Some(source) = &config.kernel else {
            return Ok(None);
        };
        let kernel = match source {
            KernelSource::Bytes(bytes) => Kernel::recognize(bytes.to_vec())?,
            KernelSource::Path(path) => {
                Kernel::recognize(read("the kernel", path)?).map_err(|why| BootError::File {
                    path: path.clone(),
                    why: Box::new(why),
                })?
            }
        };
        let initrd = match &config.initrd {
            Some(path) => Some(read("the initial RAM disk", path)?),
            None => None,
        };
        let (len, max) = (config.cmdline.len(), CMDLINE_ROOM - 1);
        if len > max || config.cmdline.contains('\0') {
            return Err(BootError::Cmdline { len, max });
        }
        Ok(Some(Images {
            kernel,
            initrd,
            cmdline: config.cmdline.clone(),
            acpi,
        }))
    }

    /// Puts everything into guest memory of `ram` bytes.
    pub fn load(
        &self,
        memory: &GuestMemory,
        ram: u64,
        occasion: Occasion,
    ) -> Result<Entry, BootError> {
        write(memory, "the boot GDT", BOOT_GDT, &gdt_bytes())?;
        write(memory, "the command line", CMDLINE, self.cmdline.as_bytes())?;
        write(
            memory,
            "the command line",
            CMDLINE + self.cmdline.len() as u64,
            &[0],
        )?;
        write(memory, "the ACPI tables", ACPI_TABLES, &self.acpi)?;
        write(memory, "the reset vector", RESET_VECTOR, &RESET_CODE)?;
        match &self.kernel {
            Kernel::Pvh(image) => pvh::load(self, image, memory, ram, occasion),
            Kernel::BzImage(image) => bzimage::load(self, image, memory, ram),
        }
    }

    /// Puts the initial RAM disk at the end of the low RAM, between `kernel_end` and `limit`, and says where.
    fn load_initrd(
        &self,
        memory: &GuestMemory,
        ram: u64,
        kernel_end: u64,
        limit: u64,
    ) -> Result<Option<(u64, u64)>, BootError> {
        let Some(initrd) = &self.initrd else {
            return Ok(None);
        };
        let what = "the initial RAM disk";
        let len = initrd.len() as u64;
        let end = ram.min(LOW_RAM_END).min(limit);
        let start = end.checked_sub(len).ok_or(BootError::NoRoom { what })? & !0xfff;
        if start < kernel_end {
            return Err(BootError::NoRoom { what });
        }
        write(memory, what, start, initrd)?;
        Ok(Some((start, len)))
    }
}

/// Reads a file. It must be a regular one: others need not come to an end, and opening a FIFO could wait for ever.
fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, BootError> {
    let failed = |source| BootError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        let why = "it is not a regular file; copy what it gives into one";
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, why)));
    }
    let mut image = Vec::new();
    file.read_to_end(&mut image).map_err(failed)?;
    Ok(image)
}

fn write(memory: &GuestMemory, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|_| BootError::NoRoom { what })
}

/// What a range of the guest's memory map is, with the number that E820 and PVH have for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapKind {
    Ram = 1,
    Reserved = 2,
}

/// The memory map: start, length, kind.
fn memory_map(ram: u64) -> Vec<(u64, u64, MapKind)> {
    let low_end = ram.min(LOW_RAM_END);
    let mut map = vec![
        (0, LOW_AREA_END, MapKind::Ram),
        (LOW_AREA_END, HIGH_MEMORY - LOW_AREA_END, MapKind::Reserved),
        (HIGH_MEMORY, low_end - HIGH_MEMORY, MapKind::Ram),
    ];
    if ram > low_end {
        map.push((HIGH_RAM_START, ram - low_end, MapKind::Ram));
    }
    map
}

/// A flat segment as it is in the GDT at `selector`.
fn segment(selector: u16, type_: u8, limit: u32) -> kvm_segment {
    let flat = limit > 0xfffff;
    kvm_segment {
        base: 0,
        limit,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: flat.into(),
        s: flat.into(),
        l: 0,
        g: flat.into(),
        ..Default::default()
    }
}

// The 32-bit boot protocol fixes the selectors of code and data.
fn code_segment() -> kvm_segment {
    segment(0x10, 0b1011, u32::MAX)
}

fn data_segment() -> kvm_segment {
    segment(0x18, 0b0011, u32::MAX)
}

fn task_segment() -> kvm_segment {
    segment(0x20, 0b1011, 0x67)
}

fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access =
        u64::from(segment.type_) | u64::from(segment.s) << 4 | u64::from(segment.present) << 7;
    let flags = u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

fn gdt() -> [u64; 5] {
    let entries = [code_segment(), data_segment(), task_segment()];
    let [code, data, task] = entries.map(|s| descriptor(&s));
    [0, 0, code, data, task]
}

fn gdt_bytes() -> Vec<u8> {
    gdt().iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

impl Entry {
    /// Gives a vCPU in power-on state the registers of the entry: protected mode, flat segments, no paging.
    pub fn apply(self, vcpu: &VcpuFd) -> Result<(), MachineError> {
        let mut sregs = vcpu
            .get_sregs()
            .attempt("read a vCPU's special registers")?;
        self.enter_protected_mode(&mut sregs);
        vcpu.set_sregs(&sregs)
            .attempt("set a vCPU's special registers for the kernel's entry")?;
        let regs = kvm_regs {
            rip: self.rip,
            rbx: self.rbx,
            rsi: self.rsi,
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs)
            .attempt("set a vCPU's registers for the kernel's entry")
    }

    fn enter_protected_mode(self, sregs: &mut kvm_sregs) {
        const CR0_PE: u64 = 1;
        const CR0_ET: u64 = 1 << 4;
        let data = data_segment();
        sregs.cs = code_segment();
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = task_segment();
        sregs.gdt.base = BOOT_GDT;
        sregs.gdt.limit = (size_of_val(&gdt()) - 1) as u16;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opening a FIFO would wait for whoever writes to it, and a device need not come to an end.
    #[test]
    fn images_are_regular_files() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for path in [&*fifo, Path::new("/dev/zero"), dir.path()] {
            let error = read("the kernel", path).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn descriptors_are_those_of_the_architecture() {
        assert_eq!(
            gdt(),
            [
                0,
                0,
                0x00cf_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x0000_8b00_0000_0067
            ]
        );
    }

    #[test]
    fn the_memory_map_has_the_hole() {
        let map = memory_map(4 << 30);
        assert_eq!(map[2], (0x10_0000, 0xbff0_0000, MapKind::Ram));
        assert_eq!(map[3], (4 << 30, 1 << 30, MapKind::Ram));
        assert_eq!(memory_map(64 << 20).len(), 3);
    }
}
