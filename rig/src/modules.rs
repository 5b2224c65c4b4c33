//! Kernel modules, with those that they need.
//!
//! The package has no `modules.dep`: depmod makes it when the package is installed. Every module names what it needs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, RigError};

/// The modules of one kernel.
pub(crate) struct Modules {
    dir: PathBuf,
    /// By the names that the kernel has for them.
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
}

/// A module to load.
pub(crate) struct Module {
    pub name: String,
    pub content: Vec<u8>,
}

impl Modules {
    /// Looks through a kernel's directory of modules.
    pub fn find(dir: &Path) -> Result<Self, RigError> {
        let mut files = BTreeMap::new();
        let mut dirs = vec![dir.join("kernel")];
        while let Some(dir) = dirs.pop() {
            let entries = fs::read_dir(&dir).attempt(|| format!("read {}", dir.display()))?;
            for entry in entries {
                let path = entry.attempt(|| format!("read {}", dir.display()))?.path();
                if path.is_dir() {
                    dirs.push(path);
                } else if let Some(name) = name_of(&path) {
                    files.insert(name, path);
                }
            }
        }
        let builtin = dir.join("modules.builtin");
        let builtin = fs::read_to_string(&builtin)
            .attempt(|| format!("read {}", builtin.display()))?
            .lines()
            .filter_map(|line| name_of(Path::new(line)))
            .collect();
        Ok(Modules {
            dir: dir.to_owned(),
            files,
            builtin,
        })
    }

    /// Adds the module `name` to `list`, behind everything that it needs; nothing twice, and nothing that the kernel
    /// has built in.
    pub fn add(&self, name: &str, list: &mut Vec<Module>) -> Result<(), RigError> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || list.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let path = self
            .files
            .get(&name)
            .ok_or_else(|| RigError::NotInPackage {
                what: format!("module {name}"),
                dir: self.dir.clone(),
            })?;
        let content = fs::read(path).attempt(|| format!("read {}", path.display()))?;
        for needed in needs(&content) {
            self.add(&needed, list)?;
        }
        list.push(Module { name, content });
        Ok(())
    }
}

/// The kernel's name of the module in a file.
fn name_of(path: &Path) -> Option<String> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".ko")?;
    Some(stem.replace('-', "_"))
}

/// What a module says that it needs: `depends=a,b` among the NUL-terminated strings of its `.modinfo` section.
fn needs(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|bytes| bytes == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next();
    let value = String::from_utf8_lossy(value.unwrap_or_default());
    let names = value.split(',').filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel/some/where");
        fs::create_dir_all(&kernel).unwrap();
        for (file, needs) in [
            ("kvm-amd", "kvm"),
            ("kvm", "irqbypass,crc"),
            ("irqbypass", ""),
        ] {
            let content = format!("\x7fELF..\0license=GPL\0depends={needs}\0name=x\0");
            fs::write(kernel.join(format!("{file}.ko")), content).unwrap();
        }
        fs::write(dir.path().join("modules.builtin"), "kernel/lib/crc.ko\n").unwrap();

        let modules = Modules::find(dir.path()).unwrap();
        let mut list = Vec::new();
        modules.add("irqbypass", &mut list).unwrap();
        modules.add("kvm-amd", &mut list).unwrap();
        modules.add("kvm_amd", &mut list).unwrap();
        modules.add("crc", &mut list).unwrap();
        let names: Vec<_> = list.iter().map(|module| &module.name[..]).collect();
        assert_eq!(names, ["irqbypass", "kvm", "kvm_amd"]);

        let error = modules.add("nothing", &mut list).err().unwrap().to_string();
        assert!(error.contains("module nothing"), "{error}");
    }
}
