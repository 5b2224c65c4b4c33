//! What a snapshot remembers of an image, so that it is not resumed with one that has changed since.
//!
//! A snapshot holds its guest's memory, and the image holds the guest's files: a guest that goes on from a snapshot with
//! an image that somebody has written to since damages its own file system. So the state of a disk includes a stamp of
//! its image: the size, the time of the last change, and a *generation*, which is a random number that vmferry keeps in
//! an extended attribute of the image (`user.vmferry.generation`) and renews before the first write after each stamp. The
//! generation tells of changes that a coarse clock of a file system hides.
//!
//! A copy that keeps the times fits like the original. Not every file system keeps extended attributes, and nor does every
//! copy: an image without a generation is judged by the rest. A block device has neither a time nor attributes.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

/// The extended attribute that holds the generation.
const ATTRIBUTE: &str = "user.vmferry.generation";

/// A random number that is another one after a change.
type Generation = [u8; 16];

/// When a file was last changed, as its file system tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Time {
    seconds: i64,
    nanoseconds: i64,
}

/// An image at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// Its size.
    bytes: u64,
    /// When it was last changed. None of a block device.
    changed: Option<Time>,
    /// None where nobody has written one yet, or none can be kept.
    generation: Option<Generation>,
}

/// How an image of now looks beside the stamp of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// Nobody has written to it since.
    Same,
    /// Somebody has.
    Changed,
    /// There is nothing to tell it by.
    Unknown,
}

impl Stamp {
    /// The stamp of an image, of which `bytes` is the size.
    pub fn of(file: &File, bytes: u64) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let changed = metadata.is_file().then(|| Time {
            seconds: metadata.mtime(),
            nanoseconds: metadata.mtime_nsec(),
        });
        Ok(Stamp {
            bytes,
            changed,
            generation: generation(file),
        })
    }

    /// Compares the image that `self` was taken of with the image of `now`.
    pub fn compare(&self, now: &Stamp) -> Comparison {
        let (Some(then), Some(today)) = (self.changed, now.changed) else {
            // A larger block device is none of a guest that knows the smaller one.
            return match self.bytes <= now.bytes {
                true => Comparison::Unknown,
                false => Comparison::Changed,
            };
        };
        // Archives and some file systems keep whole seconds only.
        let copied = today.nanoseconds == 0 && today.seconds == then.seconds;
        let other_generation = match (self.generation, now.generation) {
            (Some(then), Some(today)) => then != today,
            // It was written to for the first time.
            (None, Some(_)) => true,
            // A copy without extended attributes.
            (_, None) => false,
        };
        match self.bytes == now.bytes && (then == today || copied) && !other_generation {
            true => Comparison::Same,
            false => Comparison::Changed,
        }
    }
}

fn generation(file: &File) -> Option<Generation> {
    let mut value = [0; 16];
    let len = rustix::fs::fgetxattr(file, ATTRIBUTE, &mut value).ok()?;
    (len == value.len()).then_some(value)
}

/// Gives an image another generation, where it can have one.
pub(super) fn renew(file: &File) -> io::Result<()> {
    let mut value: Generation = [0; 16];
    getrandom::fill(&mut value).map_err(io::Error::other)?;
    Ok(rustix::fs::fsetxattr(
        file,
        ATTRIBUTE,
        &value,
        rustix::fs::XattrFlags::empty(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(seconds: i64, nanoseconds: i64, generation: Option<u8>) -> Stamp {
        Stamp {
            bytes: 4096,
            changed: Some(Time {
                seconds,
                nanoseconds,
            }),
            generation: generation.map(|byte| [byte; 16]),
        }
    }

    #[test]
    fn an_image_is_the_same_if_nothing_tells_otherwise() {
        use Comparison::{Changed, Same};
        let then = stamp(100, 7, Some(1));
        for (now, expected) in [
            (then.clone(), Same),
            (stamp(100, 7, None), Same),
            (stamp(100, 0, None), Same),
            (stamp(100, 0, Some(1)), Same),
            (stamp(100, 8, Some(1)), Changed),
            (stamp(101, 7, None), Changed),
            (stamp(101, 0, None), Changed),
            // Within one tick of the file system's clock.
            (stamp(100, 7, Some(2)), Changed),
            (
                Stamp {
                    bytes: 8192,
                    ..then.clone()
                },
                Changed,
            ),
        ] {
            assert_eq!(then.compare(&now), expected, "{now:?}");
        }
        let unmarked = stamp(100, 7, None);
        assert_eq!(unmarked.compare(&unmarked), Same);
        assert_eq!(unmarked.compare(&then), Changed);
    }

    #[test]
    fn a_block_device_cannot_tell() {
        let device = |bytes| Stamp {
            bytes,
            changed: None,
            generation: None,
        };
        assert_eq!(device(4096).compare(&device(4096)), Comparison::Unknown);
        assert_eq!(device(4096).compare(&device(512)), Comparison::Changed);
        let file = stamp(1, 1, None);
        assert_eq!(file.compare(&device(4096)), Comparison::Unknown);
    }
}
