//! Measuring how fast a guest dirties its memory, alone and beside its migrations.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_control::schema::{DirtyRateInfo, DirtyRateStatus, MigrationStatus, RunState};

use crate::common::command::{Finished, on_vm};
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::vm::Vm;
use crate::common::{PATIENCE, Random, eventually, say};

/// A guest that rewrites 64 MiB (16,384 pages) at 20,000 pages a second, one after the other.
fn steady() -> Shape {
    Shape {
        load: "ws=64M rate=20000 pattern=seq cold=64M sweep=10000".to_owned(),
        ..Shape::small()
    }
}

/// What may be measured of it in one second, in pages. On a busy host the guest comes to much less, and pages that it
/// only reads are logged too while huge pages are being split; how exact the measurement is, the engine's own tests
/// know.
const IN_A_SECOND: RangeInclusive<u64> = 1_000..=24_000;

fn measure(vm: &Vm, more: &[&str]) -> Finished {
    vm.command("dirty-rate", more)
}

fn pages(info: &Value) -> u64 {
    info["x-vmferry-dirty-pages-rate"]
        .as_u64()
        .unwrap_or_else(|| panic!("no pages in {info}"))
}

fn long(mode: &str) -> Value {
    json!({"calc-time": 60, "mode": mode})
}

#[track_caller]
fn info(vm: &mut Vm) -> DirtyRateInfo {
    vm.qmp.query_dirty_rate().expect("query-dirty-rate")
}

#[test]
fn a_known_rate() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, steady());
    for (mode, options) in [
        ("dirty-bitmap", &["--mode", "dirty-bitmap"][..]),
        ("page-sampling", &["--sample-pages", "16384"]),
    ] {
        let measured = measure(&guest.vm, &[options, &["--json"]].concat());
        assert!(measured.status.success(), "{measured:#?}");
        let answer = measured.json();
        say(&format!("20,000 pages/s by {mode}: {answer}"));
        assert!(IN_A_SECOND.contains(&pages(&answer)), "{answer}");
        assert_eq!(answer["dirty-rate"], pages(&answer) / 256);
        assert_eq!(answer["status"], "measured");
        assert_eq!(answer["calc-time"], 1000);
        assert_eq!(answer["mode"], mode);
    }
    // Fewer pages a second in a longer time: none counts twice.
    let options = ["--mode", "dirty-bitmap", "--time", "3s"];
    let words = measure(&guest.vm, &options).succeeded();
    assert!(words.contains("MiB/s ("), "{words}");
    assert!(
        words.ends_with(" pages/s), measured by dirty-bitmap over 3s\n"),
        "{words}"
    );
    let answer = guest.vm.execute("query-dirty-rate", Value::Null);
    assert_eq!(answer["calc-time"], 3);
    assert!((300..=8_000).contains(&pages(&answer)), "{answer}");

    guest.vm.execute("stop", Value::Null);
    let answer = measure(
        &guest.vm,
        &[&options[..2], &["--time", "50ms", "--json"]].concat(),
    );
    assert_eq!(pages(&answer.json()), 0);
    guest.vm.execute("cont", Value::Null);
    guest.works();

    // It can be measured where it came to as well.
    guest.hop();
    let answer = measure(&guest.vm, &["--mode", "dirty-bitmap", "--json"]).json();
    assert!(IN_A_SECOND.contains(&pages(&answer)), "{answer}");
    guest.verifies_all();
}

/// Pages written again count again, ten times a second, and the vCPUs are told apart.
#[test]
fn by_the_dirty_ring() {
    let Some(lab) = Lab::with_dirty_ring() else {
        return;
    };
    let shape = Shape {
        cpus: 2,
        dirty_log: "ring",
        load: "ws=4M rate=20000 pattern=seq".to_owned(),
        ..Shape::small()
    };
    let guest = Guest::boot(&lab, shape);
    let vm = &guest.vm;
    let ring = measure(vm, &["--mode", "dirty-ring", "--json"]).json();
    say(&format!("20,000 pages/s by 2 vCPUs: {ring}"));
    let vcpus = ring["vcpu-dirty-rate"].as_array().expect("a rate a vCPU");
    assert_eq!(vcpus.len(), 2);
    assert_eq!((&vcpus[0]["id"], &vcpus[1]["id"]), (&json!(0), &json!(1)));
    // All 1,024 pages in (nearly) every tenth of a second.
    assert!((1_000..=13_000).contains(&pages(&ring)), "{ring}");
    let words = measure(vm, &["--mode", "dirty-ring"]).succeeded();
    assert!(words.contains("\n  vCPU 0  "), "{words}");
    assert!(words.contains("\n  vCPU 1  "), "{words}");
    // A ring serves as a bitmap, too.
    let once = measure(vm, &["--mode", "dirty-bitmap", "--json"]).json();
    assert!((200..=1_200).contains(&pages(&once)), "{once}");
    assert!(once.get("vcpu-dirty-rate").is_none(), "{once}");
    guest.works();
}

#[test]
fn what_is_refused() {
    let Some(lab) = Lab::new() else { return };
    let args = ["--memory", "128M", "--dirty-log", "log"];
    let kernel = ["--kernel", "guest:dirtier", "--cmdline", "ws=4M"];
    let mut vm = Vm::start(&lab, &[args, kernel].concat());
    for (options, part) in [
        (
            &["--mode", "dirty-ring"][..],
            "start the guest with '--dirty-log ring'",
        ),
        (&["--time", "49ms"], "range of 50 ms to 60 s"),
        (&["--time", "61s"], "range of 50 ms to 60 s"),
        (&["--sample-pages", "127"], "range of 128 to 16384"),
        (
            &["--mode", "dirty-bitmap", "--sample-pages", "512"],
            "for mode page-sampling only",
        ),
    ] {
        let words = measure(&vm, options).failed();
        assert!(words.contains(part), "{options:?}: {words}");
    }
    assert_eq!(info(&mut vm).status, DirtyRateStatus::Unstarted);

    vm.execute("calc-dirty-rate", long("dirty-bitmap"));
    let measuring = info(&mut vm);
    assert_eq!(measuring.status, DirtyRateStatus::Measuring);
    assert_eq!(measuring.dirty_rate, None);
    assert!(measuring.start_time > 1_500_000_000, "{measuring:?}");
    for mode in ["dirty-bitmap", "page-sampling"] {
        let words = vm.refuse("calc-dirty-rate", long(mode));
        assert!(words.contains("is being measured already"), "{words}");
    }
    // It does not keep the process from ending.
    let start = Instant::now();
    assert!(vm.quit().success());
    assert!(start.elapsed() < Duration::from_secs(10));

    let waiting = ["--memory", "128M", "--incoming", "tcp:127.0.0.1:0"];
    let mut waiting = Vm::start(&lab, &waiting);
    for mode in ["dirty-bitmap", "page-sampling"] {
        let words = waiting.refuse("calc-dirty-rate", long(mode));
        assert!(words.contains("the guest has not arrived yet"), "{words}");
    }
}

/// A migration is never refused for the sake of a measurement.
#[test]
fn a_migration_ends_a_measurement_that_has_the_log() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    for mode in ["dirty-bitmap", "page-sampling"] {
        let options = ["--mode", mode, "--time", "60s"];
        let socket = guest.vm.socket.clone();
        let command = on_vm("dirty-rate", &socket, &options);
        eventually("the measurement to begin", || {
            let status = info(&mut guest.vm).status;
            (status == DirtyRateStatus::Measuring).then_some(())
        });
        // Time for the log to be in use.
        std::thread::sleep(Duration::from_millis(200));
        let mut destination = guest.tcp_destination();
        let moved = guest.vm.migrate(&destination.uri());
        assert_eq!(moved.status, Some(MigrationStatus::Completed));
        destination.wait_for_state(RunState::Running);
        let left = info(&mut guest.vm).status;
        if mode == "dirty-bitmap" {
            assert_eq!(left, DirtyRateStatus::Unstarted);
            let words = command.finish_within(PATIENCE).failed();
            assert!(
                words.contains("a migration of the guest has begun"),
                "{words}"
            );
        } else {
            assert_eq!(left, DirtyRateStatus::Measuring);
        }
        guest.moved_to(destination);
        guest.verifies_all();
    }
}

#[test]
fn during_a_migration() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let (_destination, _) = guest.begin_slow_migration();
    let words = guest.vm.refuse("calc-dirty-rate", long("dirty-bitmap"));
    assert!(
        words.contains("cannot be used during a migration") && words.contains("page-sampling"),
        "{words}"
    );
    let sampled = measure(&guest.vm, &["--sample-pages", "16384"]).succeeded();
    assert!(
        sampled.contains("measured by page-sampling over 1s"),
        "{sampled}"
    );
    assert_eq!(guest.vm.info().status, Some(MigrationStatus::Active));

    // When it is over, the log is free again.
    guest.vm.execute("migrate_cancel", Value::Null);
    guest.vm.wait_for_status(MigrationStatus::Cancelled);
    measure(&guest.vm, &["--mode", "dirty-bitmap", "--time", "100ms"]).succeeded();
    guest.vm.set_parameters(json!({"max-bandwidth": 0}));
    guest.hop();
    guest.verifies_all();
}

/// Migrations that begin at any moment of a measurement, and measurements at any moment of a migration.
#[test]
fn at_the_same_time() {
    let Some(lab) = Lab::new() else { return };
    let mut random = Random::new("a measurement and a migration at the same time");
    let mut guest = Guest::boot(&lab, Shape::small());
    for _ in 0..6 {
        let mut destination = guest.tcp_destination();
        let uri = destination.uri();
        let socket = guest.vm.socket.clone();
        let options = ["--mode", "dirty-bitmap", "--time", "50ms"];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Each ends in one of its ways, until the source is gone or stands still.
                for _ in 0..5 {
                    on_vm("dirty-rate", &socket, &options).finish_within(PATIENCE);
                }
            });
            std::thread::sleep(random.up_to(Duration::from_millis(200)));
            guest.vm.migrate(&uri);
        });
        destination.wait_for_state(RunState::Running);
        guest.moved_to(destination);
        guest.works();
    }
    guest.verifies_all();
}
