//! The guest's clock goes on over a migration as the host's does.

use std::time::{Duration, Instant};

use vmferry_control::schema::RunState;

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::{eventually, say};

/// Seconds of the guest that are looked at; the one that was seen soonest counts.
const LOOKS: usize = 4;

/// What a busy host adds to the time between a second's beginning in the guest and its being seen here, at best.
const SEEING_MS: i64 = 500;

/// How far the guest's clock is behind the host's since `start`, in milliseconds.
fn behind_ms(guest: &Guest<'_>, start: Instant) -> i64 {
    let now = || guest.story().last(0).map_or(0, |beat| beat.t);
    let look = |_| {
        let before = now();
        let t = eventually("the next second", || {
            let t = now();
            (t > before).then_some(t)
        });
        start.elapsed().as_millis() as i64 - t as i64 * 1000
    };
    (0..LOOKS).map(look).min().expect("there are some")
}

#[test]
fn over_migrations() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let start = Instant::now();
    let before = behind_ms(&guest, start);
    let mut downtime = 0;
    for _ in 0..5 {
        downtime += guest.hop().downtime.expect("it is known at the end") as i64;
        guest.works();
    }
    let lag = behind_ms(&guest, start) - before;
    assert!(
        -SEEING_MS < lag && lag < downtime + SEEING_MS,
        "{lag} ms behind after {downtime} ms of downtime"
    );
}

/// A snapshot's guest did not live meanwhile: its clock goes on where it was.
#[test]
fn over_a_snapshot() {
    let Some(lab) = Lab::new() else { return };
    // KVM/PVM has no hardware that would shift the counter: its guests read the host's own.
    if std::path::Path::new("/sys/module/kvm_pvm").exists() {
        say("SKIPPED: clock::over_a_snapshot: KVM/PVM cannot shift a guest's time-stamp counter");
        return;
    }
    let mut guest = Guest::boot(&lab, Shape::small());
    let file = lab.uri("file", "snapshot");
    let start = Instant::now();
    let before = behind_ms(&guest, start);
    guest.vm.migrate_command(&file, &[]).succeeded();
    guest.vm.ends();
    let stopped = Instant::now();
    std::thread::sleep(Duration::from_secs(5));

    let mut resumed = guest.destination(&file);
    resumed.wait_for_state(RunState::Running);
    let away = stopped.elapsed().as_millis() as i64;
    guest.moved_to(resumed);
    guest.works();
    let lag = behind_ms(&guest, start) - before;
    // The time between the last look and the end of the source process is not known better than this.
    assert!(
        away - SEEING_MS < lag && lag < away + 2 * SEEING_MS,
        "{lag} ms behind after {away} ms in a file"
    );
    guest.story().check_continuity(0, 4_000_000);
    guest.verifies_all();
}
