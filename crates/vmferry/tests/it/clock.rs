//! The guest's clock goes on over a migration as the host's does.

use std::time::{Duration, Instant};

use vmferry_control::schema::RunState;

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::{eventually, say};

/// A guest's clock and the host's at the same moment: when the guest has just begun a new second.
fn look(guest: &Guest<'_>) -> (Duration, Instant) {
    let now = || guest.story().last(0).map_or(0, |beat| beat.t);
    let before = now();
    let t = eventually("the next second", || {
        let t = now();
        (t > before).then_some(t)
    });
    (Duration::from_secs(t), Instant::now())
}

/// How far the guest's clock has fallen behind the host's since `start`; negative if it went ahead.
fn lag_ms(start: (Duration, Instant), now: (Duration, Instant)) -> i64 {
    let host = (now.1 - start.1).as_millis() as i64;
    let guest = (now.0 - start.0).as_millis() as i64;
    host - guest
}

/// What a busy host adds to the time between a second's beginning in the guest and its being seen here.
const SEEING_MS: i64 = 500;

#[test]
fn over_migrations() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let start = look(&guest);
    let mut downtime = 0;
    for _ in 0..5 {
        downtime += guest.hop().downtime.expect("it is known at the end") as i64;
        guest.works();
    }
    let lag = lag_ms(start, look(&guest));
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
    let start = look(&guest);
    guest.vm.migrate_command(&file, &[]).succeeded();
    guest.vm.ends();
    let stopped = Instant::now();
    std::thread::sleep(Duration::from_secs(5));

    let mut resumed = guest.destination(&file);
    resumed.wait_for_state(RunState::Running);
    let away = stopped.elapsed().as_millis() as i64;
    guest.moved_to(resumed);
    guest.works();
    let lag = lag_ms(start, look(&guest));
    // The time between the last look and the end of the source process is not known better than this.
    assert!(
        away - SEEING_MS < lag && lag < away + 2 * SEEING_MS,
        "{lag} ms behind after {away} ms in a file"
    );
    guest.story().check_continuity(0, 1_000_000);
    guest.verifies_all();
}
