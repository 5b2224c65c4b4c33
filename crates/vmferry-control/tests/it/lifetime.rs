//! How a server begins and ends.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use serde_json::json;
use vmferry_control::{Problem, QmpServer};

use crate::fake::{PATIENCE, Rig};

#[test]
fn a_quit_is_answered_before_the_server_ends() {
    let mut rig = Rig::new();
    let mut client = rig.negotiated();
    client.send(r#"{"execute": "quit", "id": 7}"#);
    rig.quit.recv_timeout(PATIENCE).unwrap();
    drop(rig.server.take());
    assert_eq!(client.read()["event"], "SHUTDOWN");
    assert_eq!(client.read(), json!({"return": {}, "id": 7}));
    assert!(client.ends());
    assert!(!rig.path.exists());
}

#[test]
fn an_idle_server_ends_at_once() {
    let mut rig = Rig::new();
    let mut clients: Vec<_> = (0..5).map(|_| rig.negotiated()).collect();
    let began = Instant::now();
    drop(rig.server.take());
    assert!(
        began.elapsed() < Duration::from_millis(900),
        "{:?}",
        began.elapsed()
    );
    assert!(clients.iter_mut().all(|client| client.ends()));
}

#[test]
fn a_handler_that_hangs_does_not_hold_the_server_for_ever() {
    let mut rig = Rig::with_slow_reset(Duration::from_secs(5));
    let mut client = rig.negotiated();
    client.send(r#"{"execute": "system_reset"}"#);
    std::thread::sleep(Duration::from_millis(100));
    let began = Instant::now();
    drop(rig.server.take());
    // Before the handler has come back.
    assert!(client.ends());
    assert!(
        began.elapsed() < Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_live_socket_is_left_alone_and_a_stale_one_replaced() {
    let mut rig = Rig::new();
    let again = || QmpServer::bind(&rig.path, rig.machine.clone(), rig.events.clone());
    let error = again().unwrap_err();
    assert!(matches!(error.problem, Problem::InUse), "{error}");
    assert!(
        error.to_string().contains("another process listens on it"),
        "{error}"
    );
    rig.negotiated();
    drop(rig.server.take());

    drop(UnixListener::bind(&rig.path).unwrap());
    assert!(rig.path.exists());
    rig.server = Some(QmpServer::bind(&rig.path, rig.machine.clone(), rig.events.clone()).unwrap());
    rig.negotiated();
}

/// A monitor can run commands: it is its owner's alone, whatever the umask lets others do.
#[test]
fn only_its_owner_can_connect() {
    use std::os::unix::fs::PermissionsExt;
    let rig = Rig::new();
    let mode = rig.path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let mut rig = Rig::new();
    drop(rig.server.take());
    std::fs::write(&rig.path, "precious").unwrap();
    let error = QmpServer::bind(&rig.path, rig.machine.clone(), rig.events.clone()).unwrap_err();
    assert!(matches!(error.problem, Problem::NotASocket), "{error}");
    assert_eq!(std::fs::read_to_string(&rig.path).unwrap(), "precious");
}

#[test]
fn somebody_elses_socket_is_not_removed() {
    let mut rig = Rig::new();
    std::fs::remove_file(&rig.path).unwrap();
    let _other = UnixListener::bind(&rig.path).unwrap();
    drop(rig.server.take());
    assert!(rig.path.exists());
}

#[test]
fn a_path_that_is_too_long_is_named() {
    let rig = Rig::new();
    let path = rig.path.with_file_name("x".repeat(108));
    let error = QmpServer::bind(&path, rig.machine.clone(), rig.events.clone()).unwrap_err();
    assert!(
        matches!(error.problem, Problem::PathTooLong(length) if length > 107),
        "{error}"
    );
    let nowhere = QmpServer::bind("/nonexistent/qmp", rig.machine.clone(), rig.events.clone());
    let error = nowhere.unwrap_err().to_string();
    assert!(
        error.starts_with("cannot listen on the socket /nonexistent/qmp: "),
        "{error}"
    );
}
