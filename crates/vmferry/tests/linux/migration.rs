//! Linux is moved there and back five times, and does not notice.

use std::time::Instant;

use crate::common::say;
use crate::disk::Disk;
use crate::host;
use crate::linux::Linux;
use crate::network::{Conversation, Network};

/// Five times there, five times back.
const HOPS: usize = 10;

fn there_and_back(test: &str, cpus: &str) {
    let Some((lab, images)) = host::lab(test) else {
        return;
    };
    let Some(disk) = Disk::make(&lab, test) else {
        return;
    };
    let network = Network::new(test);
    let start = Instant::now();
    let mut guest = Linux::boot(&lab, &images, cpus, &disk, network.as_ref());
    let talk = network.as_ref().map(Network::talk);
    let booted = start.elapsed();
    guest.works();
    let mut downtimes = Vec::new();
    for _ in 0..HOPS {
        let info = guest.hop();
        downtimes.push(info.x_vmferry_downtime_us.expect("it is known at the end"));
        guest.works();
        if let Some(talk) = &talk {
            talk.goes_on();
        }
    }
    guest.verifies_all();
    let talked = talk.map(Conversation::end);
    guest.power_off();
    let longest = *downtimes.iter().max().expect("there were some") as f64 / 1e6;
    guest.check(longest);
    let written = guest.last().disk;
    let files = disk.check();
    assert!(files > 0, "no file was written to the disk");
    say(&format!(
        "{test}: booted in {:.1} s; {HOPS} migrations in {:.1} s; longest downtime {:.0} ms; {written} writes to the disk, \
         {files} files verified on it afterwards; corrupt 0",
        booted.as_secs_f64(),
        (start.elapsed() - booted).as_secs_f64(),
        longest * 1e3,
    ));
    if let Some((lines, longest)) = talked {
        say(&format!(
            "{test}: {lines} lines echoed over one TCP connection, the slowest in {:.0} ms",
            longest.as_secs_f64() * 1e3
        ));
    }
}

#[test]
fn there_and_back_with_1_vcpu() {
    there_and_back("there_and_back_with_1_vcpu", "1");
}

#[test]
fn there_and_back_with_2_vcpus() {
    there_and_back("there_and_back_with_2_vcpus", "2");
}
