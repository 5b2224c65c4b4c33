//! Images that are not raw, known by their magic numbers. Served as raw ones, they would show their guest the wrong bytes,
//! and be damaged by what it writes.
//!
//! The format of a raw image is nothing that the image says: a guest may write any magic number to its disk, and then its
//! next start from the command line is refused. That is the user's to decide (`format=raw`). It never has vmferry read the
//! image as anything but raw, and a guest that arrives from elsewhere uses its image already, so that nobody looks at it.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::error::MachineError;

/// Bytes of the beginning that are looked at.
const HEAD: usize = 512;

/// What lies where in an image of a format.
struct Magic {
    at: usize,
    bytes: &'static [u8],
    /// The format's name; those of disk images are qemu-img's.
    name: &'static str,
}

const fn magic(at: usize, bytes: &'static [u8], name: &'static str) -> Magic {
    Magic { at, bytes, name }
}

const IMAGES: &[Magic] = &[
    magic(0, b"QFI\xfb\0\0\0\x01", "qcow"),
    magic(0, b"QFI\xfb", "qcow2"),
    magic(0, b"QED\0", "qed"),
    magic(0, b"KDMV", "vmdk"),
    magic(0, b"COWD", "vmdk"),
    magic(0, b"# Disk DescriptorFile", "vmdk"),
    magic(0x40, &0xbeda_107f_u32.to_le_bytes(), "vdi"),
    magic(0, b"vhdxfile", "vhdx"),
    magic(0, b"conectix", "vpc"),
    magic(0, b"WithoutFreeSpace", "parallels"),
    magic(0, b"WithouFreSpacExt", "parallels"),
];

/// Compressed files, with the program that expands them.
const COMPRESSED: &[Magic] = &[
    magic(0, b"\x1f\x8b\x08", "gzip"),
    magic(0, b"\xfd7zXZ\0", "xz"),
    magic(0, b"\x28\xb5\x2f\xfd", "zstd"),
    magic(0, b"BZh", "bzip2"),
];

/// Refuses an image that looks like one of another format than raw. What cannot be read is no such image.
pub(crate) fn check_raw(id: &str, path: &Path) -> Result<(), MachineError> {
    let mut head = [0; HEAD];
    let file = File::options()
        .read(true)
        // A pipe is not waited for.
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let read = file.and_then(|file| file.read_at(&mut head, 0));
    let head = &head[..read.unwrap_or(0)];
    let find = |magics: &'static [Magic]| {
        magics.iter().find(|magic| {
            head.get(magic.at..)
                .is_some_and(|rest| rest.starts_with(magic.bytes))
        })
    };
    let path = path.display();
    let (looks, remedy) = if let Some(Magic { name, .. }) = find(IMAGES) {
        let remedy = format!("'qemu-img convert -f {name} -O raw {path} NEW' makes a raw one");
        (format!("like a {name} image"), remedy)
    } else if let Some(Magic { name, .. }) = find(COMPRESSED) {
        let remedy = format!("'{name} -dc < {path} > NEW' expands it");
        (format!("compressed by {name}"), remedy)
    } else {
        return Ok(());
    };
    Err(MachineError::Config(format!(
        "{path} cannot be the disk '{id}': it looks {looks}, and a raw image is expected; {remedy}, and format=raw takes it \
         as it is"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_formats_are_known_by_their_magic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let refusal = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            match check_raw("root", &path) {
                Ok(()) => String::new(),
                Err(error) => error.to_string(),
            }
        };
        for Magic { at, bytes, name } in IMAGES.iter().chain(COMPRESSED) {
            let mut image = vec![0; 1 << 10];
            image[*at..at + bytes.len()].copy_from_slice(bytes);
            let why = refusal(&image);
            for part in [name, "'root'", "format=raw"] {
                assert!(why.contains(part), "{why}");
            }
            let advice = ["qemu-img convert -f ", " -dc < "];
            assert!(advice.iter().any(|advice| why.contains(advice)), "{why}");
        }
        // Images of nothing, of a boot sector, and of an encrypted disk, which is its guest's.
        assert_eq!(refusal(&[]), "");
        assert_eq!(refusal(b"QF"), "");
        assert_eq!(refusal(&[0x55; 4096]), "");
        assert_eq!(refusal(b"LUKS\xba\xbe\0\x02 and so on"), "");
        assert!(check_raw("root", Path::new("/no/such/image")).is_ok());
    }
}
