//! One client: what it may send, and what it gets.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use vmferry_control::schema::{BalloonChangeData, BalloonInfo, Event, MigrationCapability};
use vmferry_engine::Uri;

use crate::fake::Rig;

#[test]
fn greeting_and_replies_are_in_the_order_people_know() {
    let rig = Rig::new();
    let mut wire = rig.connect();
    let greeting = wire.line().unwrap().unwrap();
    assert_eq!(
        greeting,
        format!(
            r#"{{"QMP":{{"version":{{"qemu":{{"major":10,"minor":0,"micro":0}},"package":"vmferry {}"}},"capabilities":[]}}}}"#,
            env!("CARGO_PKG_VERSION")
        )
    );
    wire.send(r#"{"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": {"a": [1]}}"#);
    assert_eq!(
        wire.line().unwrap().unwrap(),
        r#"{"return":{},"id":{"a":[1]}}"#
    );
    wire.send(r#"{"execute": "query-status"}"#);
    assert_eq!(
        wire.line().unwrap().unwrap(),
        r#"{"return":{"status":"prelaunch","running":false}}"#
    );
    wire.send(r#"{"execute": "foo", "id": null}"#);
    assert_eq!(
        wire.line().unwrap().unwrap(),
        r#"{"error":{"class":"CommandNotFound","desc":"The command foo has not been found"},"id":null}"#
    );
}

#[test]
fn disks_and_the_power_button_are_as_in_qemu() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    let disks = wire.ask(r#"{"execute": "query-block"}"#);
    let disk = &disks["return"][0];
    assert_eq!(disk["device"], "root");
    assert_eq!(disk["type"], "unknown");
    let inserted = &disk["inserted"];
    assert_eq!(inserted["drv"], "raw");
    assert_eq!(inserted["detect_zeroes"], "off");
    assert_eq!(inserted["image"]["virtual-size"], 1 << 30);
    assert_eq!(inserted["cache"]["no-flush"], false);
    assert_eq!(inserted["x-vmferry-io"], "io-uring");
    wire.send(r#"{"execute": "system_powerdown"}"#);
    let (first, second) = (wire.read(), wire.read());
    let event = [&first, &second].map(|line| line["event"] == "POWERDOWN");
    assert!(event.contains(&true), "{first} {second}");
}

#[test]
fn balloons_are_as_in_qemu() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    for value in [0, -1] {
        let request = json!({"execute": "balloon", "arguments": {"value": value}});
        let answer = wire.ask(request.to_string());
        let words = "Parameter 'target' expects a size";
        assert_eq!(answer["error"]["desc"], words, "{answer}");
    }
    let data = BalloonChangeData { actual: 1 << 30 };
    rig.events.emit(Event::BalloonChange(data));
    let event = wire.read();
    assert_eq!(event["event"], "BALLOON_CHANGE");
    assert_eq!(event["data"], json!({"actual": 1 << 30}));
    let mut info = BalloonInfo {
        actual: 1 << 30,
        stats: BTreeMap::new(),
    };
    assert_eq!(json!(info), json!({"actual": 1 << 30}));
    info.stats.insert("free-memory".into(), 4096);
    let all = json!({"actual": 1 << 30, "x-vmferry-stats": {"free-memory": 4096}});
    assert_eq!(json!(info), all);
    let capability = json!(MigrationCapability::FreePageHints);
    assert_eq!(capability, "x-vmferry-free-page-hints");
}

#[test]
fn requests_may_come_in_pieces_and_in_heaps() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    for byte in br#"{"execute": "query-kvm", "id": 1}"# {
        wire.send([*byte]);
    }
    assert_eq!(wire.read()["id"], 1);
    let heap: String = (0..5_000)
        .map(|id| format!(r#"{{"execute":"query-status","id":{id}}}"#))
        .collect();
    let mut writer = wire.stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        std::io::Write::write_all(&mut writer, heap.as_bytes()).unwrap();
    });
    for id in 0..5_000 {
        assert_eq!(wire.read()["id"], id);
    }
    writing.join().unwrap();
}

#[test]
fn commands_are_listed_and_every_one_is_there() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    let commands = wire.ask(r#"{"execute": "query-commands"}"#);
    let names: Vec<&str> = commands["return"]
        .as_array()
        .unwrap()
        .iter()
        .map(|command| command["name"].as_str().unwrap())
        .collect();
    assert_eq!(names.len(), 28);
    for name in names {
        let reply = wire.ask(json!({"execute": name, "arguments": {"foo": 1}}).to_string());
        let expected = match name {
            "qmp_capabilities" => "Capabilities negotiation is already complete, command ignored",
            _ => "Parameter 'foo' is unexpected",
        };
        assert_eq!(reply["error"]["desc"], expected, "for {name}");
    }
    assert_eq!(
        wire.ask(r#"{"execute": "query-version"}"#)["return"]["qemu"]["major"],
        10
    );
}

#[test]
fn parameters_are_set_and_read() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    let reply = wire.ask(
        r#"{"execute": "migrate-set-parameters", "arguments":
            {"announce-rounds": 7, "downtime-limit": 2000000, "max-bandwidth": 18446744073709551615,
             "x-vmferry-discipline": "slice-lock"}}"#,
    );
    assert_eq!(reply, json!({"return": {}}));
    assert_eq!(
        wire.ask(r#"{"execute": "query-migrate-parameters"}"#)["return"],
        json!({
            "announce-initial": 50,
            "announce-max": 550,
            "announce-rounds": 7,
            "announce-step": 100,
            "downtime-limit": 2_000_000,
            "max-bandwidth": u64::MAX,
            "x-vmferry-discipline": "slice-lock",
            "x-vmferry-arming-chunk": 16 << 20,
            "x-vmferry-peer-timeout": 10_000
        })
    );
    for (arguments, complaint) in [
        (
            json!({"x-vmferry-discipline": "none"}),
            "unknown discipline 'none': use lock-free, slice-lock or per-bit-lock",
        ),
        (
            json!({"x-vmferry-discipline": 5}),
            "Invalid parameter type for 'x-vmferry-discipline', expected: string",
        ),
        (
            json!({"x-vmferry-arming-chunk": 4096}),
            "Parameter 'x-vmferry-arming-chunk' expects an integer in the range of 262144 to 8796093022208 bytes",
        ),
        (
            json!({"announce-step": 10_001}),
            "Parameter 'announce_step' expects a value between 0 and 10000",
        ),
        (
            json!({"x-vmferry-peer-timeout": 0}),
            "Parameter 'x-vmferry-peer-timeout' expects an integer in the range of 1 to 86400000 ms",
        ),
        (
            json!({"multifd-channels": 2}),
            "Parameter 'multifd-channels' is unexpected",
        ),
    ] {
        let request = json!({"execute": "migrate-set-parameters", "arguments": arguments});
        assert_eq!(wire.ask(request.to_string())["error"]["desc"], complaint);
    }
}

#[test]
fn both_ways_to_name_a_destination_are_one() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    let main = |addr: Value| json!({"channels": [{"channel-type": "main", "addr": addr}]});
    let pairs = [
        (
            json!({"uri": "tcp:[::1]:4444", "detach": true}),
            main(json!({"transport": "socket", "type": "inet", "host": "::1", "port": "4444"})),
        ),
        (
            json!({"uri": "unix:/a", "channels": [], "resume": false}),
            main(json!({"transport": "socket", "type": "unix", "path": "/a"})),
        ),
        (
            json!({"uri": "fd:7"}),
            main(json!({"transport": "socket", "type": "fd", "str": "7"})),
        ),
        (
            json!({"uri": "file:/a,offset=0"}),
            main(json!({"transport": "file", "filename": "/a", "offset": 0})),
        ),
        (
            json!({"uri": "exec:cat"}),
            main(json!({"transport": "exec", "args": ["/bin/sh", "-c", "cat"]})),
        ),
    ];
    for (uri, channels) in &pairs {
        for arguments in [uri, channels] {
            let request = json!({"execute": "migrate", "arguments": arguments});
            assert_eq!(
                wire.ask(request.to_string()),
                json!({"return": {}}),
                "{arguments}"
            );
        }
    }
    let destinations = rig.machine.destinations();
    for pair in destinations.chunks(2) {
        assert_eq!(pair[0], pair[1]);
    }
    assert_eq!(destinations.len(), 2 * pairs.len());
    assert_eq!(
        destinations[0],
        Uri::Tcp {
            host: "::1".into(),
            port: 4444
        }
    );
}

#[test]
fn an_address_that_is_none_is_explained() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    for command in ["migrate", "migrate-incoming"] {
        for uri in ["bogus:x", "tcp:nohost", "unix:", "file:/a,offset=4096"] {
            let request = json!({"execute": command, "arguments": {"uri": uri}});
            assert_eq!(
                wire.ask(request.to_string())["error"]["desc"],
                uri.parse::<Uri>().unwrap_err().to_string()
            );
        }
    }
    assert!(rig.machine.destinations().is_empty());
}

#[test]
fn query_migrate_is_empty_before_the_first_migration() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    let query = r#"{"execute": "query-migrate"}"#;
    assert_eq!(wire.ask(query), json!({"return": {}}));
    wire.ask(r#"{"execute": "migrate", "arguments": {"uri": "tcp:a:1"}}"#);
    let info = wire.ask(query);
    let info = &info["return"];
    assert_eq!(info["status"], "active");
    assert_eq!(info["total-time"], 12);
    assert_eq!(info["ram"]["page-size"], 4096);
    assert_eq!(info["ram"]["dirty-sync-missed-zero-copy"], 0);
    assert_eq!(info["x-vmferry-discipline"], "lock-free");
    assert_eq!(info.get("downtime"), None);
}

#[test]
fn hostile_input_is_answered_and_bounded() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    for (garbage, complaint) in [
        (&b"\xff"[..], "JSON parse error, "),
        (b"{\"execute\": \"query-sta\n", "JSON parse error, "),
        (b"\x00\x01\x02", "JSON parse error, "),
        (b"{\"a\"::}", "JSON parse error, "),
        (b"[[[[]]]]", "QMP input must be a JSON object"),
    ] {
        let reply = wire.ask(garbage);
        let desc = reply["error"]["desc"].as_str().unwrap();
        assert!(desc.starts_with(complaint), "{desc}");
        wire.send(b"\xff");
        wire.read();
        let status = wire.ask(r#"{"execute": "query-status"}"#);
        assert!(status.get("return").is_some(), "{status} after {garbage:?}");
    }

    let mut deep = rig.negotiated();
    deep.send(vec![b'['; 1000]);
    let reply = deep.read();
    let desc = reply["error"]["desc"].as_str().unwrap();
    assert!(
        desc.starts_with("JSON nesting depth limit exceeded"),
        "{desc}"
    );
    assert!(deep.ends());

    let mut huge = rig.negotiated();
    let fits = format!(
        r#"{{"execute": "query-status", "id": "{}"}}"#,
        "x".repeat(1 << 19)
    );
    assert!(huge.ask(&fits).get("return").is_some());
    let mut writer = huge.stream.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        let chunk = [b'x'; 65536];
        std::io::Write::write_all(&mut writer, b"{\"").unwrap();
        // Ends when the server has had enough.
        while std::io::Write::write_all(&mut writer, &chunk).is_ok() {}
    });
    let reply = huge.read();
    let desc = reply["error"]["desc"].as_str().unwrap();
    assert!(desc.starts_with("JSON token size limit exceeded"), "{desc}");
    assert!(huge.ends());
    flood.join().unwrap();
}
