//! The same requests to QEMU and to this server get the same answers. Skipped, loudly, where QEMU is not installed.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_control::QmpClient;

use crate::fake::{PATIENCE, Rig, Wire};

struct Qemu(Child);

impl Qemu {
    fn start(socket: &Path) -> Option<Self> {
        let qmp = format!("unix:{},server=on,wait=off", socket.display());
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "microvm",
                "-accel",
                "tcg",
                "-nodefaults",
                "-display",
                "none",
                "-S",
            ])
            .args(["-qmp", &qmp])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            // Around the test harness, which would keep it to itself.
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: qemu-system-x86_64 is not installed, so its wording is not compared"
            );
            return None;
        };
        let qemu = Qemu(child);
        let began = Instant::now();
        while !socket.exists() {
            assert!(began.elapsed() < PATIENCE, "QEMU did not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(qemu)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(name: &str, arguments: Value) -> String {
    json!({"execute": name, "arguments": arguments}).to_string()
}

fn channel(addr: Value) -> String {
    command(
        "migrate",
        json!({"channels": [{"channel-type": "main", "addr": addr}]}),
    )
}

fn capability(entry: Value) -> String {
    command("migrate-set-capabilities", json!({"capabilities": [entry]}))
}

fn requests() -> Vec<String> {
    let mut requests: Vec<String> = [
        // The envelope.
        r#"{"execute": "qmp_capabilities"}"#,
        r#"{"execute": "foo"}"#,
        r#"{"execute": "foo", "id": [1, {"a": null}]}"#,
        r#"{"execute": 5}"#,
        r#"{"exec": 5}"#,
        r#"{"arguments": {}}"#,
        r#"{"execute": "query-status", "arguments": 5, "id": "x"}"#,
        r#"{"execute": "query-status", "bar": 5}"#,
        r#"{"exec-oob": "query-status"}"#,
        "[]",
        "5",
        "\"a\"",
        "garbage",
        "nul",
        "}",
        r#"{'execute': 'query-status', 'id': 'it\'s "one"'}"#,
        r#"{"execute": "query-status", "id": 'it\'s', 'exec': {}}"#,
        r#"{"execute": "query-status", "id": "it\'s"}"#,
        "'a'",
        r#"{"execute": "query-status", "execute": "query-status"}"#,
        r#"{"execute": "query-status", "id": {"a": 1, 'a': 1}}"#,
        // Answers.
        r#"{"execute": "query-status"}"#,
        r#"{"execute": "query-name", "id": null}"#,
        r#"{"execute": "query-kvm", "id": 1.5}"#,
        r#"{"execute": "query-migrate"}"#,
        r#"{"execute": "migrate_cancel"}"#,
        r#"{"execute": "migrate-set-parameters"}"#,
        r#"{"execute": "query-dirty-rate"}"#,
        r#"{"execute": "query-balloon"}"#,
    ]
    .map(str::to_owned)
    .into();
    requests.extend([
        command("query-status", json!({"foo": 1})),
        command("cont", json!({"foo": 1})),
        command("migrate", json!({})),
        command("migrate", json!({"uri": 5})),
        command("migrate", json!({"uri": "tcp:a:1", "detach": 1})),
        command("migrate", json!({"uri": "tcp:a:1", "foo": 1})),
        command("migrate", json!({"uri": "unix:/nowhere", "resume": true})),
        command("migrate", json!({"channels": []})),
        command("migrate", json!({"channels": 5})),
        command("migrate", json!({"channels": [5]})),
        command("migrate", json!({"channels": [{"channel-type": "main"}]})),
        command(
            "migrate",
            json!({"channels": [{"channel-type": "x", "addr": {}}]}),
        ),
        channel(json!(5)),
        channel(json!({})),
        channel(json!({"transport": "foo"})),
        channel(json!({"transport": "socket"})),
        channel(json!({"transport": "socket", "type": "foo"})),
        channel(json!({"transport": "socket", "type": "inet", "host": "a"})),
        channel(json!({"transport": "socket", "type": "unix", "path": "/a", "x": 1})),
        channel(json!({"transport": "socket", "type": "unix", "path": 1})),
        channel(json!({"transport": "exec", "args": [5]})),
        channel(json!({"transport": "file", "filename": "/a"})),
        channel(json!({"transport": "file", "filename": "/a", "offset": "a"})),
        command("migrate-incoming", json!({"uri": "tcp:a:1"})),
        command("migrate-continue", json!({})),
        command("migrate-continue", json!({"state": "foo"})),
        command("migrate-continue", json!({"state": 5})),
        command("migrate-set-parameters", json!({"foo": 1})),
        command("migrate-set-parameters", json!({"downtime-limit": "a"})),
        command("migrate-set-parameters", json!({"downtime-limit": 1.5})),
        command(
            "migrate-set-parameters",
            json!({"downtime-limit": 2_000_001}),
        ),
        command("migrate-set-parameters", json!({"max-bandwidth": u64::MAX})),
        command(
            "migrate-set-parameters",
            json!({"announce-initial": 100_001}),
        ),
        command("migrate-set-parameters", json!({"announce-max": 100_001})),
        command("migrate-set-parameters", json!({"announce-rounds": 1001})),
        command("migrate-set-parameters", json!({"announce-step": 10_001})),
        command("announce-self", json!({})),
        capability(json!({"capability": "foo", "state": true})),
        capability(json!({"capability": "events", "state": 5})),
        capability(json!({"capability": "events"})),
        capability(json!({"state": true})),
        capability(json!({"capability": "events", "state": true, "x": 1})),
        capability(json!({"capability": "return-path", "state": true})),
        command("block_resize", json!({})),
        command("block_resize", json!({"device": "a", "size": "b"})),
        command("block_resize", json!({"size": 512, "foo": 1})),
        command("balloon", json!({"value": 1 << 20})),
        command("balloon", json!({})),
        command("balloon", json!({"value": "a"})),
        command("balloon", json!({"value": 1, "foo": 1})),
        command("calc-dirty-rate", json!({})),
        command("calc-dirty-rate", json!({"calc-time": 1.5})),
        command("calc-dirty-rate", json!({"calc-time": 1, "foo": 1})),
        command("calc-dirty-rate", json!({"calc-time": 1, "mode": "foo"})),
        command("calc-dirty-rate", json!({"calc-time": 1, "mode": 5})),
        command(
            "calc-dirty-rate",
            json!({"calc-time": 1, "calc-time-unit": "foo"}),
        ),
        command(
            "calc-dirty-rate",
            json!({"calc-time": 1, "sample-pages": "a"}),
        ),
        command("query-dirty-rate", json!({"calc-time-unit": "millisecond"})),
        command("query-dirty-rate", json!({"calc-time-unit": "foo"})),
        command("query-dirty-rate", json!({"foo": 1})),
    ]);
    requests
}

#[test]
fn answers_are_qemus() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qemu.sock");
    let Some(_qemu) = Qemu::start(&socket) else {
        return;
    };
    let rig = Rig::new();
    let mut theirs = Wire::connect(&socket);
    let mut ours = rig.connect();
    assert!(theirs.read().get("QMP").is_some());
    assert!(ours.read().get("QMP").is_some());
    let mut differences = Vec::new();
    let early = [
        r#"{"execute": "query-status", "id": 1}"#,
        r#"{"execute": "foo"}"#,
        r#"{"execute": "qmp_capabilities", "arguments": {"x": 1}}"#,
        r#"{"execute": "qmp_capabilities"}"#,
    ];
    for request in early.into_iter().map(str::to_owned).chain(requests()) {
        let mut expected = theirs.ask(&request);
        if let Some(Value::String(text)) = expected.pointer_mut("/error/desc") {
            // QEMU writes one parameter's name in another way than it is set by.
            *text = text.replace("downtime_limit", "downtime-limit");
        }
        let answer = ours.ask(&request);
        if answer != expected {
            differences.push(format!("{request}\n  QEMU {expected}\n  here {answer}"));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn the_client_drives_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qemu.sock");
    let Some(_qemu) = Qemu::start(&socket) else {
        return;
    };
    let mut client = QmpClient::connect(&socket, PATIENCE).unwrap();
    assert!(!client.query_status().unwrap().running);
    client.execute("query-qmp-schema", Value::Null).unwrap();
    client.execute("cont", Value::Null).unwrap();
    assert!(client.query_status().unwrap().running);
    let target = format!("file:{}", directory.path().join("state").display());
    client.execute("migrate", json!({"uri": target})).unwrap();
    let began = Instant::now();
    let info = loop {
        let info = client.query_migrate().unwrap();
        if format!("{:?}", info.status) == "Some(Completed)" {
            break info;
        }
        assert!(began.elapsed() < PATIENCE, "{info:?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(
        info.ram
            .is_some_and(|ram| ram.total > 0 && ram.page_size == 4096)
    );
    assert!(info.downtime.is_some());
    let first = client.next_event(PATIENCE).unwrap().unwrap();
    assert_eq!(first.event, "RESUME");
    assert!(first.known().is_some());
}
