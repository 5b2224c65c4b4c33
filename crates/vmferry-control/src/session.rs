//! One client's conversation.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::arguments;
use crate::commands::{self, Handler};
use crate::error::{ErrorClass, QmpError};
use crate::events::EventBus;
use crate::framing::{Frame, Framer};
use crate::message::{self, Request};
use crate::outbox::{Closed, Outbox};
use crate::schema::{CommandInfo, VersionInfo};

/// Bytes that a request may have.
const REQUEST_LIMIT: usize = 1024 * 1024;

/// The commands that the server answers itself, as they are about the conversation.
const OWN_COMMANDS: [&str; 3] = ["qmp_capabilities", "query-version", "query-commands"];

/// Arguments of `qmp_capabilities`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QmpCapabilities {
    enable: Option<Vec<String>>,
}

/// What the conversation needs to know.
pub(crate) struct Session {
    handler: Arc<dyn Handler>,
    events: EventBus,
    outbox: Arc<Outbox>,
    negotiated: bool,
}

impl Session {
    /// A conversation that begins.
    pub(crate) fn new(handler: Arc<dyn Handler>, events: EventBus, outbox: Arc<Outbox>) -> Self {
        Session {
            handler,
            events,
            outbox,
            negotiated: false,
        }
    }

    /// The reader thread's work: greets, then answers until the client goes, breaks the limits, or `stop` is set.
    /// Calls `heard` when the client has said something.
    pub(crate) fn run(mut self, mut stream: UnixStream, stop: &AtomicBool, heard: impl Fn()) {
        let mut result = self
            .outbox
            .push_reply(message::greeting(&VersionInfo::current()));
        let mut framer = Framer::new(REQUEST_LIMIT);
        let mut buffer = [0; 16 * 1024];
        while result.is_ok() {
            let length = match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::debug!(%error, "QMP client is gone");
                    break;
                }
            };
            heard();
            framer.push(&buffer[..length], |frame| {
                if result.is_ok() && !stop.load(Ordering::Relaxed) {
                    result = self.answer(frame);
                }
            });
        }
    }

    fn answer(&mut self, frame: Frame) -> Result<(), Closed> {
        match frame {
            Frame::Value(value) => {
                let (id, request) = message::open_request(value);
                let was_negotiated = self.negotiated;
                let outcome = request.and_then(|request| self.execute(&request));
                self.outbox.push_reply(message::reply(id, outcome))?;
                if self.negotiated && !was_negotiated {
                    // Only now, so that no event gets ahead of the reply.
                    self.events.subscribe(&self.outbox);
                }
                Ok(())
            }
            Frame::Malformed(description) => self.complain(description),
            Frame::Excessive(description) => {
                tracing::warn!(description, "QMP client disconnected");
                self.complain(description)?;
                Err(Closed)
            }
        }
    }

    fn complain(&self, description: String) -> Result<(), Closed> {
        let error = QmpError::generic(description);
        self.outbox.push_reply(message::reply(None, Err(error)))
    }

    fn execute(&mut self, request: &Request) -> Result<Value, QmpError> {
        let Request { command, arguments } = request;
        match (command.as_str(), self.negotiated) {
            ("qmp_capabilities", false) => self.negotiate(arguments),
            ("qmp_capabilities", true) => Err(QmpError::new(
                ErrorClass::CommandNotFound,
                "Capabilities negotiation is already complete, command ignored",
            )),
            (_, false) => Err(QmpError::new(
                ErrorClass::CommandNotFound,
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )),
            ("query-version", true) => {
                commands::no_arguments(arguments)?;
                Ok(json!(VersionInfo::current()))
            }
            ("query-commands", true) => {
                commands::no_arguments(arguments)?;
                Ok(OWN_COMMANDS
                    .into_iter()
                    .chain(commands::names())
                    .map(|name| json!(CommandInfo { name: name.into() }))
                    .collect())
            }
            (name, true) => commands::dispatch(self.handler.as_ref(), name, arguments),
        }
    }

    fn negotiate(&mut self, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
        let QmpCapabilities { enable } = arguments::decode(arguments)?;
        if let Some(name) = enable.unwrap_or_default().first() {
            return Err(QmpError::generic(format!(
                "Parameter 'enable' does not accept value '{name}'"
            )));
        }
        self.negotiated = true;
        Ok(Value::Null)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Also when a handler panicked: the client is not left waiting for an answer.
        self.outbox.finish();
    }
}
