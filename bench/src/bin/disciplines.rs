//! The disciplines inside a real migration: a guest of 4 GiB moves under each of them, and the engine tells what
//! share of the migration thread's time went into the bitmap. Or it moves with dirty logs armed in chunks of
//! different sizes.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Parser;
use serde_json::{Value, json};
use vmferry_bench::case::Case;
use vmferry_bench::host::Host;
use vmferry_bench::interrupt::Interrupt;
use vmferry_bench::median::Median;
use vmferry_bench::peer::{Peer, Role};
use vmferry_bench::vm::Vm;
use vmferry_control::schema::MigrationInfo;
use vmferry_control::units::{format_size, parse_size};
use vmferry_dirty::Discipline;

/// A guest with much to send, and with pages that must be sent again.
const GUEST: Case = Case {
    name: "4 GiB",
    about: "2 GiB of incompressible memory, 512 MiB of it rewritten at random at 50,000 pages a second",
    memory_mib: 4096,
    cmdline: "ws=512M rate=50000 pattern=random fill=random cold=1536M cold_fill=random seed=1",
};

/// Migrates the same guest under each discipline, in turn.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Options {
    /// Migrations under each discipline
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Compare arming chunks of this size instead, all lock-free; can be given more than once
    #[arg(long = "chunk", value_name = "SIZE", value_parser = parse_size)]
    chunks: Vec<u64>,
}

fn main() -> ExitCode {
    match compare(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("disciplines: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A row of the table.
type Row = (&'static str, usize, fn(&MigrationInfo) -> Option<f64>);

#[rustfmt::skip]
const ROWS: &[Row] = &[
    ("in the bitmap, % of the time", 3, |info| share(info, info.x_vmferry_dirty_tracking?.bitmap_us)),
    ("in the bitmap, ns a page taken", 1, |info| {
        let ram = info.ram.as_ref()?;
        let us = info.x_vmferry_dirty_tracking?.bitmap_us;
        Some(us as f64 * 1e3 / (ram.normal + ram.duplicate) as f64)
    }),
    ("arming the log, % of the time", 3, |info| share(info, info.x_vmferry_dirty_tracking?.arming_us)),
    ("fetching the log, % of the time", 3, |info| share(info, info.x_vmferry_dirty_tracking?.sync_us)),
    ("total time, ms", 0, |info| Some(info.total_time? as f64)),
    ("downtime, ms", 1, |info| Some(info.x_vmferry_downtime_us? as f64 / 1e3)),
    ("pages sent", 0, |info| Some(info.ram.as_ref()?.normal as f64)),
    ("passes", 0, |info| Some(info.ram.as_ref()?.dirty_sync_count as f64)),
];

fn share(info: &MigrationInfo, us: u64) -> Option<f64> {
    Some(us as f64 / 10.0 / info.total_time? as f64)
}

fn compare(options: &Options) -> anyhow::Result<()> {
    println!("host     {}", Host::this());
    println!("guest    {}: {}", GUEST.name, GUEST.about);
    let peer = Peer::vmferry(None)?;
    let interrupt = Interrupt::catch()?;
    let contenders: Vec<(String, Value)> = match &options.chunks[..] {
        [] => Discipline::ALL
            .map(|d| (d.to_string(), json!({"x-vmferry-discipline": d.as_str()})))
            .into(),
        chunks => chunks
            .iter()
            .map(|&size| (format_size(size), json!({"x-vmferry-arming-chunk": size})))
            .collect(),
    };
    let mut migrations = vec![Vec::new(); contenders.len()];
    for _ in 0..options.runs {
        for ((_, parameters), migrations) in contenders.iter().zip(&mut migrations) {
            migrations.push(migrate(&peer, parameters, &interrupt)?);
        }
    }
    print!("  {:34}", "");
    for (name, _) in &contenders {
        print!("{name:>26}");
    }
    println!();
    for (name, digits, of) in ROWS {
        print!("  {name:34}");
        for migrations in &migrations {
            let values: Option<Vec<f64>> = migrations.iter().map(of).collect();
            let Median { median, min, max } = values
                .and_then(|values| Median::of(values.into_iter()))
                .with_context(|| format!("a migration does not tell: {name}"))?;
            let text = format!("{median:.digits$} [{min:.digits$}, {max:.digits$}]");
            print!("{text:>26}");
        }
        println!();
    }
    Ok(())
}

/// One migration from a new machine to another.
fn migrate(
    peer: &Peer,
    parameters: &Value,
    interrupt: &Interrupt,
) -> anyhow::Result<MigrationInfo> {
    let dir = tempfile::tempdir().context("cannot create a directory for sockets")?;
    let elf = dir.path().join("dirtier");
    let guest = vmferry_guests::find("dirtier").context("there is no guest 'dirtier'")?;
    std::fs::write(&elf, guest).context("cannot write the guest's kernel")?;
    let start = |role| Vm::start(peer, role, &GUEST, &elf, dir.path(), interrupt);
    let mut source = start(Role::Source)?;
    source.settle()?;
    let mut destination = start(Role::Destination)?;
    let uri = destination.listening()?;
    let info = source.migrate(&uri, parameters.clone())?;
    drop(source);
    let beats = destination.beats(|beats| !beats.is_empty())?;
    let corrupt = beats[beats.len() - 1].heartbeat.corrupt;
    ensure!(corrupt == 0, "the guest found {corrupt} pages corrupt");
    Ok(info)
}
