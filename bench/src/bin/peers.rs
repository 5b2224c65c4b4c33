//! Migrates the same guest with QEMU and with vmferry in turn, and compares.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Parser;
use serde_json::json;
use vmferry_bench::case::{self, CASES, Case, MEMORY_MIB};
use vmferry_bench::host::Host;
use vmferry_bench::interrupt::Interrupt;
use vmferry_bench::peer::{Kind, Peer};
use vmferry_bench::race::{self, Watch};
use vmferry_bench::report::{CaseReport, Series};

/// Migrates the same guest with QEMU and with vmferry in turn, over loopback TCP, and compares.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Options {
    /// Migrations of each case with each VMM that are counted; one more comes first
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Run this case only (idle, busy or zero); can be given more than once
    #[arg(long = "case", value_name = "NAME", value_parser = case::parse)]
    cases: Vec<Case>,
    /// Run one VMM only
    #[arg(long, value_name = "NAME")]
    peer_only: Option<Kind>,
    /// The vmferry to run [default: the one built beside this program]
    #[arg(long, value_name = "PATH")]
    vmferry: Option<PathBuf>,
    /// Print one JSON object and nothing else
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match compare(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(options: &Options) -> anyhow::Result<()> {
    let peers = peers(options)?;
    let host = Host::this();
    let say = |text: String| {
        if !options.json {
            eprintln!("{text}");
        }
    };
    say(format!("host     {host}"));
    for peer in &peers {
        say(format!("{:8} {}", peer.name(), peer.version));
    }

    let interrupt = Interrupt::catch()?;
    let elf = vmferry_guests::find("dirtier").context("there is no guest 'dirtier'")?;
    let dir = tempfile::tempdir().context("cannot create a directory for the guest")?;
    let image = dir.path().join("dirtier");
    fs::write(&image, elf).context("cannot write the guest to a file")?;

    let cases = match &options.cases[..] {
        [] => CASES,
        some => some,
    };
    let mut reports = Vec::new();
    for case in cases {
        let series = peers.iter().map(|peer| Series {
            peer: peer.clone(),
            warm_up: None,
            runs: Vec::new(),
        });
        let mut report = CaseReport {
            case: *case,
            series: series.collect(),
        };
        // The first round is not counted: in it, the host may have to find memory that it gives to all
        // later ones at once. It shows that nothing gets lost, which takes a while and once is enough.
        for round in 0..=options.runs {
            let watch = match round {
                0 => Watch::FullSweep,
                _ => Watch::Shortly,
            };
            for series in &mut report.series {
                let (peer, name) = (&series.peer, series.peer.name());
                let run = race::run(peer, case, &image, watch, &interrupt)
                    .with_context(|| format!("{name}, case {}, round {round}", case.name))?;
                say(format!(
                    "{} {round}/{} {name}: whole move {:.0} ms, felt {:.1} ms, {} pages verified",
                    case.name, options.runs, run.whole_ms, run.felt_ms, run.verified
                ));
                match watch {
                    Watch::FullSweep => series.warm_up = Some(run),
                    Watch::Shortly => series.runs.push(run),
                }
            }
        }
        if !options.json {
            println!("\n{report}");
        }
        reports.push(report);
    }

    if options.json {
        let versions: Vec<_> = peers.iter().map(|peer| &peer.version).collect();
        let cases: Vec<_> = reports.iter().map(CaseReport::json).collect();
        let all = json!({
            "host": host,
            "versions": versions,
            "memory-mib": MEMORY_MIB,
            "cases": cases,
        });
        println!("{all}");
    }
    let all = reports.iter().flat_map(|report| &report.series);
    let corrupt: u64 = all.map(Series::corrupt).sum();
    ensure!(corrupt == 0, "{corrupt} pages are corrupt");
    Ok(())
}

/// What is to be compared; all of it is there.
fn peers(options: &Options) -> anyhow::Result<Vec<Peer>> {
    let kinds = match options.peer_only {
        Some(kind) => vec![kind],
        None => vec![Kind::Qemu, Kind::Vmferry],
    };
    let find = |kind| match kind {
        Kind::Qemu => Peer::qemu(),
        Kind::Vmferry => Peer::vmferry(options.vmferry.as_deref()),
    };
    kinds.into_iter().map(find).collect()
}
