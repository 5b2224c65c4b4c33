//! How much memory this process may use: what the host has, and what its control groups allow.
//!
//! A process that uses more than a control group allows is ended by the kernel, or a neighbour of it in that group
//! is, however much memory the host has left. So the limits of the process's own group and of all groups above it
//! count, as far as they can be seen: a container does not see those around it.

mod cgroup;

use std::fs;
use std::io;

/// What a bound keeps free for everybody else: one part in so many of all its memory.
const RESERVE: u64 = 8;

/// Something that bounds the memory of this process, as it was when it was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The file that tells the limit.
    pub source: String,
    /// How much memory there is for all that use it, in bytes.
    pub limit: u64,
    /// How much of that nobody uses, in bytes.
    free: u64,
    /// How much the kernel takes back when somebody needs it, in bytes: the page cache, and memory that is lent.
    reclaimable: u64,
}

/// The bounds on the memory of this process, that of the host first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room(Vec<Bound>);

impl Room {
    /// Looks at the host and at the control groups of this process. It takes some tens of microseconds.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or says something that is not understood, or the limits of the process's group cannot
    /// be seen from here.
    pub fn look() -> io::Result<Self> {
        let host = host(&fs::read_to_string("/proc/meminfo")?)?;
        let mut bounds = vec![host];
        for bound in cgroup::bounds()? {
            // Some limits are there only to say that there is none.
            if bound.limit < bounds[0].limit {
                bounds.push(bound);
            }
        }
        Ok(Room(bounds))
    }

    /// The bound with the lowest limit.
    pub fn tightest(&self) -> &Bound {
        let lowest = self.0.iter().min_by_key(|bound| bound.limit);
        lowest.expect("the host is always one")
    }

    /// Whether a control group allows less than the host has.
    pub(crate) fn is_limited(&self) -> bool {
        self.0.len() > 1
    }

    /// How many bytes can be used ahead of their need, with a reserve left for others within every bound. Of
    /// what can be reclaimed, `lent` bytes are this process's own, which it does not mean to give back.
    pub(crate) fn spare(&self, lent: u64) -> u64 {
        let spare = |bound: &Bound| {
            let available = bound.free + bound.reclaimable.saturating_sub(lent);
            available.saturating_sub(bound.limit / RESERVE)
        };
        self.0.iter().map(spare).min().unwrap_or(0)
    }
}

/// The bound that `meminfo`, the text of `/proc/meminfo`, tells of.
fn host(meminfo: &str) -> io::Result<Bound> {
    let bytes = |name: &str| {
        let kib = field(meminfo, name).and_then(|kib: u64| kib.checked_mul(1024));
        kib.ok_or_else(|| unclear("/proc/meminfo", name))
    };
    let (free, available) = (bytes("MemFree:")?, bytes("MemAvailable:")?);
    Ok(Bound {
        source: "/proc/meminfo".to_owned(),
        limit: bytes("MemTotal:")?,
        // The kernel keeps some free memory for itself.
        free: free.min(available),
        reclaimable: available.saturating_sub(free),
    })
}

/// The number behind `name` in a text of lines with a name and a number each.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    let number = lines.find_map(|mut words| (words.next()? == name).then(|| words.next()))?;
    number?.parse().ok()
}

fn unclear(file: &str, what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{file} does not tell {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn bound(limit: u64, free: u64, reclaimable: u64) -> Bound {
        Bound {
            source: String::new(),
            limit: limit * MIB,
            free: free * MIB,
            reclaimable: reclaimable * MIB,
        }
    }

    #[test]
    fn the_host_as_the_kernel_tells_it() {
        let text = "MemTotal:       24684084 kB\nMemFree:        13398304 kB\nMemAvailable:   24120656 kB\n\
                    Buffers:           46760 kB\nHugePages_Total:       0\n";
        let host = host(text).unwrap();
        assert_eq!(host.limit, 24_684_084 << 10);
        assert_eq!(host.free + host.reclaimable, 24_120_656 << 10);
        assert_eq!(host.free, 13_398_304 << 10);
    }

    #[test]
    fn a_host_with_hardly_any_memory() {
        // Less is available than is free: the kernel needs the rest itself.
        let text = "MemTotal: 100 kB\nMemFree: 20 kB\nMemAvailable: 5 kB\n";
        let host = host(text).unwrap();
        assert_eq!((host.free, host.reclaimable), (5 << 10, 0));
    }

    #[test]
    fn a_host_that_does_not_tell() {
        let error = host("MemTotal: 100 kB\nMemFree: 20 kB\n").unwrap_err();
        assert!(error.to_string().contains("MemAvailable"), "{error}");
        host("MemTotal: much kB\nMemFree: 20 kB\nMemAvailable: 1 kB\n").unwrap_err();
        host("").unwrap_err();
    }

    #[test]
    fn the_tightest_bound_counts() {
        let room = Room(vec![bound(8000, 4000, 2000)]);
        assert!(!room.is_limited());
        assert_eq!(room.spare(0), 5000 * MIB);
        let room = Room(vec![
            bound(8000, 4000, 2000),
            bound(800, 300, 0),
            bound(1600, 250, 0),
        ]);
        assert!(room.is_limited());
        assert_eq!(room.tightest().limit, 800 * MIB);
        // The group with the lowest limit is not the one with the least left.
        assert_eq!(room.spare(0), 50 * MIB);
    }

    #[test]
    fn what_is_lent_already_is_not_spare() {
        let room = Room(vec![bound(800, 200, 300)]);
        assert_eq!(room.spare(0), 400 * MIB);
        assert_eq!(room.spare(100 * MIB), 300 * MIB);
        // The kernel may not have counted all of it as reclaimable yet; then it has not counted it as free either.
        assert_eq!(room.spare(700 * MIB), 100 * MIB);
        assert_eq!(Room(vec![bound(800, 50, 20)]).spare(0), 0);
    }

    #[test]
    fn this_process_has_room() {
        let room = Room::look().unwrap();
        assert!(room.tightest().limit >= MIB, "{room:?}");
    }
}
