//! Several clients at once.

use std::time::Instant;

use serde_json::json;
use vmferry_control::schema::{Event, MigrationData, MigrationPassData, MigrationStatus};

use crate::fake::{PATIENCE, Rig};

#[test]
fn every_client_that_has_negotiated_gets_every_event() {
    let rig = Rig::new();
    let mut clients: Vec<_> = (0..5).map(|_| rig.negotiated()).collect();
    let mut silent = rig.connect();
    assert!(silent.read().get("QMP").is_some());
    let refusal = silent.ask(r#"{"execute": "query-status"}"#);
    assert_eq!(refusal["error"]["class"], "CommandNotFound");
    // A reply on each says that it has been subscribed.
    for client in &mut clients {
        client.ask(r#"{"execute": "query-status"}"#);
    }
    rig.events.emit(Event::Stop);
    rig.events.emit(Event::Migration(MigrationData {
        status: MigrationStatus::PreSwitchover,
    }));
    clients[0].ask(r#"{"execute": "cont"}"#);
    clients[1].ask(r#"{"execute": "system_reset"}"#);
    for client in &mut clients[2..] {
        let first = client.read();
        assert_eq!(first["event"], "STOP");
        assert_eq!(first.get("data"), None);
        assert!(first["timestamp"]["seconds"].as_i64().unwrap() > 1_700_000_000);
        assert!(first["timestamp"]["microseconds"].is_u64());
        let second = client.read();
        assert_eq!(second["event"], "MIGRATION");
        assert_eq!(second["data"], json!({"status": "pre-switchover"}));
        assert_eq!(client.read()["event"], "RESUME");
        let reset = client.read();
        assert_eq!(reset["event"], "RESET");
        assert_eq!(
            reset["data"],
            json!({"guest": false, "reason": "host-qmp-system-reset"})
        );
    }
    silent.send(r#"{"execute": "qmp_capabilities"}"#);
    assert_eq!(silent.read(), json!({"return": {}}));
}

#[test]
fn the_event_of_a_command_comes_before_its_reply() {
    let rig = Rig::new();
    let mut client = rig.negotiated();
    client.send(r#"{"execute": "stop"}"#);
    assert_eq!(client.read()["event"], "STOP");
    assert_eq!(client.read(), json!({"return": {}}));
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_harms_nobody() {
    let rig = Rig::new();
    let mut deaf = rig.negotiated();
    let mut good = rig.negotiated();
    good.ask(r#"{"execute": "query-status"}"#);
    let began = Instant::now();
    let mut pass = 0;
    for _ in 0..50 {
        for _ in 0..500 {
            pass += 1;
            rig.events
                .emit(Event::MigrationPass(MigrationPassData { pass }));
        }
        for expected in pass - 499..=pass {
            assert_eq!(good.read()["data"]["pass"], expected);
        }
    }
    assert!(began.elapsed() < PATIENCE);
    assert!(deaf.ends());
    assert!(
        good.ask(r#"{"execute": "query-status"}"#)
            .get("return")
            .is_some()
    );
}

#[test]
fn a_client_that_asks_without_listening_only_stops_itself() {
    let rig = Rig::new();
    let mut greedy = rig.negotiated();
    greedy.stream.set_nonblocking(true).unwrap();
    let request = br#"{"execute": "query-migrate-parameters"}"#;
    let mut sent = 0_usize;
    let began = Instant::now();
    // Until the socket has been full for a while.
    let mut full_since = None;
    while full_since.is_none_or(|since: Instant| since.elapsed().as_millis() < 200) {
        assert!(
            began.elapsed() < PATIENCE,
            "the server never stopped reading"
        );
        match std::io::Write::write(&mut greedy.stream, request) {
            Ok(length) => {
                sent += length;
                full_since = None;
            }
            Err(_) => {
                full_since.get_or_insert_with(Instant::now);
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }
    assert!(sent > 0);
    let mut good = rig.negotiated();
    assert!(
        good.ask(r#"{"execute": "query-status"}"#)
            .get("return")
            .is_some()
    );
}

#[test]
fn a_handler_that_panics_costs_one_connection() {
    let rig = Rig::new();
    let mut unlucky = rig.negotiated();
    let mut other = rig.negotiated();
    unlucky.send(r#"{"execute": "migrate-continue", "arguments": {"state": "wait-unplug"}}"#);
    assert!(unlucky.ends());
    let status = other.ask(r#"{"execute": "query-status"}"#);
    assert!(status.get("return").is_some());
}

#[test]
fn clients_that_forget_to_hang_up_keep_nobody_out() {
    let rig = Rig::new();
    let mut lasting: Vec<_> = (0..32).map(|_| rig.negotiated()).collect();
    let mut passing: Vec<_> = (0..4).map(|_| rig.negotiated()).collect();
    // The first of them is not the one that has been silent for longest.
    passing[0].ask(r#"{"execute": "query-status"}"#);
    for _ in 0..3 {
        let mut next = rig.negotiated();
        assert!(passing.remove(1).ends());
        next.ask(r#"{"execute": "query-status"}"#);
        passing.push(next);
    }
    // Those who came in time are not disturbed.
    rig.events.emit(Event::Stop);
    for client in lasting.iter_mut().chain(&mut passing) {
        assert_eq!(client.read()["event"], "STOP");
    }
    // Who hangs up makes room.
    drop(lasting.pop());
    let began = Instant::now();
    loop {
        let mut kept = rig.negotiated();
        let _others: Vec<_> = (0..5).map(|_| rig.negotiated()).collect();
        rig.events.emit(Event::Stop);
        if kept.line().unwrap().is_some() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "the place was never freed");
    }
}
