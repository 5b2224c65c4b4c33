//! Every wait has a name, as long as it lasts.

use vmferry_engine::{Parameters, Source, Status, Uri, Wait};

use crate::common::{
    FullBacklog, Watched, any_port, impatient, listen, parameters, running_guest, send, wait_until,
};

fn waits_for(outgoing: &Source, wait: Wait) {
    wait_until(wait.as_str(), || {
        outgoing.info().waiting.is_some_and(|now| now.wait == wait)
    });
}

#[test]
fn for_a_destination_that_does_not_accept() {
    let here = running_guest();
    let full = FullBacklog::tcp();
    let outgoing = send(&here, &full.uri.parse().unwrap(), parameters());
    waits_for(&outgoing, Wait::Connection);
    outgoing.cancel().unwrap();
    wait_until("the end", || outgoing.info().status.is_final());
    assert_eq!(outgoing.info().waiting, None);
}

#[test]
fn for_a_source_and_then_for_its_stream() {
    let there = Watched::new(running_guest().runners());
    let incoming = listen(&there, &any_port());
    let now = || incoming.info().waiting.map(|waiting| waiting.wait);
    wait_until("the wait for a source", || now() == Some(Wait::Source));
    let Uri::Tcp { port, .. } = *incoming.uri() else {
        unreachable!("it listens on TCP");
    };
    let _silent = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    wait_until("the wait for the stream", || now() == Some(Wait::Stream));
}

#[test]
fn for_a_destination_that_stops_reading() {
    let here = running_guest();
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let outgoing = send(&here, &uri.parse().unwrap(), impatient());
    // What it has sent may fit into the sockets, or not.
    wait_until("the wait for the destination", || {
        let now = outgoing.info().waiting.map(|waiting| waiting.wait);
        matches!(now, Some(Wait::Transmission | Wait::Receipt))
    });
    assert!(outgoing.wait().is_err());
}

#[test]
fn for_the_bandwidth_limit_and_for_the_user() {
    let here = running_guest();
    let there = Watched::new(here.runners());
    let incoming = listen(&there, &any_port());
    let slow = Parameters {
        max_bandwidth: Some(1),
        pause_before_switchover: true,
        ..parameters()
    };
    let outgoing = send(&here, incoming.uri(), slow);
    waits_for(&outgoing, Wait::BandwidthLimit);
    let since = outgoing.info().waiting.unwrap().since;
    outgoing.set_parameters(Parameters {
        max_bandwidth: None,
        ..slow
    });
    waits_for(&outgoing, Wait::Continue);
    assert!(outgoing.info().waiting.unwrap().since > since);
    outgoing.proceed().unwrap();
    outgoing.wait().unwrap();
    incoming.wait().unwrap();
    there.stop_and_verify();
}

#[test]
fn for_a_command() {
    let here = running_guest();
    let uri: Uri = "exec:cat > /dev/null; exec sleep 60".parse().unwrap();
    let outgoing = send(&here, &uri, parameters());
    waits_for(&outgoing, Wait::Command);
    assert_eq!(outgoing.info().status, Status::Device);
    outgoing.cancel().unwrap();
    assert!(outgoing.wait().is_err());
}
