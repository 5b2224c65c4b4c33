//! Network interfaces of two processes: what their machines must have in common, and what the monitor says of them. How
//! they carry frames is for guests with a driver (tests/linux).

use serde_json::{Value, json};
use vmferry_control::schema::RunState;

use crate::common::command::vmferry;
use crate::common::lab::Lab;
use crate::common::vm::Vm;

const MACHINE: [&str; 2] = ["--memory", "128M"];
const KERNEL: [&str; 4] = ["--kernel", "guest:dirtier", "--cmdline", "ws=16M"];
const INCOMING: [&str; 2] = ["--incoming", "tcp:127.0.0.1:0"];

/// Arguments of an announcement of these interfaces.
fn announcement(interfaces: Option<&[&str]>) -> Value {
    let mut arguments = json!({"initial": 50, "max": 550, "rounds": 5, "step": 100});
    if let Some(interfaces) = interfaces {
        arguments["interfaces"] = json!(interfaces);
    }
    arguments
}

#[test]
fn a_guest_needs_an_interface_where_it_goes() {
    let Some(lab) = Lab::new() else { return };
    let net = |mac: &str| format!("unix={},type=dgram{mac}", lab.path("switch").display());
    let (here, there) = (net(""), net(",id=wan"));
    let devices = ["--net", &here, "--rng"];
    let mut source = Vm::start(&lab, &[&MACHINE[..], &KERNEL, &devices].concat());

    let mut without = Vm::start(&lab, &[&MACHINE[..], &INCOMING, &["--rng"]].concat());
    let uri = without.uri();
    let says = source.migrate_command(&uri, &[]).failed();
    assert!(
        says.contains("start it with --net unix=PATH,mac=52:54:00:12:34:56 --rng"),
        "{says}"
    );
    assert_eq!(source.run_state(), RunState::Running);

    let devices = ["--net", &there, "--rng"];
    let mut destination = Vm::start(&lab, &[&MACHINE[..], &devices, &INCOMING].concat());
    destination.set_parameters(json!({"announce-rounds": 2}));
    let uri = destination.uri();
    source.migrate_command(&uri, &[]).succeeded();
    destination.wait_for_state(RunState::Running);
    for interfaces in [None, Some(&["wan"][..])] {
        destination.execute("announce-self", announcement(interfaces));
    }
    let words = destination.refuse("announce-self", announcement(Some(&["net0"])));
    assert_eq!(
        words,
        "cannot announce the interface 'net0': the machine has wan"
    );
}

#[test]
fn what_cannot_be_connected_is_said_at_the_start() {
    let Some(lab) = Lab::new() else { return };
    let refused = |net: &str| {
        let run = ["run", "--serial", "null", "--net", net];
        vmferry([&run[..], &MACHINE, &KERNEL].concat()).failed()
    };
    let nobody = format!("unix={}", lab.path("nobody").display());
    let says = refused(&nobody);
    assert!(
        says.contains("cannot connect the interface 'net0' to"),
        "{says}"
    );
    let says = refused("tap=vmferry-none");
    assert!(says.contains("ip tuntap add dev vmferry-none"), "{says}");
}
