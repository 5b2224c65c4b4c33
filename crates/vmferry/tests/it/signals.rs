//! What signals do to a process that runs a guest. The table is in the documentation of `run::signals`.

use std::fs;
use std::process::Command;

use serde_json::Value;
use vmferry_control::schema::{MigrationStatus, RunState};

use crate::common::command::VMFERRY;
use crate::common::eventually;
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::vm::Vm;

/// A small guest that speaks.
const GUEST: [&str; 6] = [
    "--kernel",
    "guest:dirtier",
    "--memory",
    "128M",
    "--cmdline",
    "ws=8M rate=1000",
];

/// `env OPTION... vmferry`.
fn under_env(options: &[&str]) -> Command {
    let mut env = Command::new("env");
    env.args(options).arg(VMFERRY);
    env
}

/// `kill -SIGNAL`, for the signals that have no name in Rust too.
#[track_caller]
fn kill(vm: &Vm, signals: impl IntoIterator<Item = libc::c_int>) {
    let kill = |signal| format!("kill -{signal} {}", vm.pid());
    let script = signals.into_iter().map(kill).collect::<Vec<_>>().join("\n");
    let status = Command::new("sh").args(["-e", "-c", &script]).status();
    assert!(status.expect("a shell").success(), "{script}");
}

/// Signals that end a process which has not thought of them.
fn meaningless() -> impl Iterator<Item = libc::c_int> {
    let named = [
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGIO,
        libc::SIGPWR,
        libc::SIGSTKFLT,
        libc::SIGXCPU,
        libc::SIGXFSZ,
        libc::SIGPIPE,
    ];
    named.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX())
}

#[test]
fn meaningless_signals_change_nothing() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    for signal in meaningless() {
        kill(&guest.vm, [signal]);
        assert_eq!(guest.vm.run_state(), RunState::Running, "signal {signal}");
    }
    guest.works();
    // Nor do they interrupt a migration, on either side.
    let (mut destination, _) = guest.begin_slow_migration();
    kill(&destination, meaningless());
    kill(&guest.vm, meaningless());
    assert_eq!(guest.vm.info().status, Some(MigrationStatus::Active));
    guest
        .vm
        .set_parameters(serde_json::json!({"max-bandwidth": 0}));
    guest.vm.wait_for_status(MigrationStatus::Completed);
    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
    guest.verifies_all();
}

#[test]
fn the_signals_that_end_a_process_let_it_clean_up() {
    let Some(lab) = Lab::new() else { return };
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        let defaults = under_env(&["--default-signal=INT,HUP,QUIT"]);
        let mut vm = Vm::start_with(&lab, defaults, &GUEST);
        kill(&vm, [signal]);
        assert_eq!(vm.events_until("SHUTDOWN"), ["SHUTDOWN"]);
        let status = vm.ends();
        assert!(status.success(), "signal {signal}: {status}");
        assert!(!vm.socket.exists(), "signal {signal}");
    }
}

#[test]
fn signals_that_a_parent_ignores_stay_ignored() {
    let Some(lab) = Lab::new() else { return };
    let nohup = under_env(&["--ignore-signal=HUP,INT,QUIT,TERM"]);
    let mut vm = Vm::start_with(&lab, nohup, &GUEST);
    kill(&vm, [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT]);
    assert_eq!(vm.run_state(), RunState::Running);
    // One always works.
    kill(&vm, [libc::SIGTERM]);
    assert!(vm.ends().success());
}

/// A parent that has every signal blocked has its child start so.
#[test]
fn blocked_signals_are_no_obstacle() {
    let Some(lab) = Lab::new() else { return };
    let mut vm = Vm::start_with(&lab, under_env(&["--block-signal"]), &GUEST);
    vm.execute("stop", Value::Null);
    assert_eq!(vm.run_state(), RunState::Paused);
    vm.execute("cont", Value::Null);
    kill(&vm, [libc::SIGTERM]);
    assert!(vm.ends().success());
}

/// Nothing is ignored or blocked there because of us; and a parent that ignores SIGCHLD does not cost us the command's
/// status.
#[test]
fn commands_have_the_usual_signals() {
    let Some(lab) = Lab::new() else { return };
    let mut vm = Vm::start_with(&lab, under_env(&["--ignore-signal=CHLD"]), &GUEST);
    let seen = lab.path("signals");
    let look = format!(
        "exec:cat > /dev/null; cat /proc/self/status > {}",
        seen.display()
    );
    vm.migrate(&look);
    let status = fs::read_to_string(seen).expect("the command has run");
    for field in ["SigBlk:", "SigIgn:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let mask = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        let mask = mask.unwrap_or_else(|| panic!("no {field} in {status}"));
        for signal in meaningless() {
            assert_eq!(mask >> (signal - 1) & 1, 0, "{field} signal {signal}");
        }
    }
    vm.execute("cont", Value::Null);
    let failed = vm.try_migrate("exec:cat > /dev/null; exit 3");
    assert_eq!(failed.status, Some(MigrationStatus::Failed));
}

/// A limit on the size of files costs what would be written beyond it, and not the guest.
#[test]
fn a_file_that_may_not_grow_costs_the_file_only() {
    let Some(lab) = Lab::new() else { return };
    const LIMIT: u64 = 4096;
    let mut limited = Command::new("sh");
    // In units of 512 bytes.
    let script = format!("ulimit -f {} && exec \"$0\" \"$@\"", LIMIT / 512);
    limited.args(["-c", &script, VMFERRY]);
    let mut vm = Vm::start_with(&lab, limited, &GUEST);
    eventually("the guest's output to reach the limit", || {
        (fs::metadata(&vm.serial).ok()?.len() >= LIMIT).then_some(())
    });
    let failed = vm.try_migrate(&lab.uri("file", "snapshot"));
    let why = failed.error_desc.expect("a reason");
    assert!(why.contains("File too large"), "{why}");
    vm.wait_for_state(RunState::Running);
    assert!(vm.quit().success());
}
