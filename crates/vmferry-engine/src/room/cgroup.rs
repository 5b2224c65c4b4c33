//! Control groups that limit the memory of this process, in version 1 and version 2.
//!
//! `/proc/self/cgroup` names the group of a process, and `/proc/self/mountinfo` where groups can be looked at. Either
//! may show a part of the whole only: in a container the mount often begins at the container's group, and in a
//! cgroup namespace the names do.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::{Bound, field, unclear};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// The groups of this process that can be looked at: its own first, then the one above, up to the topmost.
#[derive(Debug, PartialEq, Eq)]
struct Groups {
    version: Version,
    directories: Vec<PathBuf>,
}

/// The bounds that the control groups of this process set.
pub(super) fn bounds() -> io::Result<Vec<Bound>> {
    // A kernel without control groups has no such file.
    let Some(cgroup) = if_exists(fs::read_to_string("/proc/self/cgroup"))? else {
        return Ok(Vec::new());
    };
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    let Some(groups) = groups(&cgroup, &mountinfo)? else {
        return Ok(Vec::new());
    };
    let bound = |directory: PathBuf| {
        bound(groups.version, &directory, |file| {
            if_exists(fs::read_to_string(directory.join(file)))
        })
        .transpose()
    };
    groups.directories.into_iter().filter_map(bound).collect()
}

fn if_exists(result: io::Result<String>) -> io::Result<Option<String>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// The groups that limit the memory of a process with these files in `/proc/self`; `None` if no control group can.
fn groups(cgroup: &str, mountinfo: &str) -> io::Result<Option<Groups>> {
    let Some((version, group)) = memory_group(cgroup) else {
        return Ok(None);
    };
    // Where several mounts show the group, the one that begins furthest up shows most of what is above.
    let mounts = mountinfo
        .lines()
        .filter_map(|line| Mount::parse(line, version));
    let seen = mounts.filter_map(|mount| Some((below(group, &mount.root)?, mount)));
    let Some((below, mount)) = seen.max_by_key(|(below, _)| below.components().count()) else {
        let why = format!("the memory limits of the control group {group} cannot be seen here");
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    };
    let own: PathBuf = mount.point.iter().chain(&below).collect();
    let up = own
        .ancestors()
        .take_while(|up| up.starts_with(&mount.point));
    Ok(Some(Groups {
        version,
        directories: up.map(Path::to_owned).collect(),
    }))
}

/// The group in the hierarchy that has the memory controller. If version 1 has it, version 2 does not.
fn memory_group(cgroup: &str) -> Option<(Version, &str)> {
    // hierarchy:controllers:path
    let lines = cgroup.lines().filter_map(|line| {
        let (hierarchy, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some((hierarchy, controllers, path))
    });
    let v1 = lines
        .clone()
        .find(|(_, controllers, _)| controllers.split(',').any(|name| name == "memory"));
    if let Some((_, _, path)) = v1 {
        return Some((Version::V1, path));
    }
    let v2 = lines.clone().find(|&(hierarchy, _, _)| hierarchy == "0");
    v2.map(|(_, _, path)| (Version::V2, path))
}

/// The path from `root` down to `group`, if it leads down. Both are seen from the root of the process's cgroup
/// namespace, and begin with `..` if they are not below that.
fn below(group: &str, root: &Path) -> Option<PathBuf> {
    let below = Path::new(group).strip_prefix(root).ok()?;
    let down = |part: Component<'_>| matches!(part, Component::Normal(_));
    below.components().all(down).then(|| below.to_owned())
}

/// A mount of the hierarchy with the memory controller.
struct Mount {
    /// The group that it begins with.
    root: PathBuf,
    /// Where it is.
    point: PathBuf,
}

impl Mount {
    /// Reads a line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
    fn parse(line: &str, wanted: Version) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut words = file_system.split(' ');
        let kind = words.next()?;
        let options = words.nth(1)?;
        let fits = match wanted {
            Version::V1 => kind == "cgroup" && options.split(',').any(|name| name == "memory"),
            Version::V2 => kind == "cgroup2",
        };
        let mut words = mount.split(' ').skip(3);
        let (root, point) = (words.next()?, words.next()?);
        fits.then(|| Mount {
            root: unescape(root).into(),
            point: unescape(point).into(),
        })
    }
}

/// The kernel writes spaces, tabs, line ends and backslashes as `\` and three octal digits.
fn unescape(word: &str) -> String {
    let mut parts = word.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..3)
            .and_then(|octal| u8::from_str_radix(octal, 8).ok());
        match code {
            Some(code) => {
                text.push(code.into());
                text.push_str(&part[3..]);
            }
            None => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text
}

/// The bound that one group sets, if it sets one. `read` reads a file of the group, if that exists: the topmost group has
/// no limits, nor has one without the memory controller.
fn bound(
    version: Version,
    directory: &Path,
    read: impl Fn(&str) -> io::Result<Option<String>>,
) -> io::Result<Option<Bound>> {
    let path = |file: &str| directory.join(file).display().to_string();
    let bytes = |file: &str| -> io::Result<Option<u64>> {
        let Some(text) = read(file)? else {
            return Ok(None);
        };
        match text.trim() {
            "max" => Ok(Some(u64::MAX)),
            number => match number.parse() {
                Ok(bytes) => Ok(Some(bytes)),
                Err(_) => Err(unclear(&path(file), "a number of bytes")),
            },
        }
    };
    // Above memory.high the kernel slows a group down until it hardly moves.
    let (limits, usage, cache): (&[_], _, _) = match version {
        Version::V1 => (
            &["memory.limit_in_bytes"],
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
        Version::V2 => (
            &["memory.max", "memory.high"],
            "memory.current",
            "inactive_file",
        ),
    };
    let mut lowest: Option<(u64, &str)> = None;
    for file in limits {
        if let Some(limit) = bytes(file)?
            && lowest.is_none_or(|(lowest, _)| limit < lowest)
        {
            lowest = Some((limit, file));
        }
    }
    let Some((mut limit, mut file)) = lowest else {
        return Ok(None);
    };
    let stat = read("memory.stat")?.unwrap_or_default();
    // Version 1 also tells of limits of groups that cannot be seen from here.
    if let Some(of_all) = field(&stat, "hierarchical_memory_limit")
        && of_all < limit
    {
        (limit, file) = (of_all, "memory.stat");
    }
    if limit == u64::MAX {
        return Ok(None);
    }
    let usage = bytes(usage)?.ok_or_else(|| unclear(&path(usage), "how much is used"))?;
    Ok(Some(Bound {
        source: path(file),
        limit,
        free: limit.saturating_sub(usage),
        reclaimable: field(&stat, cache).unwrap_or(0).min(usage),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A host of systemd with version 2 only.
    const V2_MOUNTS: &str = "\
        25 30 0:23 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw\n\
        31 25 0:27 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";

    /// Version 1, with a version 2 hierarchy beside it that has no memory controller.
    const MIXED_MOUNTS: &str = "\
        31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    const MIXED_GROUPS: &str = "\
        8:pids:/\n5:devices:/\n4:memory:/machines/one\n3:cpuset,hugetlb:/\n1:name=systemd:/\n0::/user.slice\n";

    fn seen(cgroup: &str, mountinfo: &str) -> (Version, Vec<String>) {
        let groups = groups(cgroup, mountinfo).unwrap().unwrap();
        let directories = groups.directories.iter();
        let names = directories.map(|one| one.display().to_string()).collect();
        (groups.version, names)
    }

    #[test]
    fn version_2() {
        let (version, directories) = seen("0::/system.slice/vmferry@one.service\n", V2_MOUNTS);
        assert_eq!(version, Version::V2);
        assert_eq!(
            directories,
            [
                "/sys/fs/cgroup/system.slice/vmferry@one.service",
                "/sys/fs/cgroup/system.slice",
                "/sys/fs/cgroup"
            ]
        );
    }

    #[test]
    fn version_1_beside_version_2() {
        let (version, directories) = seen(MIXED_GROUPS, MIXED_MOUNTS);
        assert_eq!(version, Version::V1);
        assert_eq!(
            directories,
            [
                "/sys/fs/cgroup/memory/machines/one",
                "/sys/fs/cgroup/memory/machines",
                "/sys/fs/cgroup/memory"
            ]
        );
    }

    #[test]
    fn a_container_of_version_1_sees_its_own_group() {
        let mountinfo = "\
            700 690 0:32 /docker/0123abcd /sys/fs/cgroup/memory ro,nosuid master:17 - cgroup cgroup rw,memory\n";
        let (_, directories) = seen("4:memory:/docker/0123abcd\n", mountinfo);
        assert_eq!(directories, ["/sys/fs/cgroup/memory"]);
        let (_, directories) = seen("4:memory:/docker/0123abcd/inner\n", mountinfo);
        assert_eq!(
            directories,
            ["/sys/fs/cgroup/memory/inner", "/sys/fs/cgroup/memory"]
        );
    }

    #[test]
    fn a_container_with_a_cgroup_namespace() {
        let (_, directories) = seen("0::/\n", V2_MOUNTS);
        assert_eq!(directories, ["/sys/fs/cgroup"]);
        // A mount from outside begins above the root of the namespace, so a group next to ours can be found.
        let outside = V2_MOUNTS.replace("0:27 / ", "0:27 /.. ");
        let (_, directories) = seen("0::/../neighbour\n", &outside);
        assert_eq!(directories, ["/sys/fs/cgroup/neighbour", "/sys/fs/cgroup"]);
    }

    #[test]
    fn the_mount_that_shows_most() {
        let mountinfo =
            format!("40 25 0:27 /system.slice /mnt rw - cgroup2 cgroup2 rw\n{V2_MOUNTS}");
        let (_, directories) = seen("0::/system.slice/one\n", &mountinfo);
        assert_eq!(directories.last().unwrap(), "/sys/fs/cgroup");
        assert_eq!(directories.len(), 3);
    }

    #[test]
    fn a_group_that_cannot_be_seen() {
        for (cgroup, mountinfo) in [
            ("0::/../elsewhere\n", V2_MOUNTS),
            ("0::/one\n", ""),
            ("4:memory:/one\n", V2_MOUNTS),
            (
                "0::/other\n",
                "40 25 0:27 /system.slice /mnt rw - cgroup2 cgroup2 rw\n",
            ),
        ] {
            let error = groups(cgroup, mountinfo).unwrap_err();
            assert!(error.to_string().contains("cannot be seen"), "{error}");
        }
    }

    #[test]
    fn no_control_group_at_all() {
        assert_eq!(groups("", V2_MOUNTS).unwrap(), None);
        assert_eq!(groups("3:cpu:/one\n", MIXED_MOUNTS).unwrap(), None);
    }

    #[test]
    fn a_mount_point_with_a_space() {
        let mountinfo = "31 25 0:27 / /my\\040groups\\134 rw - cgroup2 cgroup2 rw\n";
        let (_, directories) = seen("0::/\n", mountinfo);
        assert_eq!(directories, ["/my groups\\"]);
    }

    /// The bound of a group with these files.
    fn of(version: Version, files: &[(&str, &str)]) -> io::Result<Option<Bound>> {
        bound(version, Path::new("/group"), |wanted| {
            let file = files.iter().find(|(name, _)| *name == wanted);
            Ok(file.map(|(_, text)| (*text).to_owned()))
        })
    }

    #[test]
    fn limits_of_version_2() {
        let stat =
            "anon 1000\nfile 209715200\ninactive_anon 0\ninactive_file 104857600\nactive_file 1\n";
        let files = |max, high| {
            [
                ("memory.max", max),
                ("memory.high", high),
                ("memory.current", "314572800\n"),
                ("memory.stat", stat),
            ]
        };
        let bound = of(Version::V2, &files("1073741824\n", "max\n"))
            .unwrap()
            .unwrap();
        assert_eq!(bound.source, "/group/memory.max");
        assert_eq!(bound.limit, 1024 * MIB);
        assert_eq!(bound.free, 724 * MIB);
        assert_eq!(bound.reclaimable, 100 * MIB);
        let bound = of(Version::V2, &files("1073741824\n", "209715200\n"))
            .unwrap()
            .unwrap();
        assert_eq!(bound.source, "/group/memory.high");
        assert_eq!((bound.limit, bound.free), (200 * MIB, 0));
        assert_eq!(of(Version::V2, &files("max\n", "max\n")).unwrap(), None);
    }

    #[test]
    fn limits_of_version_1() {
        let files = |limit, of_all| {
            [
                ("memory.limit_in_bytes", limit),
                ("memory.usage_in_bytes", "104857600\n"),
                ("memory.stat", of_all),
            ]
        };
        let stat = "cache 5\ninactive_file 7\nhierarchical_memory_limit 167772160\ntotal_inactive_file 1048576\n";
        let unlimited = "9223372036854771712\n";
        let bound = of(Version::V1, &files("167772160\n", stat))
            .unwrap()
            .unwrap();
        assert_eq!(bound.source, "/group/memory.limit_in_bytes");
        assert_eq!((bound.limit, bound.free), (160 * MIB, 60 * MIB));
        assert_eq!(bound.reclaimable, MIB);
        // A limit further up, where this process may not look.
        let bound = of(Version::V1, &files(unlimited, stat)).unwrap().unwrap();
        assert_eq!(
            (bound.source.as_str(), bound.limit),
            ("/group/memory.stat", 160 * MIB)
        );
    }

    #[test]
    fn groups_without_limits() {
        // The topmost group of version 2, and any without the controller.
        assert_eq!(
            of(Version::V2, &[("memory.stat", "anon 1\n")]).unwrap(),
            None
        );
        assert_eq!(of(Version::V2, &[]).unwrap(), None);
    }

    #[test]
    fn limits_that_are_not_understood() {
        of(Version::V2, &[("memory.max", "a lot\n")]).unwrap_err();
        // Nothing says how much of it is used.
        of(Version::V2, &[("memory.max", "1048576\n")]).unwrap_err();
    }
}
