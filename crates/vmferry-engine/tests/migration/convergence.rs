//! How fast, and when: the bandwidth limit, the downtime limit, and the switch-over they lead to.

use std::time::{Duration, Instant};

use vmferry_engine::{Parameters, Source, Status};

use crate::common::{
    Watched, any_port, impatient, listen, move_on, parameters, running_guest, send, wait_until,
};
use crate::toy::PAGES;

/// No transfer of a page is as short as this, so a guest that writes never fits in. The guest is slow to
/// write when the machine is busy: with one of these limits, no pass is over before it has.
const NEVER: Duration = Duration::from_nanos(1);
const SLOW: u64 = 20 << 20;

/// Bytes a second that `outgoing` sends, measured over `time`.
fn rate_over(outgoing: &Source, time: Duration) -> f64 {
    let (start, before) = (Instant::now(), outgoing.info().ram.transferred);
    std::thread::sleep(time);
    let sent = outgoing.info().ram.transferred - before;
    sent as f64 / start.elapsed().as_secs_f64()
}

/// The limit is never exceeded, and it is reached whenever the machine has time for us.
fn assert_kept(outgoing: &Source, limit: u64) {
    // The limiter's own windows are a tenth of a second: begin behind what the limit before left over.
    std::thread::sleep(Duration::from_millis(300));
    let ratios: Vec<_> = (0..5)
        .map(|_| rate_over(outgoing, Duration::from_secs(1)) / limit as f64)
        .collect();
    assert!(
        ratios.iter().all(|&r| r < 1.15),
        "{ratios:.3?} of the limit"
    );
    assert!(
        ratios.iter().any(|&r| r > 0.85),
        "{ratios:.3?} of the limit"
    );
}

#[test]
fn the_bandwidth_limit_is_kept_and_can_be_changed() {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let mut limited = Parameters {
        downtime_limit: NEVER,
        max_bandwidth: Some(SLOW),
        ..parameters()
    };
    let outgoing = send(&here, incoming.uri(), limited);
    for limit in [SLOW, 5 << 20, 30 << 20] {
        limited.max_bandwidth = Some(limit);
        outgoing.set_parameters(limited);
        assert_kept(&outgoing, limit);
    }
    // The limit is not for the switch-over, when the guest waits.
    limited.max_bandwidth = Some(1 << 20);
    limited.downtime_limit = Duration::from_secs(1);
    outgoing.set_parameters(limited);
    std::thread::sleep(Duration::from_millis(100));
    limited.max_bandwidth = Some(100 << 20);
    outgoing.set_parameters(limited);
    outgoing.wait().unwrap();
    incoming.wait().unwrap();
    there.stop_and_verify();
}

#[test]
fn the_switch_over_waits_for_a_downtime_limit_that_fits() {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let mut strict = Parameters {
        downtime_limit: NEVER,
        max_bandwidth: Some(SLOW),
        ..parameters()
    };
    let outgoing = send(&here, incoming.uri(), strict);
    wait_until("several passes", || {
        outgoing.info().ram.dirty_sync_count > 4
    });
    let info = outgoing.info();
    assert_eq!(info.status, Status::Active);
    assert!(here.is_running());
    assert!(info.ram.dirty_pages_rate > 0);
    // What it would take to send all pages again, at the speed that was measured.
    let all = (PAGES * 4096) as f64 / info.bandwidth as f64;
    let expected = info.expected_downtime.unwrap().as_secs_f64();
    assert!(
        (all / 20.0..all * 3.0).contains(&expected),
        "{expected} s expected; sending all of RAM takes {all} s"
    );
    strict.downtime_limit = Duration::from_millis(300);
    outgoing.set_parameters(strict);
    wait_until("the end", || outgoing.info().status.is_final());
    let info = outgoing.info();
    outgoing.wait().unwrap();
    incoming.wait().unwrap();
    let downtime = info.downtime.unwrap();
    // Three times the limit is room for a busy machine, not a promise.
    assert!(downtime < Duration::from_millis(900), "{downtime:?}");
    there.stop_and_verify();
}

#[test]
fn a_user_who_wants_to_say_go_is_waited_for() {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let pausing = Parameters {
        pause_before_switchover: true,
        ..impatient()
    };
    let outgoing = send(&here, incoming.uri(), pausing);
    wait_until("pre-switchover", || {
        outgoing.info().status == Status::PreSwitchover
    });
    // Longer than the peer's timeout: the peer is not to blame for this.
    std::thread::sleep(pausing.peer_timeout * 2);
    assert_eq!(outgoing.info().status, Status::PreSwitchover);
    assert!(!here.is_running() && !there.is_running());
    outgoing.proceed().unwrap();
    outgoing.wait().unwrap();
    incoming.wait().unwrap();
    there.stop_and_verify();
}

#[test]
fn a_paused_guest_arrives_paused() {
    let here = running_guest();
    let steps = here.stop_and_verify();
    let there = move_on(&here, parameters());
    assert!(!there.is_running());
    // Saving takes a step.
    assert_eq!(there.verify(), steps + 1);
    there.run();
    there.run_some();
    there.stop_and_verify();
}
