//! Initial RAM disks as the kernel reads them: cpio archives of the "new" kind.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cpio::newc::{self, Builder, ModeFileType};

use crate::error::{Attempt, RigError};

/// A file tree. Ordered by path, so that directories come before what is in them.
#[derive(Default)]
pub(crate) struct Archive(BTreeMap<PathBuf, Node>);

enum Node {
    Directory,
    Symlink(PathBuf),
    File { mode: u32, content: Content },
}

enum Content {
    Bytes(Vec<u8>),
    Host(PathBuf),
}

impl Archive {
    /// Makes a directory and those above it.
    pub fn directory(&mut self, at: &Path) {
        for dir in relative(at).ancestors() {
            if !dir.as_os_str().is_empty() {
                self.0.entry(dir.to_owned()).or_insert(Node::Directory);
            }
        }
    }

    /// Makes a file.
    pub fn file(&mut self, at: &Path, mode: u32, content: impl Into<Vec<u8>>) {
        let content = Content::Bytes(content.into());
        self.insert(at, Node::File { mode, content });
    }

    /// Makes a symbolic link.
    pub fn symlink(&mut self, at: &Path, target: &Path) {
        self.insert(at, Node::Symlink(target.to_owned()));
    }

    /// Copies a file of the host, with its permissions. Links are followed.
    pub fn host_file(&mut self, at: &Path, path: &Path) -> Result<(), RigError> {
        let meta = fs::metadata(path).attempt(|| format!("read {}", path.display()))?;
        let mode = meta.permissions().mode() & 0o7777;
        let content = Content::Host(path.to_owned());
        self.insert(at, Node::File { mode, content });
        Ok(())
    }

    fn insert(&mut self, at: &Path, node: Node) {
        let at = relative(at);
        if let Some(dir) = at.parent() {
            self.directory(dir);
        }
        self.0.insert(at.to_owned(), node);
    }

    /// Writes everything.
    pub fn write(&self, mut to: impl Write) -> Result<(), RigError> {
        for (number, (path, node)) in self.0.iter().enumerate() {
            self.write_node(&mut to, number as u32 + 1, path, node)
                .attempt(|| format!("pack /{} into an initial RAM disk", path.display()))?;
        }
        newc::trailer(to)
            .and_then(|mut to| to.flush())
            .attempt(|| "write an initial RAM disk".into())
    }

    fn write_node(
        &self,
        to: &mut impl Write,
        number: u32,
        path: &Path,
        node: &Node,
    ) -> io::Result<()> {
        let name = path
            .to_str()
            .ok_or_else(|| io::Error::other("its name is not UTF-8"))?;
        let host;
        let (kind, mode, content) = match node {
            Node::Directory => (ModeFileType::Directory, 0o755, &b""[..]),
            Node::Symlink(target) => (ModeFileType::Symlink, 0o777, target.as_os_str().as_bytes()),
            Node::File { mode, content } => {
                let content = match content {
                    Content::Bytes(bytes) => bytes,
                    Content::Host(path) => {
                        host = fs::read(path)?;
                        &host
                    }
                };
                (ModeFileType::Regular, *mode, &content[..])
            }
        };
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::other("it is larger than 4 GiB"))?;
        let mut entry = Builder::new(name)
            .ino(number)
            .mode(mode)
            .set_mode_file_type(kind)
            .write(to, size);
        entry.write_all(content)?;
        entry.finish()?;
        Ok(())
    }
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.file(Path::new("/a/b/c"), 0o644, *b"words");
        archive.symlink(Path::new("/a/link"), Path::new("b/c"));
        archive.directory(Path::new("/a/b"));
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();

        let mut from = &bytes[..];
        let mut seen = Vec::new();
        loop {
            let mut reader = newc::Reader::new(from).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut content = String::new();
            io::Read::read_to_string(&mut reader, &mut content).unwrap();
            seen.push((name, mode, content));
            from = reader.finish().unwrap();
        }
        let entry = |name: &str, mode, content: &str| (name.to_owned(), mode, content.to_owned());
        assert_eq!(
            seen,
            [
                entry("a", 0o040_755, ""),
                entry("a/b", 0o040_755, ""),
                entry("a/b/c", 0o100_644, "words"),
                entry("a/link", 0o120_777, "b/c"),
            ]
        );
    }
}
