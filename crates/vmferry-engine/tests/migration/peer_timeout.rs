//! A peer that is there but does nothing: the migration fails within the time that its user set.

use std::io::Read;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use vmferry_dirty::Discipline;
use vmferry_engine::{MigrationError, Parameters, Uri};

use crate::common::{PEER_TIMEOUT, impatient, move_on, parameters, running_guest, send};

/// A busy machine may take this much longer.
const SLACK: Duration = Duration::from_secs(15);

/// A destination that takes `taken` bytes and then stops reading, for as long as the returned listener's
/// thread is not told otherwise.
fn stops_reading(taken: usize) -> (Uri, std::sync::mpsc::Sender<()>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (end, wait_for_end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.read_exact(&mut vec![0; taken]).unwrap();
        let _ = wait_for_end.recv();
    });
    (format!("tcp:127.0.0.1:{port}").parse().unwrap(), end)
}

fn fails_in_time(taken: usize, impatient: Parameters) {
    let guest = running_guest();
    let (uri, _end) = stops_reading(taken);
    let start = Instant::now();
    let error = send(&guest, &uri, impatient).wait().unwrap_err();
    let took = start.elapsed();
    let sentence = error.to_string();
    assert!(
        matches!(error, MigrationError::PeerTimeout { .. }),
        "{sentence}"
    );
    assert!(sentence.contains("x-vmferry-peer-timeout"), "{sentence}");
    assert!(
        (PEER_TIMEOUT..PEER_TIMEOUT + SLACK).contains(&took),
        "{took:?}"
    );
    guest.run_some();
    move_on(&guest, parameters()).stop_and_verify();
}

#[test]
fn a_peer_that_stops_reading_while_the_guest_runs() {
    for discipline in Discipline::ALL {
        let never_switch_over = Parameters {
            discipline,
            downtime_limit: Duration::ZERO,
            ..impatient()
        };
        fails_in_time(0, never_switch_over);
        fails_in_time(3 << 20, never_switch_over);
    }
}

#[test]
fn a_peer_that_stops_reading_at_some_point_of_the_switch_over() {
    for discipline in Discipline::ALL {
        // The first pass is taken; how much of the second finds room in the sockets does not matter.
        let impatient = Parameters {
            discipline,
            ..impatient()
        };
        fails_in_time(8 << 20, impatient);
    }
}
