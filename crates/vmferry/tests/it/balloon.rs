//! The balloon on the monitor. The guest has no driver for it: it gives nothing, and tells nothing.

use serde_json::{Value, json};
use vmferry_control::schema::RunState;

use crate::common::lab::Lab;
use crate::common::vm::Vm;

const MACHINE: [&str; 2] = ["--memory", "128M"];
const KERNEL: [&str; 4] = ["--kernel", "guest:dirtier", "--cmdline", "ws=16M"];
const INCOMING: [&str; 2] = ["--incoming", "tcp:127.0.0.1:0"];

#[test]
fn a_guest_without_a_driver_keeps_its_memory_and_migrates() {
    let Some(lab) = Lab::new() else { return };
    let balloon = ["--balloon", "deflate-on-oom=on"];
    let mut source = Vm::start(&lab, &[&MACHINE[..], &KERNEL, &balloon].concat());
    source.execute("balloon", json!({"value": 64 << 20}));
    let all = json!({"actual": 128 << 20});
    assert_eq!(source.execute("query-balloon", Value::Null), all);

    let mut without = Vm::start(&lab, &[&MACHINE[..], &INCOMING].concat());
    let words = without.refuse("query-balloon", Value::Null);
    assert!(words.contains("No balloon device"), "{words}");
    let words = without.refuse("balloon", json!({"value": 1}));
    assert!(words.contains("No balloon device"), "{words}");
    let uri = without.uri();
    let says = source.migrate_command(&uri, &[]).failed();
    assert!(says.contains("--balloon deflate-on-oom=on,"), "{says}");

    let mut destination = Vm::start(&lab, &[&MACHINE[..], &INCOMING, &balloon].concat());
    let words = destination.refuse("balloon", json!({"value": 1}));
    assert!(words.contains("has not arrived yet"), "{words}");
    let uri = destination.uri();
    let info = source.migrate(&uri);
    assert_eq!(info.ram.unwrap().x_vmferry_hinted_pages, 0);
    destination.wait_for_state(RunState::Running);
    assert_eq!(destination.execute("query-balloon", Value::Null), all);
}

#[test]
fn hints_can_be_switched_off() {
    let Some(lab) = Lab::new() else { return };
    let mut vm = Vm::start(&lab, &[&MACHINE[..], &KERNEL].concat());
    let name = "x-vmferry-free-page-hints";
    let is_on = |vm: &mut Vm| {
        let all = vm.execute("query-migrate-capabilities", Value::Null);
        let all = all.as_array().unwrap().clone();
        let hints = all.into_iter().find(|entry| entry["capability"] == name);
        hints.unwrap()["state"].as_bool().unwrap()
    };
    assert!(is_on(&mut vm));
    vm.set_capability(name, false);
    assert!(!is_on(&mut vm));
}
