//! Linux is moved, and does not notice.

use std::time::Instant;

use crate::common::say;
use crate::host;
use crate::linux::Linux;

const HOPS: usize = 5;

#[test]
fn there_and_back_with_1_vcpu() {
    let Some((lab, images)) = host::lab("there_and_back_with_1_vcpu") else {
        return;
    };
    let start = Instant::now();
    let mut guest = Linux::boot(&lab, &images, &["--cpus", "1", "--memory", "256M"]);
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
        "Linux, 1 vCPU: booted in {:.1} s; {HOPS} migrations in {:.1} s; longest downtime {:.0} ms; corrupt 0",
        booted.as_secs_f64(),
        (start.elapsed() - booted).as_secs_f64(),
        longest * 1e3,
    ));
}
