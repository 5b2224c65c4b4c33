//! The downtime limit holds on slow links, and a pause has an end.

use std::time::Duration;

use vmferry_engine::{MigrationError, Parameters, Status};

use crate::common::{
    Pace, SlowLink, Watched, any_port, listen, move_on, parameters, running_guest, send, wait_until,
};
use crate::toy::PAGES;

/// Bytes a second on the way to the destination.
const LINK: u64 = 10 << 20;

/// The guest, which writes to all of its memory all the time, does not fit through the link within the default limit of
/// 300 ms. The source knows, whatever bandwidth it may use.
fn the_limit_holds(max_bandwidth: Option<u64>, pace: Pace) {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let link = SlowLink::to(incoming.uri(), LINK, pace);
    let mut limited = Parameters {
        max_bandwidth,
        ..parameters()
    };
    let outgoing = send(&here, &link.uri(), limited);
    let all = (PAGES * 4096) as f64 / LINK as f64;
    for passes in [2, 3] {
        wait_until("another pass", || {
            let info = outgoing.info();
            info.status.is_final() || info.ram.dirty_sync_count >= passes
        });
        let info = outgoing.info();
        assert_eq!(info.status, Status::Active, "{info:?}");
        assert!(here.is_running());
        let expected = info.expected_downtime.unwrap().as_secs_f64();
        assert!(
            (all / 2.0..all * 3.0).contains(&expected),
            "{expected} s expected; sending all of RAM takes {all} s"
        );
    }
    limited.downtime_limit = Duration::from_secs(4);
    outgoing.set_parameters(limited);
    wait_until("the end", || outgoing.info().status.is_final());
    let downtime = outgoing.info().downtime;
    outgoing.wait().unwrap();
    incoming.wait().unwrap();
    assert!(downtime.unwrap() < limited.downtime_limit, "{downtime:?}");
    there.stop_and_verify();
}

#[test]
fn without_a_bandwidth_limit() {
    the_limit_holds(None, Pace::Steady);
}

#[test]
fn on_a_link_that_is_faster_than_the_bandwidth_limit() {
    the_limit_holds(Some(LINK / 10 * 8), Pace::Steady);
}

#[test]
fn on_a_link_that_is_as_fast() {
    the_limit_holds(Some(LINK), Pace::Steady);
}

#[test]
fn on_a_link_that_is_slower() {
    the_limit_holds(Some(LINK * 4), Pace::Steady);
}

#[test]
fn with_jitter() {
    the_limit_holds(Some(LINK / 10 * 8), Pace::Jittery);
}

/// The destination becomes slow when the guest has just been paused.
#[test]
fn a_guest_that_stands_still_for_too_long_is_taken_back() {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let link = SlowLink::to(incoming.uri(), 1 << 30, Pace::Steady);
    let pausing = Parameters {
        pause_before_switchover: true,
        ..parameters()
    };
    let outgoing = send(&here, &link.uri(), pausing);
    wait_until("pre-switchover", || {
        outgoing.info().status == Status::PreSwitchover
    });
    link.set_rate(20 << 10);
    // The time in which the user is waited for does not count.
    std::thread::sleep(pausing.pause_bound() + Duration::from_millis(200));
    assert_eq!(outgoing.info().status, Status::PreSwitchover);
    outgoing.proceed().unwrap();
    let error = outgoing.wait().unwrap_err();
    assert!(
        matches!(error, MigrationError::PauseTooLong { .. }),
        "{error}"
    );
    here.run_some();
    // What is under way gets there sooner.
    link.set_rate(1 << 30);
    assert!(incoming.wait().is_err());
    assert!(!there.is_running());
    move_on(&here, parameters()).stop_and_verify();
}
