//! Cancelling, in every state: the guest is as it was, and its next migration finds it whole.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_dirty::Discipline;
use vmferry_engine::{MigrationError, Parameters, Source, Status, SteerError, Uri};

use crate::common::{
    Effect, FullBacklog, Proxy, Random, Recorder, Watched, Way, When, any_port, impatient, listen,
    move_on, parameters, running_guest, send, wait_until,
};

/// Time enough to come to a cancelled end, on a busy machine.
const SOON: Duration = Duration::from_secs(15);

fn record(guest: &Arc<Watched>, uri: &Uri, parameters: Parameters) -> (Source, Recorder) {
    let recorder = Recorder::default();
    let observer = Box::new(recorder.clone());
    let source = Source::start(guest.clone(), uri.clone(), parameters, observer).unwrap();
    (source, recorder)
}

/// Cancels, and checks that this is how it ends.
fn cancel(outgoing: Source, recorder: &Recorder) {
    let start = Instant::now();
    outgoing.cancel().unwrap();
    let end = outgoing.wait();
    assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
    assert!(matches!(end, Err(MigrationError::Cancelled)), "{end:?}");
    recorder.check();
    let seen = recorder.seen();
    assert!(
        seen.ends_with(&[Status::Cancelling, Status::Cancelled]),
        "{seen:?}"
    );
}

#[test]
fn while_connecting() {
    let dir = tempfile::tempdir().unwrap();
    let full = [FullBacklog::tcp(), FullBacklog::unix(dir.path())];
    for uri in full.each_ref().map(|full| full.uri.parse().unwrap()) {
        let guest = running_guest();
        let (outgoing, recorder) = record(&guest, &uri, parameters());
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(outgoing.info().status, Status::Setup, "{uri}");
        cancel(outgoing, &recorder);
        guest.run_some();
    }
}

#[test]
fn connecting_has_a_time_limit() {
    let dir = tempfile::tempdir().unwrap();
    let full = [FullBacklog::tcp(), FullBacklog::unix(dir.path())];
    for uri in full.each_ref().map(|full| full.uri.parse().unwrap()) {
        let guest = running_guest();
        let start = Instant::now();
        let error = send(&guest, &uri, impatient()).wait().unwrap_err();
        assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
        let wanted = format!("cannot connect to {uri}");
        assert!(error.to_string().starts_with(&wanted), "{error}");
    }
}

#[test]
fn before_the_switch_over() {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let pausing = Parameters {
        pause_before_switchover: true,
        ..parameters()
    };
    let (outgoing, recorder) = record(&here, incoming.uri(), pausing);
    wait_until("pre-switchover", || {
        outgoing.info().status == Status::PreSwitchover
    });
    assert!(!here.is_running());
    cancel(outgoing, &recorder);
    assert!(incoming.wait().is_err());
    here.run_some();
    move_on(&here, parameters()).stop_and_verify();
}

#[test]
fn while_the_devices_are_on_their_way() {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let loaded_is_lost = Proxy::to(incoming.uri())
        .fault(When::BEFORE_LOADED, Effect::Silence(Way::Back))
        .start();
    let uri = loaded_is_lost.uri.parse().unwrap();
    let (outgoing, recorder) = record(&here, &uri, parameters());
    wait_until("device", || outgoing.info().status == Status::Device);
    assert!(!here.is_running());
    cancel(outgoing, &recorder);
    assert!(incoming.wait().is_err());
    here.run_some();
    move_on(&here, parameters()).stop_and_verify();
}

#[test]
fn too_late() {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let shut_is_lost = Proxy::to(incoming.uri())
        .fault(When::BEHIND_LOADED, Effect::Silence(Way::Back))
        .start();
    let uri = shut_is_lost.uri.parse().unwrap();
    let (outgoing, recorder) = record(&here, &uri, impatient());
    wait_until("the guest runs there", || there.is_running());
    assert_eq!(outgoing.cancel(), Err(SteerError::TooLate));
    let end = outgoing.wait();
    assert!(
        matches!(end, Err(MigrationError::Undecided { .. })),
        "{end:?}"
    );
    recorder.check();
    incoming.wait().unwrap();
    assert!(!here.is_running());
    there.stop_and_verify();
}

#[test]
fn at_any_moment() {
    let mut random = Random::new("at_any_moment");
    let mut here = running_guest();
    let (mut cancelled, mut moved) = (0, 0);
    // Twice what a whole migration takes just now.
    let start = Instant::now();
    here = move_on(&here, parameters());
    let longest = (2 * start.elapsed()).min(Duration::from_secs(2));
    while cancelled < 100 || moved < 5 {
        let runs = random.below(4) > 0;
        match runs {
            true if !here.is_running() => here.run(),
            false => drop(here.stop_and_verify()),
            true => {}
        }
        let there = Watched::new(here.runners());
        let incoming = listen(&there, &any_port());
        let parameters = Parameters {
            discipline: Discipline::ALL[random.below(3) as usize],
            pause_before_switchover: random.below(4) == 0,
            ..parameters()
        };
        let (outgoing, recorder) = record(&here, incoming.uri(), parameters);
        let moment = random.up_to(longest);
        std::thread::sleep(moment);
        match outgoing.cancel() {
            Ok(()) => {
                let end = outgoing.wait();
                assert!(matches!(end, Err(MigrationError::Cancelled)), "{end:?}");
                assert!(incoming.wait().is_err());
                assert_eq!(here.is_running(), runs, "cancelled after {moment:?}");
                assert!(!there.is_running());
                cancelled += 1;
            }
            Err(error) => {
                assert_eq!(error, SteerError::TooLate);
                outgoing.wait().unwrap();
                incoming.wait().unwrap();
                assert_eq!(there.is_running(), runs);
                here.assert_one_runner();
                here = there;
                moved += 1;
            }
        }
        recorder.check();
    }
    println!("{cancelled} cancelled, {moved} moved");
    if !here.is_running() {
        here.run();
    }
    move_on(&here, parameters()).stop_and_verify();
}
