//! A blocking QMP client.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmferry_socket::{Problem, SocketError};

use crate::error::QmpError;
use crate::framing::{Frame, Framer};
use crate::message::{self, Timestamp};
use crate::schema::{DirtyRateInfo, Event, MigrationInfo, StatusInfo, VersionInfo};

/// Bytes that a reply may have. QEMU's description of its own schema takes a few hundred thousand.
const REPLY_LIMIT: usize = 16 * 1024 * 1024;

/// Events kept for [`QmpClient::next_event`]; beyond that the oldest go.
const MAX_EVENTS: usize = 4096;

/// What went wrong, on which socket, with which command.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no connection to be had.
    #[error(
        "cannot connect to the QMP socket {path}: {source}; is the VM running, and is this its --qmp socket?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path cannot be a socket's.
    #[error(transparent)]
    Path(SocketError),
    /// No answer came in time.
    #[error(
        "no answer to {command} on the QMP socket {path} within {timeout:?}; is the VM stuck, or another client using its monitor?"
    )]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The command, or `the connection`.
        command: String,
        /// How long was waited.
        timeout: Duration,
    },
    /// The connection ended.
    #[error("the QMP socket {path} was closed during {command}: {source}; did the VM end?")]
    Closed {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: String,
        /// How it ended.
        source: io::Error,
    },
    /// What came is not QMP.
    #[error(
        "unexpected answer to {command} on the socket {path}: {problem}; is this a QMP socket?"
    )]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The VM refused the command.
    #[error("{command} failed on the VM at {path}: {error}")]
    Command {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: String,
        /// The VM's answer.
        error: QmpError,
    },
}

/// An event as it came in, which may be one that this crate does not know.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ReceivedEvent {
    /// Its name.
    pub event: String,
    /// Its data, null if it has none.
    #[serde(default)]
    pub data: Value,
    /// When it happened, by the VM's host.
    pub timestamp: Timestamp,
}

impl ReceivedEvent {
    /// The event, if it is one that this crate knows.
    pub fn known(&self) -> Option<Event> {
        let mut parts = serde_json::json!({"event": self.event});
        if !self.data.is_null() {
            parts["data"] = self.data.clone();
        }
        serde_json::from_value(parts).ok()
    }
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: VersionInfo,
}

/// A connection to a VM's monitor.
#[derive(Debug)]
pub struct QmpClient {
    path: PathBuf,
    stream: UnixStream,
    framer: Framer,
    /// Cut out of the stream and not looked at yet.
    messages: VecDeque<Frame>,
    events: VecDeque<ReceivedEvent>,
    last_id: u64,
    timeout: Duration,
    version: VersionInfo,
}

impl QmpClient {
    /// Connects and negotiates. `timeout` bounds this call, and each command later on.
    ///
    /// # Errors
    /// There is no such socket, nobody listens or answers, or what answers is not QMP.
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let deadline = Instant::now() + timeout;
        let stream = vmferry_socket::connect(path, timeout).map_err(|problem| match problem {
            Problem::PathTooLong(_) => ClientError::Path(problem.on("connect to", path)),
            problem => ClientError::Connect {
                path: path.to_owned(),
                source: problem.into(),
            },
        })?;
        let mut client = QmpClient {
            path: path.to_owned(),
            stream,
            framer: Framer::new(REPLY_LIMIT),
            messages: VecDeque::new(),
            events: VecDeque::new(),
            last_id: 0,
            timeout,
            version: VersionInfo::current(),
        };
        let greeting = client
            .receive(deadline, "the connection")?
            .ok_or_else(|| client.timed_out("the connection"))?;
        let Greeting { qmp } = client.convert("the connection", greeting)?;
        client.version = qmp.version;
        client.execute_until("qmp_capabilities", &Value::Null, deadline)?;
        Ok(client)
    }

    /// What the VM said it is.
    pub fn version(&self) -> &VersionInfo {
        &self.version
    }

    /// Executes a command and waits for its answer. `arguments` is an object, or null for none. Events that come in
    /// meanwhile are kept for [`QmpClient::next_event`].
    ///
    /// # Errors
    /// The VM's own error, or no answer within the timeout given to [`QmpClient::connect`]. After
    /// [`ClientError::Timeout`] the command may still be executed; a late answer to it is passed over.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.execute_until(command, &arguments, Instant::now() + self.timeout)
    }

    /// The migration's state and numbers.
    ///
    /// # Errors
    /// As for [`QmpClient::execute`].
    pub fn query_migrate(&mut self) -> Result<MigrationInfo, ClientError> {
        let command = "query-migrate";
        let answer = self.execute(command, Value::Null)?;
        self.convert(command, answer)
    }

    /// Whether the VM runs.
    ///
    /// # Errors
    /// As for [`QmpClient::execute`].
    pub fn query_status(&mut self) -> Result<StatusInfo, ClientError> {
        let command = "query-status";
        let answer = self.execute(command, Value::Null)?;
        self.convert(command, answer)
    }

    /// The current or the last measurement of the dirty rate, with times in milliseconds.
    ///
    /// # Errors
    /// As for [`QmpClient::execute`]; also if the measurement failed.
    pub fn query_dirty_rate(&mut self) -> Result<DirtyRateInfo, ClientError> {
        let command = "query-dirty-rate";
        let answer = self.execute(
            command,
            serde_json::json!({"calc-time-unit": "millisecond"}),
        )?;
        self.convert(command, answer)
    }

    /// The next event, waiting for it up to `timeout`; none if none came.
    ///
    /// # Errors
    /// The connection ended, or something that is not QMP came.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<ReceivedEvent>, ClientError> {
        let command = "waiting for events";
        let deadline = Instant::now() + timeout;
        while self.events.is_empty() {
            let Some(message) = self.receive(deadline, command)? else {
                return Ok(None);
            };
            // An answer here is one that came too late for its command.
            self.keep_event(command, message)?;
        }
        Ok(self.events.pop_front())
    }

    fn execute_until(
        &mut self,
        command: &str,
        arguments: &Value,
        deadline: Instant,
    ) -> Result<Value, ClientError> {
        self.last_id += 1;
        let request = message::command(command, arguments, self.last_id);
        self.send(command, &request, deadline)?;
        while let Some(message) = self.receive(deadline, command)? {
            let Some(mut answer) = self.keep_event(command, message)? else {
                continue;
            };
            // An answer to an earlier command that was given up is passed over.
            if answer.get("id").is_none_or(|id| *id == self.last_id) {
                if let Some(result) = answer.get_mut("return") {
                    return Ok(result.take());
                }
                let Some(error) = answer.get_mut("error").map(Value::take) else {
                    return Err(self.not_qmp(command, &"it is neither a result nor an error"));
                };
                return Err(ClientError::Command {
                    path: self.path.clone(),
                    command: command.to_owned(),
                    error: self.convert(command, error)?,
                });
            }
        }
        Err(self.timed_out(command))
    }

    /// Puts an event aside; gives back anything else.
    fn keep_event(&mut self, command: &str, message: Value) -> Result<Option<Value>, ClientError> {
        if message.get("event").is_none() {
            return Ok(Some(message));
        }
        if self.events.len() == MAX_EVENTS {
            tracing::warn!(
                MAX_EVENTS,
                "QMP events are not fetched: the oldest is dropped"
            );
            self.events.pop_front();
        }
        let event = self.convert(command, message)?;
        self.events.push_back(event);
        Ok(None)
    }

    fn send(
        &mut self,
        command: &str,
        mut request: &[u8],
        deadline: Instant,
    ) -> Result<(), ClientError> {
        while !request.is_empty() {
            let sent = remaining(deadline).and_then(|remaining| {
                self.stream.set_write_timeout(Some(remaining))?;
                self.stream.write(request)
            });
            match sent {
                Ok(length) => request = &request[length..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => {
                    // Part of the request may be on its way: what comes behind it would not be understood.
                    let _ = self.stream.shutdown(std::net::Shutdown::Both);
                    return Err(self.timed_out(command));
                }
                Err(error) => return Err(self.closed(command, error)),
            }
        }
        Ok(())
    }

    fn receive(&mut self, deadline: Instant, command: &str) -> Result<Option<Value>, ClientError> {
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.messages.pop_front() {
                Some(Frame::Value(value)) => return Ok(Some(value)),
                Some(Frame::Malformed(problem) | Frame::Excessive(problem)) => {
                    return Err(self.not_qmp(command, &problem));
                }
                None => {}
            }
            let read = remaining(deadline).and_then(|remaining| {
                self.stream.set_read_timeout(Some(remaining))?;
                self.stream.read(&mut buffer)
            });
            match read {
                Ok(0) => return Err(self.closed(command, io::ErrorKind::UnexpectedEof.into())),
                Ok(length) => {
                    let messages = &mut self.messages;
                    self.framer
                        .push(&buffer[..length], |frame| messages.push_back(frame));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => return Ok(None),
                Err(error) => return Err(self.closed(command, error)),
            }
        }
    }

    fn convert<T: DeserializeOwned>(&self, command: &str, value: Value) -> Result<T, ClientError> {
        serde_json::from_value(value).map_err(|error| self.not_qmp(command, &error))
    }

    fn not_qmp(&self, command: &str, problem: &dyn std::fmt::Display) -> ClientError {
        ClientError::Protocol {
            path: self.path.clone(),
            command: command.to_owned(),
            problem: problem.to_string(),
        }
    }

    fn timed_out(&self, command: &str) -> ClientError {
        ClientError::Timeout {
            path: self.path.clone(),
            command: command.to_owned(),
            timeout: self.timeout,
        }
    }

    fn closed(&self, command: &str, source: io::Error) -> ClientError {
        ClientError::Closed {
            path: self.path.clone(),
            command: command.to_owned(),
            source,
        }
    }
}

/// What is left until `deadline`. A timeout of zero would be no timeout to the system.
fn remaining(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        remaining => Ok(remaining),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
