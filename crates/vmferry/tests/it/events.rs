//! Which events a monitor's client sees, and in which order.

use serde_json::{Value, json};
use vmferry_control::schema::RunState;

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::vm::Vm;

#[test]
fn of_a_migration() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    for vm in [&mut guest.vm, &mut destination] {
        vm.set_capability("events", true);
        vm.forget_events();
    }
    guest.vm.execute("migrate", json!({"uri": uri}));
    let mut source = guest.vm.events_until("MIGRATION completed");
    let passes = source.iter().filter(|e| *e == "MIGRATION_PASS").count();
    assert!(passes >= 3, "{source:?}");
    source.retain(|event| event != "MIGRATION_PASS");
    assert_eq!(
        source,
        [
            "MIGRATION setup",
            "MIGRATION active",
            "STOP",
            "MIGRATION device",
            "MIGRATION completed"
        ]
    );
    let mut there = destination.events_until("MIGRATION completed");
    // The guest may be seen running a moment before or after that.
    there.retain(|event| event != "RESUME");
    assert_eq!(
        there,
        [
            "MIGRATION active",
            "MIGRATION device",
            "MIGRATION completed"
        ]
    );
    guest.moved_to(destination);
}

/// Without the capability, as with QEMU, the guest's own events are all there is.
#[test]
fn of_a_migration_unasked() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.vm.forget_events();
    let mut destination = guest.tcp_destination();
    guest.vm.migrate(&destination.uri());
    guest.vm.execute("quit", Value::Null);
    assert_eq!(guest.vm.events_until("SHUTDOWN"), ["STOP", "SHUTDOWN"]);
    assert_eq!(destination.events_until("RESUME"), ["RESUME"]);
    assert_eq!(destination.run_state(), RunState::Running);
    guest.moved_to(destination);
}

#[test]
fn of_a_failed_switch_over() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.vm.set_capability("events", true);
    guest.vm.forget_events();
    let uri = "exec:cat > /dev/null; exit 1";
    guest.vm.execute("migrate", json!({"uri": uri}));
    let mut events = guest.vm.events_until("MIGRATION failed");
    events.retain(|event| event != "MIGRATION_PASS");
    assert_eq!(
        events,
        [
            "MIGRATION setup",
            "MIGRATION active",
            "STOP",
            "MIGRATION device",
            "RESUME",
            "MIGRATION failed"
        ]
    );
    guest.runs_on();
}

#[test]
fn of_the_users_own_doing() {
    let Some(lab) = Lab::new() else { return };
    let kernel = ["--kernel", "guest:dirtier", "--cmdline", "ws=16M"];
    let args = [&kernel[..], &["--memory", "128M", "--paused"]].concat();
    let mut vm = Vm::start(&lab, &args);
    assert_eq!(vm.run_state(), RunState::Prelaunch);
    for (command, event, state) in [
        ("cont", "RESUME", RunState::Running),
        ("stop", "STOP", RunState::Paused),
        ("cont", "RESUME", RunState::Running),
        ("system_reset", "RESET", RunState::Running),
        ("stop", "STOP", RunState::Paused),
        ("system_reset", "RESET", RunState::Prelaunch),
    ] {
        vm.execute(command, Value::Null);
        assert_eq!(vm.events_until(event), [event], "{command}");
        assert_eq!(vm.run_state(), state, "{command}");
        // Asked for again, nothing happens.
        if command != "system_reset" {
            vm.execute(command, Value::Null);
        }
    }
    vm.execute("quit", Value::Null);
    assert_eq!(vm.events_until("SHUTDOWN"), ["SHUTDOWN"]);
    assert!(vm.ends().success());
}

#[test]
fn of_a_guest_that_ends() {
    let Some(lab) = Lab::new() else { return };
    let kernel = ["--kernel", "guest:dirtier", "--cmdline", "ws=16M seconds=1"];
    let args = [
        &kernel[..],
        &["--memory", "128M", "--paused", "--no-reboot"],
    ]
    .concat();
    let mut vm = Vm::start(&lab, &args);
    vm.execute("cont", Value::Null);
    let event = loop {
        let event = vm.qmp.next_event(crate::common::PATIENCE);
        let event = event.expect("events").expect("the guest ends");
        if event.event == "SHUTDOWN" {
            break event;
        }
    };
    assert_eq!(event.data, json!({"guest": true, "reason": "guest-reset"}));
    assert!(vm.ends().success());
    let text = std::fs::read_to_string(&vm.serial).expect("its output");
    assert!(text.contains("dirtier: done "), "{text}");
}

/// Ctrl-C, or a service manager.
#[test]
fn of_a_signal() {
    let Some(lab) = Lab::new() else { return };
    let args = ["--kernel", "guest:dirtier", "--memory", "128M"];
    let mut vm = Vm::start(&lab, &args);
    // It listens to its monitor before it listens to signals.
    vm.wait_for_state(RunState::Running);
    vm.forget_events();
    vm.signal(rustix::process::Signal::TERM);
    let event = vm.qmp.next_event(crate::common::PATIENCE);
    let event = event.expect("events").expect("the process ends");
    assert_eq!(event.event, "SHUTDOWN");
    assert_eq!(event.data["reason"], "host-signal");
    assert!(vm.ends().success());
    assert!(!vm.socket.exists(), "the monitor's socket is left behind");
}
