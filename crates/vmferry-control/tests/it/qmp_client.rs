//! The client against the server.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_control::schema::{Event, MigrationStatus, RunState, VersionInfo};
use vmferry_control::{ClientError, ErrorClass, QmpClient};

use crate::fake::{PATIENCE, Rig};

#[test]
fn commands_queries_and_events() {
    let rig = Rig::new();
    let mut client = QmpClient::connect(&rig.path, PATIENCE).unwrap();
    assert_eq!(*client.version(), VersionInfo::current());
    assert_eq!(client.query_status().unwrap().status, RunState::Prelaunch);
    assert_eq!(client.query_migrate().unwrap().status, None);
    client.execute("cont", Value::Null).unwrap();
    client
        .execute("migrate", json!({"uri": "unix:/nowhere"}))
        .unwrap();
    let info = client.query_migrate().unwrap();
    assert_eq!(info.status, Some(MigrationStatus::Active));
    assert_eq!(info.ram.unwrap().mbps, 12.5);

    let names: Vec<String> = std::iter::from_fn(|| client.next_event(Duration::ZERO).unwrap())
        .map(|event| event.event)
        .collect();
    assert_eq!(
        names,
        ["RESUME", "MIGRATION", "MIGRATION", "MIGRATION_PASS"]
    );
    let began = Instant::now();
    assert_eq!(client.next_event(Duration::from_millis(50)).unwrap(), None);
    assert!(began.elapsed() >= Duration::from_millis(50));
    rig.events.emit(Event::Stop);
    let event = client.next_event(PATIENCE).unwrap().unwrap();
    assert_eq!(event.known(), Some(Event::Stop));
}

#[test]
fn the_vms_errors_come_through() {
    let rig = Rig::new();
    let mut client = QmpClient::connect(&rig.path, PATIENCE).unwrap();
    let error = client.execute("no-such", Value::Null).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("no-such failed on the VM at "), "{text}");
    assert!(text.contains(rig.path.to_str().unwrap()), "{text}");
    let ClientError::Command { error, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(error.class, ErrorClass::CommandNotFound);
}

#[test]
fn a_vm_that_is_not_there_is_explained() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let text = QmpClient::connect(&path, PATIENCE).unwrap_err().to_string();
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(
        text.contains("is the VM running, and is this its --qmp socket?"),
        "{text}"
    );
    let long = directory.path().join("x".repeat(200));
    let text = QmpClient::connect(long, PATIENCE).unwrap_err().to_string();
    assert!(text.contains("use a shorter path"), "{text}");
}

#[test]
fn a_vm_that_is_stuck_is_given_up_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let _stuck = UnixListener::bind(&path).unwrap();
    let began = Instant::now();
    let error = QmpClient::connect(&path, Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_commands() {
    let rig = Rig::with_slow_reset(Duration::from_secs(3));
    let mut client = QmpClient::connect(&rig.path, Duration::from_secs(2)).unwrap();
    let error = client.execute("system_reset", Value::Null).unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    assert!(error.to_string().contains("system_reset"), "{error}");
    assert_eq!(client.query_status().unwrap().status, RunState::Prelaunch);
}

#[test]
fn a_vm_that_ends_is_noticed() {
    let mut rig = Rig::new();
    let mut client = QmpClient::connect(&rig.path, PATIENCE).unwrap();
    drop(rig.server.take());
    let error = client.query_status().unwrap_err();
    assert!(matches!(error, ClientError::Closed { .. }), "{error}");
    let error = client.next_event(PATIENCE).unwrap_err();
    assert!(matches!(error, ClientError::Closed { .. }), "{error}");
}

#[test]
fn something_else_on_the_socket_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut stream, b"SSH-2.0-Other\r\n").unwrap();
    });
    let error = QmpClient::connect(&path, PATIENCE).unwrap_err();
    assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
    other.join().unwrap();
}
