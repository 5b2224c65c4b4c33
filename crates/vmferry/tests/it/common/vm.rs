//! One `vmferry run`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_control::schema::{MigrationInfo, MigrationStatus, RunState, SocketAddress};
use vmferry_control::{ClientError, QmpClient};

use super::command::{self, Finished, Running, VMFERRY};
use super::lab::Lab;
use super::{PATIENCE, eventually};

/// A process that runs a machine. Killed when dropped; if its test fails, it shows its last words.
pub struct Vm {
    pub name: String,
    child: Child,
    pub qmp: QmpClient,
    pub socket: PathBuf,
    /// What the guest prints while it is here.
    pub serial: PathBuf,
    stderr: PathBuf,
}

impl Vm {
    /// Starts `vmferry run ARGS` and waits for its monitor.
    pub fn start(lab: &Lab, args: &[&str]) -> Self {
        Vm::start_with(lab, Command::new(VMFERRY), args)
    }

    /// The same, with what comes before `run` made by the caller.
    pub fn start_with(lab: &Lab, mut vmferry: Command, args: &[&str]) -> Self {
        let name = lab.new_name();
        let socket = lab.path(&format!("{name}.qmp"));
        let serial = lab.path(&format!("{name}.serial"));
        let stderr = lab.path(&format!("{name}.stderr"));
        let mut child = vmferry
            .args(["run", "--name", &name])
            .args(["--qmp", &format!("unix:{}", socket.display())])
            .args(["--serial", &format!("file:{}", serial.display())])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr).expect("a file for its messages"))
            .spawn()
            .expect("vmferry can be started");
        let qmp = eventually("the monitor", || {
            let ended = child.try_wait().expect("it is our child");
            let words = || fs::read_to_string(&stderr).unwrap_or_default();
            assert!(ended.is_none(), "{name} did not start: {}", words());
            QmpClient::connect(&socket, PATIENCE).ok()
        });
        Vm {
            name,
            child,
            qmp,
            socket,
            serial,
            stderr,
        }
    }

    /// What it has said on its standard error.
    pub fn words(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Where a destination listens, as a URI to migrate to.
    pub fn uri(&mut self) -> String {
        eventually("an address to migrate to", || {
            match &self.info().socket_address?[0] {
                SocketAddress::Inet { host, port } => Some(format!("tcp:{host}:{port}")),
                SocketAddress::Unix { path } => Some(format!("unix:{}", path.display())),
            }
        })
    }

    /// Executes a command that succeeds.
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp
            .execute(command, arguments)
            .unwrap_or_else(|error| panic!("{error}; it says: {}", self.words()))
    }

    /// Executes a command that fails; the monitor's words.
    #[track_caller]
    pub fn refuse(&mut self, command: &str, arguments: Value) -> String {
        match self.qmp.execute(command, arguments) {
            Err(ClientError::Command { error, .. }) => error.to_string(),
            other => panic!("{command} was to fail: {other:?}"),
        }
    }

    #[track_caller]
    pub fn info(&mut self) -> MigrationInfo {
        self.qmp.query_migrate().expect("query-migrate")
    }

    #[track_caller]
    pub fn run_state(&mut self) -> RunState {
        self.qmp.query_status().expect("query-status").status
    }

    /// Waits until its migration is over.
    #[track_caller]
    pub fn migration_ends(&mut self) -> MigrationInfo {
        use MigrationStatus::{Cancelled, Completed, Failed};
        eventually("the end of the migration", || {
            let info = self.info();
            matches!(info.status, Some(Completed | Failed | Cancelled)).then_some(info)
        })
    }

    /// Migrates over the monitor, whatever comes of it.
    #[track_caller]
    pub fn try_migrate(&mut self, uri: &str) -> MigrationInfo {
        self.execute("migrate", json!({"uri": uri}));
        self.migration_ends()
    }

    /// Migrates over the monitor.
    #[track_caller]
    pub fn migrate(&mut self, uri: &str) -> MigrationInfo {
        let info = self.try_migrate(uri);
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
        info
    }

    /// `vmferry migrate`, to its end.
    pub fn migrate_command(&self, uri: &str, more: &[&str]) -> Finished {
        self.command("migrate", &[&[uri], more].concat())
    }

    /// `vmferry COMMAND` for this machine, to its end.
    pub fn command(&self, command: &str, more: &[&str]) -> Finished {
        self.start_command(command, more).finish_within(PATIENCE)
    }

    /// Starts `vmferry COMMAND` for this machine.
    pub fn start_command(&self, command: &str, more: &[&str]) -> Running {
        command::on_vm(command, &self.socket, more)
    }

    pub fn set_parameters(&mut self, parameters: Value) {
        self.execute("migrate-set-parameters", parameters);
    }

    pub fn set_capability(&mut self, capability: &str, state: bool) {
        let one = json!([{"capability": capability, "state": state}]);
        self.execute("migrate-set-capabilities", json!({"capabilities": one}));
    }

    /// Waits for a run state.
    #[track_caller]
    pub fn wait_for_state(&mut self, wanted: RunState) {
        eventually(&format!("run state {wanted:?}"), || {
            (self.run_state() == wanted).then_some(())
        });
    }

    /// Waits for a migration state.
    #[track_caller]
    pub fn wait_for_status(&mut self, wanted: MigrationStatus) {
        eventually(&format!("migration status {wanted:?}"), || {
            (self.info().status == Some(wanted)).then_some(())
        });
    }

    /// The names of the events so far and of all that come until `last`; those of state changes with the state.
    #[track_caller]
    pub fn events_until(&mut self, last: &str) -> Vec<String> {
        let mut names = Vec::new();
        while names.last().is_none_or(|name| name != last) {
            let event = self.qmp.next_event(PATIENCE).expect("events");
            let event = event.unwrap_or_else(|| panic!("no {last} after {names:?}"));
            names.push(match event.data["status"].as_str() {
                Some(status) => format!("{} {status}", event.event),
                None => event.event,
            });
        }
        names
    }

    /// Passes over the events so far.
    #[track_caller]
    pub fn forget_events(&mut self) {
        // The answer comes behind all that was said before it.
        self.run_state();
        while self
            .qmp
            .next_event(Duration::ZERO)
            .expect("events")
            .is_some()
        {}
    }

    /// Ends it, whatever it does.
    #[track_caller]
    pub fn quit(mut self) -> ExitStatus {
        // The connection may close before the answer is read.
        let _ = self.qmp.execute("quit", Value::Null);
        self.ends()
    }

    /// Waits for the process to end by itself.
    #[track_caller]
    pub fn ends(&mut self) -> ExitStatus {
        let what = format!("the end of {}", self.name);
        eventually(&what, || self.child.try_wait().expect("it is our child"))
    }

    /// Waits for the process to end with an error; its last words.
    #[track_caller]
    pub fn ends_with_error(&mut self) -> String {
        let status = self.ends();
        let words = self.words();
        assert_eq!(status.code(), Some(1), "{}: {status}: {words}", self.name);
        words.lines().last().unwrap_or_default().to_owned()
    }

    #[track_caller]
    pub fn lives(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_none()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// `kill -STOP` or another signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("our child can be signalled");
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("{} said: {}", self.name, self.words().trim());
            eprintln!("its guest's last lines: {}", tail(&self.serial));
        }
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
