//! Ten migrations in a row, for every number of vCPUs and every discipline: nothing is lost.
//!
//! With `VMFERRY_FULL=1` every guest has 2 GiB with 1.25 GiB of content; without it only one of them has, and
//! the others less that is cold, so that all of it takes minutes.

use std::time::Instant;

use serde_json::json;
use vmferry_testing::host::full_size;

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::say;

const HOPS: usize = 10;

/// How much longer than its migration's downtime a guest may feel that it stood still: the host is shared with
/// whatever else runs there, and a vCPU waits for its turn.
const SCHEDULING_US: u64 = 5_000_000;

fn ten_hops(lab: &Lab, cpus: u32, discipline: &str, cold: &str, dirty_log: &'static str) {
    let start = Instant::now();
    let sweep = 200_000 / cpus;
    let mut guest = Guest::boot(
        lab,
        Shape {
            memory: "2G",
            cpus,
            dirty_log,
            load: format!(
                "ws=256M rate=50000 pattern=random fill=random cold={cold} cold_fill=random sweep={sweep}"
            ),
            more: Vec::new(),
        },
    );
    guest.works();
    let mut downtimes = Vec::new();
    let mut totals = Vec::new();
    for _ in 0..HOPS {
        guest
            .vm
            .set_parameters(json!({"x-vmferry-discipline": discipline}));
        let info = guest.hop();
        assert_eq!(
            info.x_vmferry_discipline.map(|d| d.to_string()).as_deref(),
            Some(discipline)
        );
        downtimes.push(info.x_vmferry_downtime_us.expect("it is known at the end"));
        totals.push(info.total_time.expect("it is known at the end"));
        guest.works();
    }
    guest.verifies_all();
    let longest = *downtimes.iter().max().expect("there were some");
    for vcpu in 0..cpus {
        guest
            .story()
            .check_continuity(vcpu, longest + SCHEDULING_US);
    }
    downtimes.sort_unstable();
    totals.sort_unstable();
    say(&format!(
        "{cpus} vCPUs, {discipline}, cold {cold}, dirty log {dirty_log}: {HOPS} migrations in {:.0} s; downtime {:.1} ms (median) \
         {:.1} ms (longest), total {} ms (median), corrupt 0",
        start.elapsed().as_secs_f64(),
        downtimes[HOPS / 2] as f64 / 1e3,
        longest as f64 / 1e3,
        totals[HOPS / 2],
    ));
}

fn every_discipline(cpus: u32) {
    let Some(lab) = Lab::new() else { return };
    for discipline in ["per-bit-lock", "slice-lock", "lock-free"] {
        let large = full_size() || (cpus == 4 && discipline == "lock-free");
        let cold = if large { "1G" } else { "64M" };
        ten_hops(&lab, cpus, discipline, cold, "auto");
    }
}

#[test]
fn there_and_back_with_1_vcpu() {
    every_discipline(1);
}

#[test]
fn there_and_back_with_2_vcpus() {
    every_discipline(2);
}

#[test]
fn there_and_back_with_4_vcpus() {
    every_discipline(4);
}

#[test]
fn there_and_back_with_2_vcpus_and_dirty_rings() {
    let Some(lab) = Lab::with_dirty_ring() else {
        return;
    };
    ten_hops(&lab, 2, "lock-free", "64M", "ring");
}
