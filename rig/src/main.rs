//! `vmferry-rig`: runs a command in a Linux that has a working `/dev/kvm`.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use vmferry_rig::{Debian, Rig, RigError, default_cache};

/// The rig's own exit statuses; the command's are passed on. They are those of timeout(1) and env(1).
const TIMED_OUT: u8 = 124;
const FAILED: u8 = 125;

#[derive(Debug, Parser)]
#[command(name = "vmferry-rig", version, about, max_term_width = 100)]
struct Cli {
    /// Where unpacked packages are kept [default: rig in the target directory]
    #[arg(long, global = true, value_name = "DIR")]
    cache: Option<PathBuf>,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Boot, run a command as root, pass on its output and exit status, and leave nothing behind
    ///
    /// The exit status is the command's, 124 if it was not over in time, or 125 if the rig itself failed.
    Run(Run),
    /// Get the packages that the rig is made of, and print the path of the kernel
    Image,
}

#[derive(Debug, Args)]
struct Run {
    /// Copy this file or directory into the first level, to the same path or to DEST; programs with their libraries
    #[arg(long, value_name = "PATH[:DEST]", value_parser = parse_with)]
    with: Vec<(PathBuf, PathBuf)>,
    /// Set an environment variable of the command
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// How long all of it may take
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// MiB of memory of the first level
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u32,
    /// CPUs of the first level. With more than one, QEMU's emulation is not reliable
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Show what the first level's kernel prints
    #[arg(long)]
    console: bool,
    /// The command
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn parse_with(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let (path, at) = match text.split_once(':') {
        Some((path, at)) => (path, Some(at)),
        None => (text, None),
    };
    // In the first level there is no directory that a relative path would start from.
    let path = std::path::absolute(path).map_err(|e| format!("{path}: {e}"))?;
    let at = at.map_or_else(|| path.clone(), PathBuf::from);
    Ok((path, at))
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("use NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let cache = cli.cache.unwrap_or_else(default_cache);
    let result = Debian::get(&cache).and_then(|debian| match cli.what {
        What::Run(options) => run(&options, &debian),
        What::Image => {
            println!("{}", debian.kernel().display());
            Ok(0)
        }
    });
    let status = result.unwrap_or_else(|error| {
        eprintln!("vmferry-rig: {error}");
        match error {
            RigError::TimedOut { .. } => TIMED_OUT,
            _ => FAILED,
        }
    });
    ExitCode::from(status)
}

fn run(options: &Run, debian: &Debian) -> Result<u8, RigError> {
    let mut rig = Rig::new(options.command.iter().cloned());
    rig.memory_mib(options.memory)
        .cpus(options.cpus)
        .timeout(options.timeout);
    for (path, at) in &options.with {
        rig.with_at(path, at);
    }
    for (name, value) in &options.env {
        rig.env(name, value);
    }
    if options.console {
        rig.show_console();
    }
    Ok(rig.run(debian, io::stdout(), io::stderr())?.status)
}
