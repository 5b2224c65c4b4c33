//! An initial RAM disk that is a whole small system: busybox, kernel modules, and what else is put in.

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::archive::Archive;
use crate::debian::Debian;
use crate::error::{Attempt, RigError};
use crate::libraries;
use crate::modules::{Module, Modules};

/// An initial RAM disk for a kernel of [`Debian`].
///
/// `/init` is a script for busybox. It finds the modules that were asked for in `/modules`, under names that sort in
/// the order in which they are to be loaded:
///
/// ```sh
/// for module in /modules/*; do insmod "$module"; done
/// ```
pub struct Initramfs {
    archive: Archive,
    known: Modules,
    modules: Vec<Module>,
}

impl Initramfs {
    /// A system whose first process is the script `init`, with `/bin/busybox`, `/bin/sh` and the empty directories
    /// that file systems are mounted on.
    pub fn new(debian: &Debian, init: &str) -> Result<Self, RigError> {
        let mut archive = Archive::default();
        for dir in ["dev", "modules", "proc", "root", "run", "sys", "tmp"] {
            archive.directory(Path::new(dir));
        }
        archive.host_file(Path::new("bin/busybox"), debian.busybox())?;
        archive.symlink(Path::new("bin/sh"), Path::new("busybox"));
        archive.file(Path::new("init"), 0o755, init);
        Ok(Initramfs {
            archive,
            known: Modules::find(debian.modules())?,
            modules: Vec::new(),
        })
    }

    /// Adds a kernel module with those that it needs.
    pub fn module(&mut self, name: &str) -> Result<&mut Self, RigError> {
        self.known.add(name, &mut self.modules)?;
        Ok(self)
    }

    /// Adds a file.
    pub fn file(&mut self, at: &Path, mode: u32, content: impl Into<Vec<u8>>) -> &mut Self {
        self.archive.file(at, mode, content);
        self
    }

    /// Adds a file or a directory of the host, and with programs the libraries that they need.
    pub fn host_path(&mut self, path: &Path, at: &Path) -> Result<&mut Self, RigError> {
        if path.is_dir() {
            self.archive.directory(at);
            let entries = fs::read_dir(path).attempt(|| format!("read {}", path.display()))?;
            for entry in entries {
                let entry = entry.attempt(|| format!("read {}", path.display()))?;
                self.host_path(&entry.path(), &at.join(entry.file_name()))?;
            }
            return Ok(self);
        }
        self.archive.host_file(at, path)?;
        if is_elf(path)? {
            for library in libraries::of(path)? {
                self.archive.host_file(&library, &library)?;
            }
        }
        Ok(self)
    }

    /// Writes the archive.
    pub fn write(&mut self, to: impl Write) -> Result<(), RigError> {
        for (number, module) in self.modules.drain(..).enumerate() {
            let at = format!("modules/{number:03}-{}.ko", module.name);
            self.archive.file(Path::new(&at), 0o644, module.content);
        }
        self.archive.write(to)
    }
}

fn is_elf(path: &Path) -> Result<bool, RigError> {
    let mut magic = [0; 4];
    let file = fs::File::open(path);
    let read = file.and_then(|mut file| std::io::Read::read(&mut file, &mut magic));
    read.attempt(|| format!("read {}", path.display()))?;
    Ok(magic == *b"\x7fELF")
}
