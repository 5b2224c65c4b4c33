//! Linux is moved, and does not notice.

use std::time::Instant;

use crate::common::say;
use crate::host;
use crate::linux::Linux;

const HOPS: usize = 5;

fn there_and_back(test: &str, cpus: &str) {
    let Some((lab, images)) = host::lab(test) else {
        return;
    };
    let start = Instant::now();
    let mut guest = Linux::boot(&lab, &images, cpus);
    let booted = start.elapsed();
    guest.works();
    let mut downtimes = Vec::new();
    for _ in 0..HOPS {
        let info = guest.hop();
        downtimes.push(info.x_vmferry_downtime_us.expect("it is known at the end"));
        guest.works();
    }
    guest.verifies_all();
    let longest = *downtimes.iter().max().expect("there were some") as f64 / 1e6;
    guest.check(longest);
    say(&format!(
        "{test}: booted in {:.1} s; {HOPS} migrations in {:.1} s; longest downtime {:.0} ms; corrupt 0",
        booted.as_secs_f64(),
        (start.elapsed() - booted).as_secs_f64(),
        longest * 1e3,
    ));
}

#[test]
fn there_and_back_with_1_vcpu() {
    there_and_back("there_and_back_with_1_vcpu", "1");
}

#[test]
fn there_and_back_with_2_vcpus() {
    there_and_back("there_and_back_with_2_vcpus", "2");
}
