//! `vmferry dirty-rate`.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::json;
use vmferry_control::QmpClient;
use vmferry_control::schema::{DirtyRateInfo, DirtyRateStatus};
use vmferry_control::units::format_bandwidth;

use crate::cli;
use crate::output::print;
use crate::progress::{PATIENCE, POLL};
use crate::report::Table;

/// How much longer than asked for it may take: all of a large guest's memory is looked at before it begins.
const SLACK: Duration = Duration::from_secs(60);

/// Has a guest's dirty rate measured, and shows it.
pub fn dirty_rate(options: &cli::DirtyRate) -> anyhow::Result<()> {
    let mut vm = QmpClient::connect(&options.monitor.qmp, PATIENCE)?;
    let mut arguments = json!({
        "calc-time": u64::try_from(options.time.as_millis()).unwrap_or(u64::MAX),
        "calc-time-unit": "millisecond",
        "mode": options.mode.as_str(),
    });
    if let Some(pages) = options.sample_pages {
        arguments["sample-pages"] = pages.into();
    }
    vm.execute("calc-dirty-rate", arguments)?;
    let info = wait(&mut vm, options.time + SLACK)?;
    print(match options.json {
        true => format!("{}\n", json!(info)),
        false => describe(&info, options)?,
    })
}

fn wait(vm: &mut QmpClient, time: Duration) -> anyhow::Result<DirtyRateInfo> {
    let end = Instant::now() + time;
    loop {
        let info = vm.query_dirty_rate()?;
        match info.status {
            DirtyRateStatus::Measured => return Ok(info),
            DirtyRateStatus::Unstarted => {
                bail!("the measurement was ended: a migration of the guest has begun")
            }
            DirtyRateStatus::Measuring if Instant::now() > end => {
                bail!("the measurement does not end")
            }
            DirtyRateStatus::Measuring => std::thread::sleep(POLL),
        }
    }
}

fn describe(info: &DirtyRateInfo, options: &cli::DirtyRate) -> anyhow::Result<String> {
    const MIB: u64 = 1 << 20;
    let mib = info.dirty_rate.context("the VM says no dirty rate")?;
    let rate = match info.x_vmferry_dirty_pages_rate {
        Some(pages) => format!("{} ({pages} pages/s)", format_bandwidth(pages * 4096)),
        None => format_bandwidth(mib * MIB),
    };
    let mut table = Table::default();
    for vcpu in info.vcpu_dirty_rate.iter().flatten() {
        table.row(
            &format!("vCPU {}", vcpu.id),
            format_bandwidth(vcpu.dirty_rate * MIB),
        );
    }
    Ok(format!(
        "{rate}, measured by {} over {:?}\n{table}",
        options.mode, options.time
    ))
}
