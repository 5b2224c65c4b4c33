//! Compares KVM's dirty logs: what a sync costs, and what the guest pays.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use clap::Parser;
use vmferry_bench::host::Host;
use vmferry_bench::interrupt::Interrupt;
use vmferry_bench::median::Median;
use vmferry_bench::tracking::{Cell, Cost, measure};
use vmferry_control::units::{format_size, parse_size};
use vmferry_dirty::ArmingChunk;
use vmferry_vmm::{DirtyLogChoice, RingSize};

/// Runs the same guest with KVM's dirty bitmaps and with its dirty rings, and tracks its writes for some seconds as a
/// migration does that goes on and on.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Options {
    /// Pages that the guest rewrites a second (0: as many as it can); can be given more than once [default: 1000,
    /// 50000 and 0]
    #[arg(long = "rate", value_name = "N")]
    rates: Vec<u64>,
    /// Entries of a ring; can be given more than once [default: 4096, 16384 and 65536]
    #[arg(long = "entries", value_name = "N", value_parser = ring)]
    rings: Vec<RingSize>,
    /// Compare arming chunks of this size instead, all with the log; can be given more than once
    #[arg(long = "chunk", value_name = "SIZE", value_parser = parse_size, conflicts_with = "rings")]
    chunks: Vec<u64>,
    /// RAM of the guest, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    memory: u64,
    /// Memory that the guest rewrites, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    working_set: u64,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// How long to watch the guest, before and during the tracking each, in seconds: 4 or more
    #[arg(long, value_name = "S", default_value_t = 4, value_parser = clap::value_parser!(u64).range(4..))]
    time: u64,
}

fn ring(entries: &str) -> anyhow::Result<RingSize> {
    Ok(RingSize::new(entries.parse()?)?)
}

fn main() -> ExitCode {
    match compare(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dirty_log: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(options: &Options) -> anyhow::Result<()> {
    println!("host     {}", Host::this());
    let Options { memory, cpus, .. } = options;
    let working_set = options.working_set;
    println!("guest    {cpus} vCPU, {memory} MiB of RAM, of which it rewrites {working_set} MiB");
    let rates = match &options.rates[..] {
        [] => &[1000, 50_000, 0],
        some => some,
    };
    let interrupt = Interrupt::catch()?;
    for &rate in rates {
        let cell = |(dirty_log, chunk)| Cell {
            dirty_log,
            chunk,
            memory: memory << 20,
            cpus: *cpus,
            working_set,
            rate,
            time: Duration::from_secs(options.time),
        };
        let mut costs = Vec::new();
        for (name, what) in contenders(options)? {
            let cost = measure(&cell(what), &interrupt)?;
            ensure!(cost.rate_before > 0.0, "the guest does nothing");
            costs.push((name, cost));
        }
        match rate {
            0 => println!("\nthe guest rewrites as many pages as it can"),
            _ => println!("\nthe guest rewrites {rate} pages a second"),
        }
        print(&costs);
    }
    Ok(())
}

/// What is compared: the log, and then the rings; or the log with different arming chunks.
fn contenders(options: &Options) -> anyhow::Result<Vec<(String, (DirtyLogChoice, ArmingChunk))>> {
    if !options.chunks.is_empty() {
        let chunk = |&bytes: &u64| {
            let chunk = ArmingChunk::from_bytes(bytes as usize);
            (
                format_size(chunk.bytes() as u64),
                (DirtyLogChoice::Log, chunk),
            )
        };
        return Ok(options.chunks.iter().map(chunk).collect());
    }
    let rings = match &options.rings[..] {
        [] => [1 << 12, 1 << 14, 1 << 16]
            .map(RingSize::new)
            .into_iter()
            .collect::<Result<_, _>>()?,
        some => some.to_vec(),
    };
    let chunk = ArmingChunk::default();
    let rings = rings.into_iter().map(|size: RingSize| {
        let name = format!("ring:{}", size.entries());
        (name, (DirtyLogChoice::Ring(size), chunk))
    });
    let log = ("log".to_owned(), (DirtyLogChoice::Log, chunk));
    Ok(std::iter::once(log).chain(rings).collect())
}

/// A row of the table, and how to read it off.
type Row = (&'static str, usize, fn(&Cost) -> Value);

enum Value {
    Once(f64),
    Often(Median),
}

#[rustfmt::skip]
const ROWS: &[Row] = &[
    ("switching on, ms", 2, |cost| Value::Once(cost.start)),
    ("arming all, first pass, ms", 2, |cost| Value::Once(cost.first_arming)),
    ("a sync, ms", 3, |cost| Value::Often(cost.sync)),
    ("arming a pass, ms", 3, |cost| Value::Often(cost.arming)),
    ("both, ms", 3, |cost| Value::Often(cost.both)),
    ("pages found by a sync", 0, |cost| Value::Often(cost.pages)),
    ("guest before, pages/s", 0, |cost| Value::Once(cost.rate_before)),
    ("guest while tracked, pages/s", 0, |cost| Value::Once(cost.rate)),
    ("longest gap in the guest, ms", 1, |cost| Value::Once(cost.gap)),
];

/// Prints them side by side, each with its ratio to the first.
fn print(costs: &[(String, Cost)]) {
    print!("  {:30}", "");
    for (name, _) in costs {
        print!("{name:>30}");
    }
    println!("   ratios to the first");
    for (name, digits, of) in ROWS {
        print!("  {name:30}");
        let digits = *digits;
        let mut values = Vec::new();
        for (_, cost) in costs {
            let (value, text) = match of(cost) {
                Value::Once(value) => (value, format!("{value:.digits$}")),
                Value::Often(Median { median, min, max }) => {
                    let text = format!("{median:.digits$} [{min:.digits$}, {max:.digits$}]");
                    (median, text)
                }
            };
            values.push(value);
            print!("{text:>30}");
        }
        let ratios = values[1..].iter().map(|value| match values[0] {
            0.0 => "-".to_owned(),
            log => format!("{:.2}", value / log),
        });
        println!("   {}", ratios.collect::<Vec<_>>().join(" "));
    }
}
