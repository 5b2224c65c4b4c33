//! Commands that run to their end, within bounds.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::PATIENCE;

/// `vmferry`, as built for these tests.
pub const VMFERRY: &str = env!("CARGO_BIN_EXE_vmferry");

/// What a command that is over has left.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Its standard output, after it succeeded.
    #[track_caller]
    pub fn succeeded(self) -> String {
        assert!(self.status.success(), "{self:#?}");
        self.stdout
    }

    /// Its last line on standard error, after it failed with the exit status that means "could not".
    #[track_caller]
    pub fn failed(self) -> String {
        assert_eq!(self.status.code(), Some(1), "{self:#?}");
        let last = self.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("vmferry: "), "{self:#?}");
        last.to_owned()
    }

    /// Its standard output as the one JSON object that it is.
    #[track_caller]
    pub fn json(&self) -> Value {
        let value = serde_json::from_str(&self.stdout);
        value.unwrap_or_else(|error| panic!("not one JSON value: {error}: {self:#?}"))
    }
}

/// A command under way. Ended when dropped.
pub struct Running {
    child: Child,
    output: Option<(JoinHandle<String>, JoinHandle<String>)>,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self::with_input(command, Stdio::null())
    }

    pub fn with_input(command: &mut Command, input: Stdio) -> Self {
        let mut child = command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command can be started");
        let stdout = read_to_end(child.stdout.take().expect("it is piped"));
        let stderr = read_to_end(child.stderr.take().expect("it is piped"));
        Running {
            child,
            output: Some((stdout, stderr)),
        }
    }

    /// Waits for the end.
    ///
    /// # Panics
    ///
    /// It does not come in time.
    pub fn finish_within(mut self, time: Duration) -> Finished {
        let end = Instant::now() + time;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                break status;
            }
            assert!(
                Instant::now() < end,
                "the command still runs after {time:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        let (stdout, stderr) = self.output.take().expect("taken here only");
        Finished {
            status,
            stdout: stdout.join().expect("reading does not panic"),
            stderr: stderr.join().expect("reading does not panic"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_to_end(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs `vmferry` to its end.
pub fn vmferry<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Finished {
    start(args).finish_within(PATIENCE)
}

/// Starts `vmferry`.
pub fn start<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Running {
    Running::start(Command::new(VMFERRY).args(args))
}

/// `vmferry COMMAND --qmp unix:SOCKET ...`.
pub fn on_vm(command: &str, socket: &Path, more: &[&str]) -> Running {
    let qmp = format!("unix:{}", socket.display());
    start([&[command, "--qmp", &qmp], more].concat())
}
