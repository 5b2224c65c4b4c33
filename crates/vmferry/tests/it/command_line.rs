//! What the command prints, for people and for programs, and how it says what went wrong.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::{Value, json};
use vmferry_control::QmpClient;
use vmferry_control::schema::{MigrationStatus, RunState};

use crate::common::command::{Running, VMFERRY, on_vm, vmferry};
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::{PATIENCE, eventually};

#[test]
fn json_and_nothing_else() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let nobody = guest.vm.migrate_command("tcp:127.0.0.1:1", &["--json"]);
    assert_eq!(nobody.status.code(), Some(1));
    let answer = nobody.json();
    assert_eq!(answer["status"], "failed");
    let why = answer["error-desc"].as_str().expect("a reason");
    assert!(why.contains("Connection refused"), "{why}");

    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    let options = [
        "--json",
        "--downtime-limit",
        "100ms",
        "--max-bandwidth",
        "2GiB/s",
        "--discipline",
        "slice-lock",
        "--keep-source",
    ];
    let moved = guest.vm.migrate_command(&uri, &options);
    assert!(moved.status.success(), "{moved:#?}");
    assert_eq!(moved.stderr, "");
    let answer = moved.json();
    assert_eq!(answer["status"], "completed");
    assert_eq!(answer["x-vmferry-discipline"], "slice-lock");
    assert!(answer["downtime"].is_u64() && answer["total-time"].is_u64());
    let parameters = guest.vm.execute("query-migrate-parameters", Value::Null);
    assert_eq!(parameters["downtime-limit"], 100);
    assert_eq!(parameters["max-bandwidth"], 2_u64 << 30);

    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
    let status = guest.vm.command("status", &["--json"]).json();
    assert_eq!(
        status["status"],
        json!({"status": "running", "running": true})
    );
    assert_eq!(status["migration"]["status"], "completed");
}

/// Who waits for a guest, or for one that does not listen, can quit by the keys.
#[test]
fn a_terminals_user_can_quit() {
    let Some(lab) = Lab::new() else { return };
    let waiting = ["--incoming", "tcp:127.0.0.1:0"];
    let running = ["--kernel", "guest:dirtier"];
    for (name, what) in [("waiting", waiting), ("running", running)] {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let keyboard = openpt(flags).expect("a terminal");
        grantpt(&keyboard).expect("it is ours");
        unlockpt(&keyboard).expect("it is ours");
        let terminal = ptsname(&keyboard, Vec::new()).expect("it has a name");
        let terminal = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NOCTTY.bits() as i32)
            .open(OsStr::from_bytes(terminal.as_bytes()))
            .expect("it is ours");
        let socket = lab.path(&format!("{name}.qmp"));
        let mut command = Command::new(VMFERRY);
        command.arg("run").args(what);
        command.args(["--qmp", &format!("unix:{}", socket.display())]);
        let vm = Running::with_input(&mut command, terminal.into());
        eventually("its monitor", || QmpClient::connect(&socket, PATIENCE).ok());
        // More than any guest takes at once, and the keys.
        File::from(keyboard.try_clone().expect("a descriptor"))
            .write_all(format!("{}\x01x", "typed ahead".repeat(20)).as_bytes())
            .expect("a terminal takes input");
        let end = vm.finish_within(PATIENCE);
        assert!(end.status.success(), "{name}: {end:?}");
        assert!(!socket.exists());
    }
}

/// Standard error is no terminal here: a line now and then, and none that moves the cursor.
#[test]
fn progress_without_a_terminal() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    guest.vm.set_parameters(json!({"max-bandwidth": 40 << 20}));
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    let watching = on_vm("status", &guest.vm.socket, &["--watch", "--json"]);
    let moved = guest.vm.migrate_command(&uri, &[]);
    assert!(moved.status.success(), "{moved:#?}");
    assert!(!moved.stderr.contains(['\r', '\x1b']), "{:?}", moved.stderr);
    for line in moved.stderr.lines() {
        let known = line == "setup ..." || line.contains(" of 256.0 MiB remaining");
        assert!(known, "{line}");
    }
    assert!(
        moved.stderr.contains("active: pass 1, "),
        "{}",
        moved.stderr
    );
    for part in ["The guest has moved to tcp:", "downtime", "total time"] {
        assert!(moved.stdout.contains(part), "{}", moved.stdout);
    }
    // Whoever watched saw objects, one a line, and the end of the process as an end.
    let watched = watching.finish_within(PATIENCE).succeeded();
    assert!(watched.lines().count() >= 2, "{watched}");
    for line in watched.lines() {
        let object: Value = serde_json::from_str(line).expect("an object a line");
        assert!(object["status"].is_object() && object["migration"].is_object());
    }
    destination.wait_for_state(RunState::Running);
}

#[test]
fn status_for_people() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let status = |guest: &Guest<'_>| guest.vm.command("status", &[]).succeeded();
    assert_eq!(status(&guest), "guest: running\nmigration: none\n");
    guest.vm.migrate_command("tcp:127.0.0.1:1", &[]).failed();
    let failed = status(&guest);
    assert!(
        failed.contains("guest: running\nmigration: failed\n"),
        "{failed}"
    );
    assert!(failed.contains("Connection refused"), "{failed}");
    // There are no figures of a migration that never began.
    assert!(!failed.contains("RAM"), "{failed}");
    guest.vm.migrate(&lab.uri("file", "snapshot"));
    guest.vm.wait_for_state(RunState::Postmigrate);
    let left = status(&guest);
    assert!(left.contains("migration: completed"), "{left}");
    assert!(left.contains("(postmigrate)"), "{left}");
}

#[test]
fn errors_of_migrate() {
    let Some(lab) = Lab::new() else { return };
    let mut guest = Guest::boot(&lab, Shape::small());
    let socket = lab.uri("unix", "nobody-listens");
    for (uri, parts) in [
        (
            "tcp:127.0.0.1:1",
            &[
                "cannot connect to tcp:127.0.0.1:1: Connection refused",
                "is the destination started with --incoming there?",
            ][..],
        ),
        (
            "tcp:no-such-host.invalid:4444",
            &["cannot connect to tcp:no-such-host.invalid:4444", "lookup"],
        ),
        (&socket, &["cannot connect to unix:", "No such file"]),
        ("fd:77", &["cannot use fd:77"]),
        ("file:/", &["cannot create file:/", "directory"]),
    ] {
        let words = guest.vm.migrate_command(uri, &[]).failed();
        for part in parts {
            assert!(words.contains(part), "no '{part}': {words}");
        }
        assert_eq!(words.matches("os error").count().max(1), 1, "{words}");
        assert_eq!(guest.vm.info().status, Some(MigrationStatus::Failed));
    }
    guest.runs_on();
}

#[test]
fn a_monitor_that_is_not_there() {
    let lab = Lab::without_kvm();
    for command in ["status", "cancel", "dirty-rate", "migrate"] {
        let uri: &[&str] = if command == "migrate" {
            &["tcp:127.0.0.1:1"]
        } else {
            &[]
        };
        let socket = lab.path("no-such-socket");
        let words = on_vm(command, &socket, uri)
            .finish_within(PATIENCE)
            .failed();
        assert!(
            words.contains("cannot connect to the QMP socket"),
            "{words}"
        );
        assert!(
            words.contains("is the VM running, and is this its --qmp socket?"),
            "{words}"
        );
        assert_eq!(words.matches("No such file").count(), 1, "{words}");
    }
    // A socket of another kind.
    let other = lab.path("other");
    let listener = std::os::unix::net::UnixListener::bind(&other).expect("a socket");
    std::thread::spawn(move || {
        use std::io::Write;
        let (mut client, _) = listener.accept().expect("a client");
        let _ = client.write_all(b"SSH-2.0-OpenSSH_9.9\r\n");
        std::thread::sleep(PATIENCE);
    });
    let words = on_vm("status", &other, &[])
        .finish_within(PATIENCE)
        .failed();
    assert!(words.contains("is this a QMP socket?"), "{words}");
}

#[test]
fn nothing_to_run() {
    let lab = Lab::without_kvm();
    let words = vmferry(["run"]).failed();
    assert!(words.contains("nothing to run: give --kernel"), "{words}");
    let text = lab.path("text");
    std::fs::write(&text, "no kernel\n").expect("a file");
    let missing = lab.path("missing");
    for (kernel, part) in [
        (&missing, "No such file or directory"),
        (&text, "neither an ELF file nor a bzImage"),
    ] {
        let words = run_kernel(kernel);
        assert!(words.contains(part), "{words}");
        let shown = kernel.display().to_string();
        assert!(words.contains(&shown), "which kernel? {words}");
    }
    let usage = vmferry(["run", "--kernel", "guest:nobody"]);
    assert_eq!(usage.status.code(), Some(2), "{usage:#?}");
    assert!(usage.stderr.contains("there is no embedded guest 'nobody'"));
    let usage = vmferry(["migrate", "--qmp", "x", "nowhere"]);
    assert_eq!(usage.status.code(), Some(2), "{usage:#?}");
    assert!(usage.stderr.contains("tcp:HOST:PORT"), "{}", usage.stderr);
}

fn run_kernel(kernel: &Path) -> String {
    let kernel = kernel.to_str().expect("the path is text");
    vmferry(["run", "--serial", "null", "--kernel", kernel]).failed()
}

#[test]
fn impossible_machines() {
    let Some(lab) = Lab::new() else { return };
    let args = ["run", "--kernel", "guest:dirtier", "--serial", "null"];
    let cmdline = ["--cmdline", "ws=64M"];
    for (more, part) in [
        (["--cpus", "0"], "vCPU"),
        (["--cpus", "100000"], "vCPU"),
        (["--memory", "0"], "memory"),
        (["--memory", "4097"], "memory"),
        (["--memory", "1P"], "memory"),
    ] {
        let words = vmferry([&args[..], &cmdline, &more].concat()).failed();
        assert!(words.contains(part), "{more:?}: {words}");
    }
    // A monitor's socket that is in use is not taken away.
    let guest = Guest::boot(&lab, Shape::small());
    let taken = format!("unix:{}", guest.vm.socket.display());
    let words = vmferry([&args[..], &["--qmp", &taken]].concat()).failed();
    assert!(words.contains(&taken["unix:".len()..]), "{words}");
    guest.works();
    guest.vm.command("status", &[]).succeeded();
}

#[test]
fn completions_and_man_pages() {
    let lab = Lab::without_kvm();
    for (shell, part) in [
        ("bash", "_vmferry()"),
        ("zsh", "#compdef vmferry"),
        ("fish", "complete -c vmferry"),
    ] {
        let script = vmferry(["completions", shell]).succeeded();
        assert!(script.contains(part), "{shell}: {script}");
        assert!(script.contains("downtime-limit"), "{shell}");
    }
    let directory = lab.path("man");
    let shown = directory.to_str().expect("the path is text");
    vmferry(["man", shown]).succeeded();
    for page in [
        "vmferry.1",
        "vmferry-run.1",
        "vmferry-migrate.1",
        "vmferry-demo.1",
    ] {
        let text = std::fs::read_to_string(directory.join(page)).expect("a page");
        assert!(text.contains(".TH vmferry"), "{page}: {text}");
    }
}

/// A closed pipe (`vmferry status --watch | head -1`) is no reason for a backtrace.
#[test]
fn a_reader_that_leaves() {
    let Some(lab) = Lab::new() else { return };
    let guest = Guest::boot(&lab, Shape::small());
    let script = "\"$0\" status --watch --qmp \"unix:$1\" | head -1";
    let watch = crate::common::command::Running::start(
        std::process::Command::new("sh")
            .args(["-c", script, crate::common::command::VMFERRY])
            .arg(&guest.vm.socket),
    );
    let over = watch.finish_within(PATIENCE);
    assert_eq!(over.stdout, "guest: running\n");
    assert!(!over.stderr.contains("panicked"), "{}", over.stderr);
    guest.works();
}
