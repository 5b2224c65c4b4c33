//! Linux and its balloon: what it has freed is not sent, and what it is asked for it gives back.

use std::fs;

use serde_json::{Value, json};
use vmferry_control::schema::{MigrationRamStats, RunState};

use crate::LOST;
use crate::common::lab::Lab;
use crate::common::vm::Vm;
use crate::common::{eventually, say};
use crate::host::{self, Images, ROOMY};

const INCOMING: [&str; 2] = ["--incoming", "tcp:127.0.0.1:0"];
const MEMORY: u64 = 256 << 20;
/// Bytes per second that are sent while the guest tells what is free.
const BANDWIDTH: u64 = 8 << 20;
/// Of the pages that are sent without hints, at most so many of a hundred are sent with them.
const MOST: u64 = 45;
/// Of all pages, the guest has filled and freed so many of a hundred.
const FREED: u64 = 60;

fn machine(balloon: &str) -> [&str; 4] {
    ["--memory", "256M", "--balloon", balloon]
}

/// Boots the guest, and waits until it has freed most of its memory.
fn boot(lab: &Lab, images: &Images, balloon: &str, cmdline: &str) -> Vm {
    let options = images.options(ROOMY, cmdline);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let vm = Vm::start(lab, &[&machine(balloon)[..], &options].concat());
    verifies(&vm, 1);
    vm
}

/// Waits until the guest has said, where it is now, so often that all is well.
#[track_caller]
fn verifies(vm: &Vm, times: usize) {
    eventually("Linux to verify its memory", || {
        let text = fs::read_to_string(&vm.serial).ok()?;
        assert!(!text.contains("linux: corrupt"), "{LOST}{text}");
        assert!(!text.contains("linux: kernel="), "{text}");
        (text.matches("linux: verified").count() >= times).then_some(())
    });
}

/// Asks the guest to make do with so many bytes, and waits until it does.
fn resize(vm: &mut Vm, bytes: u64) {
    vm.execute("balloon", json!({"value": bytes}));
    eventually("the balloon", || {
        let info = vm.execute("query-balloon", Value::Null);
        (info["actual"] == bytes).then_some(())
    });
}

/// Moves the guest, with hints or without, and lets it verify its memory there.
#[track_caller]
fn hop(lab: &Lab, vm: &mut Vm, balloon: &str, hints: bool) -> MigrationRamStats {
    let mut destination = Vm::start(lab, &[&machine(balloon)[..], &INCOMING].concat());
    vm.set_capability("x-vmferry-free-page-hints", hints);
    if hints {
        // The rig's CPUs are too slow to say what is free before it is sent, unless that is slow, too.
        vm.set_parameters(json!({"max-bandwidth": BANDWIDTH}));
    }
    let info = vm.migrate(&destination.uri());
    destination.wait_for_state(RunState::Running);
    verifies(&destination, 2);
    *vm = destination;
    info.ram.expect("it is over")
}

/// How many pages went over the wire: those of which the content was sent, and those of which it was sent that they
/// are all zero. A page that was sent twice counts twice.
fn sent(ram: &MigrationRamStats) -> u64 {
    ram.normal + ram.duplicate
}

#[test]
fn freed_memory_is_not_sent() {
    let test = "freed_memory_is_not_sent";
    let Some((lab, images)) = host::lab(test) else {
        return;
    };
    // What is freed stays as it was: nobody reports it, so the host does not take it.
    let balloon = "free-page-reporting=off";
    // Debian's kernel fills pages with zeros when it allocates them, and it allocates what is free to tell of it. These
    // are writes, so that of each page would be sent that it is zero.
    let mut vm = boot(&lab, &images, balloon, "init_on_alloc=0");
    let [without, with] = [false, true].map(|hints| hop(&lab, &mut vm, balloon, hints));
    say(&format!(
        "{test}: {} pages sent without hints ({} of them zero), {} with hints ({} of them zero): {:.1} %; {} left out",
        sent(&without),
        without.duplicate,
        sent(&with),
        with.duplicate,
        100.0 * sent(&with) as f64 / sent(&without) as f64,
        with.x_vmferry_hinted_pages,
    ));
    assert_eq!(without.x_vmferry_hinted_pages, 0);
    let all = MEMORY / without.page_size;
    assert!(
        without.normal * 100 > all * FREED,
        "what is free holds nothing: {without:?}"
    );
    assert!(sent(&with) * 100 <= sent(&without) * MOST, "too many");
    assert!(with.normal * 100 <= without.normal * MOST, "too many");
}

#[test]
fn freed_memory_is_given_back() {
    let test = "freed_memory_is_given_back";
    let Some((lab, images)) = host::lab(test) else {
        return;
    };
    let mut vm = boot(&lab, &images, "free-page-reporting=on", "");
    // It has touched more than it has freed.
    let least = MEMORY * FREED / 100;
    let resident = eventually("the host to get memory back", || {
        let resident = resident(&vm);
        (resident < least).then_some(resident)
    });
    eventually("statistics", || {
        let info = vm.execute("query-balloon", Value::Null);
        let free = info["x-vmferry-stats"]["free-memory"].as_u64()?;
        (free > least / 2).then_some(())
    });
    verifies(&vm, 2);
    resize(&mut vm, MEMORY - (64 << 20));
    verifies(&vm, 4);
    resize(&mut vm, MEMORY);
    verifies(&vm, 6);
    say(&format!(
        "{test}: {} of {} MiB are left with the guest",
        resident >> 20,
        MEMORY >> 20
    ));
}

/// Bytes of memory that a machine has from its host.
fn resident(vm: &Vm) -> u64 {
    let status = format!("/proc/{}/status", vm.pid());
    let status = fs::read_to_string(status).expect("the machine runs");
    let (_, kib) = status.split_once("RssAnon:").expect("Linux tells");
    let kib = kib
        .split_whitespace()
        .next()
        .and_then(|kib| kib.parse().ok());
    kib.map(|kib: u64| kib << 10).expect("Linux tells")
}
