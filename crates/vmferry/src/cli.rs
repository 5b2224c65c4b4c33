//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use vmferry_control::units::{parse_bandwidth, parse_duration, parse_size};
use vmferry_engine::dirty_rate::Method;
use vmferry_engine::{Discipline, Uri};
use vmferry_vmm::{
    Access, BalloonConfig, Caching, DirtyLogChoice, DiskConfig, ImageFormat, MacAddress,
    NetBackend, NetConfig, RingSize, SerialConfig,
};

/// Live migration and fault tolerance for KVM virtual machines.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "\
Sizes take the units that people write: 64M and 64MiB are 2^20 bytes each, 64MB is 10^6. Durations are \
300ms or 2s, bandwidths 1GiB/s.
Set VMFERRY_LOG=info (or debug) to see what the machine and its migrations do.

Try it:  vmferry demo"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a guest, or wait for one to arrive
    Run(Run),
    /// Move a running guest to another vmferry, or into a file
    Migrate(Migrate),
    /// Show what a guest and its migration are doing
    Status(Status),
    /// Cancel a migration; the guest goes on where it is
    Cancel(Cancel),
    /// Measure how fast a guest dirties its memory: what a migration has to keep up with
    DirtyRate(DirtyRate),
    /// Move a guest under load between two processes on this machine, and let it check its memory
    Demo(Demo),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages
    Man {
        /// Where to
        directory: PathBuf,
    },
}

/// The kernel to boot.
#[derive(Clone, Debug)]
pub enum Kernel {
    /// The image of an embedded guest.
    Guest(&'static [u8]),
    Path(PathBuf),
}

fn parse_kernel(text: &str) -> Result<Kernel, String> {
    let Some(name) = text.strip_prefix("guest:") else {
        return Ok(Kernel::Path(text.into()));
    };
    vmferry_guests::find(name)
        .map(Kernel::Guest)
        .ok_or_else(|| {
            let names: Vec<_> = vmferry_guests::GUESTS.iter().map(|g| g.name).collect();
            format!(
                "there is no embedded guest '{name}': there is {}",
                names.join(", ")
            )
        })
}

fn parse_serial(text: &str) -> Result<SerialConfig, String> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(SerialConfig::Stdio),
        None if text == "null" => Ok(SerialConfig::Null),
        Some(("file", path)) if !path.is_empty() => Ok(SerialConfig::File(path.into())),
        Some(("unix", path)) if !path.is_empty() => Ok(SerialConfig::Unix(path.into())),
        _ => Err("use stdio, null, file:PATH or unix:PATH".to_owned()),
    }
}

/// The options in a list with commas between: NAME=VALUE, each once. A comma in a value is written twice, as in QEMU.
fn options(text: &str, usage: &str) -> Result<Vec<(String, String)>, String> {
    // No argument can have a NUL, which stands in for it.
    let escaped = text.replace(",,", "\0");
    let mut options: Vec<(String, String)> = Vec::new();
    for option in escaped.split(',').map(|option| option.replace('\0', ",")) {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) if !value.is_empty() => (name.to_owned(), value.to_owned()),
            _ => return Err(format!("'{option}' is no option with a value: {usage}")),
        };
        if options.iter().any(|(known, _)| *known == name) {
            return Err(format!("'{name}' is given twice: {usage}"));
        }
        options.push((name, value));
    }
    Ok(options)
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    const USAGE: &str = "use path=FILE[,ro=on|off][,id=NAME][,direct=on|off][,format=raw]";
    let (mut path, mut id) = (None, None);
    let (mut access, mut caching) = (Access::ReadWrite, Caching::Cached);
    let mut format = ImageFormat::Unsaid;
    for (name, value) in options(text, USAGE)? {
        match (&name[..], &value[..]) {
            ("path", _) => path = Some(value.into()),
            ("id", _) => id = Some(value),
            ("ro", "on") => access = Access::ReadOnly,
            ("ro", "off") => access = Access::ReadWrite,
            ("direct", "on") => caching = Caching::Direct,
            ("direct", "off") => caching = Caching::Cached,
            ("format", "raw") => format = ImageFormat::Raw,
            ("format", other) => {
                return Err(format!(
                    "disks are raw images, and '{other}' is another format: 'qemu-img convert -O raw' makes a raw image"
                ));
            }
            _ => return Err(format!("'{name}={value}' is no option of a disk: {USAGE}")),
        }
    }
    Ok(DiskConfig {
        path: path.ok_or_else(|| format!("the path is missing: {USAGE}"))?,
        id,
        access,
        caching,
        format,
    })
}

fn parse_net(text: &str) -> Result<NetConfig, String> {
    const USAGE: &str =
        "use tap=NAME or unix=PATH[,type=stream|dgram][,local=PATH], with [,mac=ADDRESS][,id=NAME]";
    let (mut tap, mut unix, mut local) = (None, None, None);
    let (mut datagrams, mut mac, mut id) = (None, None, None);
    for (name, value) in options(text, USAGE)? {
        match (&name[..], &value[..]) {
            ("tap", _) => tap = Some(value),
            ("unix", _) => unix = Some(PathBuf::from(value)),
            ("local", _) => local = Some(PathBuf::from(value)),
            ("type", "stream") => datagrams = Some(false),
            ("type", "dgram") => datagrams = Some(true),
            ("mac", _) => {
                let address: MacAddress = value.parse().map_err(|e| format!("{e}"))?;
                mac = Some(address);
            }
            ("id", _) => id = Some(value),
            _ => {
                return Err(format!(
                    "'{name}={value}' is no option of a network: {USAGE}"
                ));
            }
        }
    }
    let backend = match (tap, unix, datagrams, local) {
        (Some(name), None, None, None) => NetBackend::Tap(name),
        (None, Some(path), None | Some(false), None) => NetBackend::UnixStream(path),
        (None, Some(remote), Some(true), local) => NetBackend::UnixDatagram { remote, local },
        (None, Some(_), _, Some(_)) => return Err("local=PATH is for type=dgram".to_owned()),
        (Some(_), ..) => return Err(format!("a TAP interface has no type and no path: {USAGE}")),
        (None, None, ..) => return Err(format!("what to connect it to is missing: {USAGE}")),
    };
    Ok(NetConfig { backend, id, mac })
}

fn parse_balloon(text: &str) -> Result<BalloonConfig, String> {
    const USAGE: &str =
        "use deflate-on-oom=on|off, free-page-hint=on|off or free-page-reporting=on|off";
    let mut config = BalloonConfig::default();
    if text.is_empty() {
        return Ok(config);
    }
    for (name, value) in options(text, USAGE)? {
        let switch = match &name[..] {
            "deflate-on-oom" => Some(&mut config.deflate_on_oom),
            "free-page-hint" => Some(&mut config.free_page_hint),
            "free-page-reporting" => Some(&mut config.free_page_reporting),
            _ => None,
        };
        match (switch, &value[..]) {
            (Some(switch), "on") => *switch = true,
            (Some(switch), "off") => *switch = false,
            _ => {
                return Err(format!(
                    "'{name}={value}' is no option of a balloon: {USAGE}"
                ));
            }
        }
    }
    Ok(config)
}

fn parse_dirty_log(text: &str) -> Result<DirtyLogChoice, String> {
    match (text, text.split_once(':')) {
        ("auto", None) => Ok(DirtyLogChoice::Auto),
        ("log", None) => Ok(DirtyLogChoice::Log),
        ("ring", None) => Ok(DirtyLogChoice::Ring(RingSize::default())),
        (_, Some(("ring", entries))) => {
            let entries = entries
                .parse()
                .map_err(|_| format!("'{entries}' is no number of entries"))?;
            RingSize::new(entries)
                .map(DirtyLogChoice::Ring)
                .map_err(|e| e.to_string())
        }
        _ => Err("use auto, log, ring or ring:ENTRIES".to_owned()),
    }
}

/// `unix:PATH`, the address of a monitor. The prefix may be left out.
fn parse_monitor(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:").unwrap_or(text) {
        "" => Err("use unix:PATH".to_owned()),
        path => Ok(path.into()),
    }
}

/// Where a guest comes from.
#[derive(Clone, Debug)]
pub enum Incoming {
    Uri(Uri),
    /// The monitor will say (`migrate-incoming`).
    Defer,
}

fn parse_incoming(text: &str) -> Result<Incoming, String> {
    match text {
        "defer" => Ok(Incoming::Defer),
        uri => uri
            .parse()
            .map(Incoming::Uri)
            .map_err(|e| format!("{e}, or defer")),
    }
}

#[derive(Debug, Args)]
pub struct Run {
    /// The kernel: a PVH ELF (vmlinux), a bzImage, or an embedded guest
    #[arg(long, value_name = "PATH|guest:NAME", value_parser = parse_kernel)]
    pub kernel: Option<Kernel>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "STR", default_value = "")]
    pub cmdline: String,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// RAM of the guest
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = parse_size)]
    pub memory: u64,
    /// How writes of the guest are logged while it migrates: log (KVM's bitmaps), ring (KVM's dirty rings, one a vCPU,
    /// of 65536 entries or of N, a power of two), or auto (what is better known to serve: log)
    #[arg(long, value_name = "auto|log|ring[:N]", default_value = "auto", value_parser = parse_dirty_log)]
    pub dirty_log: DirtyLogChoice,
    /// Where the serial port leads: stdio, null, file:PATH or unix:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = parse_serial)]
    pub serial: SerialConfig,
    /// A disk for the guest (virtio): a raw image or a block device, with the options ro=on, id=NAME, direct=on and
    /// format=raw (whatever the image looks like). A comma in FILE is written twice. May be given several times
    #[arg(long, value_name = "path=FILE,...", value_parser = parse_disk)]
    pub disk: Vec<DiskConfig>,
    /// A network interface for the guest (virtio), connected to a TAP interface of the host (tap=NAME), or to a Unix
    /// socket (unix=PATH): a stream as QEMU and passt use it, or datagrams (type=dgram, and local=PATH for those that
    /// come). With the options mac=ADDRESS, which guests in one network need, and id=NAME. May be given several times
    #[arg(long, value_name = "tap=NAME|unix=PATH,...", value_parser = parse_net)]
    pub net: Vec<NetConfig>,
    /// A virtio console for the guest, and where it leads: stdio, null, file:PATH or unix:PATH
    #[arg(long, value_name = "WHERE", value_parser = parse_serial)]
    pub console: Option<SerialConfig>,
    /// A virtio device that gives the guest random numbers
    #[arg(long)]
    pub rng: bool,
    /// A virtio balloon, by which the guest gives memory back, with the options deflate-on-oom, free-page-hint and
    /// free-page-reporting (=on or =off). With hints (on), a migration leaves the guest's free pages out; with reporting
    /// (off), they are given back to the host all the time
    #[arg(
        long,
        value_name = "OPTIONS",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = parse_balloon
    )]
    pub balloon: Option<BalloonConfig>,
    /// Where the monitor (QMP) listens
    #[arg(long, value_name = "unix:PATH", value_parser = parse_monitor)]
    pub qmp: Option<PathBuf>,
    /// Wait for a guest from there (tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND, file:PATH), or until the
    /// monitor says from where
    #[arg(long, value_name = "URI|defer", value_parser = parse_incoming)]
    pub incoming: Option<Incoming>,
    /// Resume a snapshot even if the disks that its guest can write to have changed since it was taken. Its file systems
    /// may be damaged by that
    #[arg(long, requires = "incoming")]
    pub allow_changed_disks: bool,
    /// The guest's name
    #[arg(long, value_name = "STR")]
    pub name: Option<String>,
    /// Do not start the guest, not even when it arrives: the monitor will (cont)
    #[arg(long)]
    pub paused: bool,
    /// End when the guest resets itself, instead of starting it again
    #[arg(long)]
    pub no_reboot: bool,
}

/// The address of the monitor of a running guest.
#[derive(Debug, Args)]
pub struct Monitor {
    /// The guest's monitor, as given to `vmferry run --qmp`
    #[arg(long, value_name = "unix:PATH", value_parser = parse_monitor)]
    pub qmp: PathBuf,
}

#[derive(Debug, Args)]
pub struct Migrate {
    #[command(flatten)]
    pub monitor: Monitor,
    /// Where to: tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND or file:PATH
    pub uri: Uri,
    /// How long the guest may stand still [VM's default: 300ms]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub downtime_limit: Option<Duration>,
    /// How much may be sent while the guest runs [VM's default: no limit]
    #[arg(long, value_name = "RATE", value_parser = parse_bandwidth)]
    pub max_bandwidth: Option<u64>,
    /// Leave the source process there, paused, when the guest has left
    #[arg(long)]
    pub keep_source: bool,
    /// How the dirty bitmap is kept right: lock-free, slice-lock or per-bit-lock
    #[arg(long, value_name = "NAME")]
    pub discipline: Option<Discipline>,
    /// Return when the migration has begun; the source process stays
    #[arg(long)]
    pub detach: bool,
    /// Print one JSON object and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    pub monitor: Monitor,
    /// Show it again every second, until the migration or the guest is over
    #[arg(long)]
    pub watch: bool,
    /// Print JSON: one object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Cancel {
    #[command(flatten)]
    pub monitor: Monitor,
}

#[derive(Debug, Args)]
pub struct DirtyRate {
    #[command(flatten)]
    pub monitor: Monitor,
    /// How: page-sampling (an estimate, costs the guest nothing), dirty-bitmap (exact), or dirty-ring (exact, for
    /// each vCPU; the guest must have been started with --dirty-log ring)
    #[arg(long, value_name = "NAME", default_value_t)]
    pub mode: Method,
    /// For how long, 50ms to 60s. A page that is written more than once meanwhile counts once (in mode dirty-ring,
    /// once every 100ms)
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    pub time: Duration,
    /// How many pages of each GiB to sample in mode page-sampling, 128 to 16384 [default: 512]
    #[arg(long, value_name = "N")]
    pub sample_pages: Option<u64>,
    /// Print one JSON object and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Demo {
    /// RAM of the guest
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub memory: u64,
    /// How much of it the guest keeps rewriting
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_size)]
    pub working_set: u64,
    /// How many pages it rewrites a second (0: as fast as it can)
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub rate: u64,
    /// Print one JSON object and nothing else
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_balloon_needs_no_options() {
        let balloon =
            |args: &[&str]| match Cli::try_parse_from([&["vmferry", "run"], args].concat()) {
                Ok(Cli {
                    command: Command::Run(run),
                }) => run.balloon,
                other => panic!("{other:?}"),
            };
        assert_eq!(balloon(&[]), None);
        assert_eq!(
            balloon(&["--balloon", "--rng"]),
            Some(BalloonConfig::default())
        );
        let all = "deflate-on-oom=on,free-page-hint=off,free-page-reporting=on";
        assert_eq!(balloon(&["--balloon", all]).unwrap().to_string(), all);
    }

    #[test]
    fn a_comma_in_a_path_is_written_twice() {
        for (text, path, access) in [
            ("path=a,,b.img,ro=on", "a,b.img", Access::ReadOnly),
            ("ro=on,path=a,,,,b,,", "a,,b,", Access::ReadOnly),
            ("path=a,,,ro=on", "a,", Access::ReadOnly),
            ("path=,,ro=on", ",ro=on", Access::ReadWrite),
        ] {
            let disk = parse_disk(text).unwrap();
            assert_eq!((disk.path.to_str(), disk.access), (Some(path), access));
        }
    }

    #[test]
    fn bad_values_are_explained() {
        for (args, part) in [
            (&["run", "--kernel", "guest:nobody"][..], "there is dirtier"),
            (&["run", "--serial", "tcp:1"], "file:PATH"),
            (&["run", "--disk", "ro=on"], "the path is missing"),
            (&["run", "--disk", "path=a,ro=maybe"], "'ro=maybe'"),
            (&["run", "--disk", "a.img"], "'a.img' is no option"),
            (&["run", "--disk", "path=a,id="], "'id=' is no option"),
            (&["run", "--disk", "path=a,path=b"], "'path' is given twice"),
            (&["run", "--disk", "path=a,"], "'' is no option"),
            (&["run", "--net", "id=a"], "what to connect it to"),
            (&["run", "--net", "tap=a,type=dgram"], "no type"),
            (&["run", "--net", "unix=a,local=b"], "for type=dgram"),
            (&["run", "--net", "tap=a,mac=1"], "52:54:00:12:34:56"),
            (&["run", "--net", "user"], "'user' is no option"),
            (&["run", "--console", "tcp:1"], "file:PATH"),
            (
                &["run", "--balloon", "free-page-hint=no"],
                "'free-page-hint=no'",
            ),
            (&["run", "--balloon", "large"], "deflate-on-oom=on|off"),
            (&["run", "--incoming", "nowhere"], "tcp:HOST:PORT"),
            (&["run", "--memory", "1.5.2G"], "1.5.2G"),
            (&["run", "--dirty-log", "bitmap"], "ring:ENTRIES"),
            (&["run", "--dirty-log", "ring:"], "no number of entries"),
            (&["run", "--dirty-log", "ring:1000"], "a power of two"),
            (&["migrate", "--qmp", "unix:", "tcp:a:1"], "unix:PATH"),
            (
                &["migrate", "--qmp", "x", "tcp:a:1", "--discipline", "none"],
                "lock-free",
            ),
            (&["migrate", "--qmp", "x", "tcp:a"], "tcp:HOST:PORT"),
            (
                &["dirty-rate", "--qmp", "x", "--mode", "guess"],
                "page-sampling",
            ),
            (&["dirty-rate", "--qmp", "x", "--time", "1"], "300ms or 2s"),
        ] {
            let error = Cli::try_parse_from([&["vmferry"], args].concat()).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
