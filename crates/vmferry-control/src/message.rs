//! The envelope: what surrounds a command, a reply, an event.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::QmpError;
use crate::schema::{Event, VersionInfo};

/// A command as it came in.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) command: String,
    pub(crate) arguments: Map<String, Value>,
}

/// Takes a request apart. The `id` is given back beside the result, so that an error can carry it as well.
///
/// # Errors
/// QEMU's sentences about what is wrong with the envelope.
pub(crate) fn open_request(value: Value) -> (Option<Value>, Result<Request, QmpError>) {
    let Value::Object(mut members) = value else {
        let error = QmpError::generic("QMP input must be a JSON object");
        return (None, Err(error));
    };
    let id = members.shift_remove("id");
    (id, open_members(members))
}

fn open_members(mut members: Map<String, Value>) -> Result<Request, QmpError> {
    let member = |name: &str, complaint: &str| {
        QmpError::generic(format!("QMP input member '{name}' {complaint}"))
    };
    let command = members.shift_remove("execute");
    let arguments = members.shift_remove("arguments");
    if let Some(name) = members.keys().next() {
        return Err(member(name, "is unexpected"));
    }
    let command = match command {
        Some(Value::String(command)) => command,
        Some(_) => return Err(member("execute", "must be a string")),
        None => return Err(QmpError::generic("QMP input lacks member 'execute'")),
    };
    let arguments = match arguments {
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(member("arguments", "must be an object")),
        None => Map::new(),
    };
    Ok(Request { command, arguments })
}

/// A reply, ready to send.
pub(crate) fn reply(id: Option<Value>, outcome: Result<Value, QmpError>) -> Vec<u8> {
    let mut message = match outcome {
        // QMP has no null: a command without a result answers with an empty object.
        Ok(Value::Null) => json!({"return": {}}),
        Ok(value) => json!({"return": value}),
        Err(error) => json!({"error": error}),
    };
    if let Some(id) = id {
        message["id"] = id;
    }
    line(&message)
}

/// The first message on a connection. No capability is offered: there is no out-of-band execution.
pub(crate) fn greeting(version: &VersionInfo) -> Vec<u8> {
    line(&json!({"QMP": {"version": version, "capabilities": []}}))
}

/// A command, ready to send.
pub(crate) fn command(name: &str, arguments: &Value, id: u64) -> Vec<u8> {
    match arguments {
        Value::Null => line(&json!({"execute": name, "id": id})),
        arguments => line(&json!({"execute": name, "arguments": arguments, "id": id})),
    }
}

/// When something happened, by the sender's wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00 UTC; -1 where the sender's clock failed.
    pub seconds: i64,
    /// Microseconds on top of the seconds; -1 where the sender's clock failed.
    pub microseconds: i64,
}

impl Timestamp {
    fn now() -> Self {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(elapsed) => Timestamp {
                seconds: elapsed.as_secs() as i64,
                microseconds: elapsed.subsec_micros().into(),
            },
            Err(_) => Timestamp {
                seconds: -1,
                microseconds: -1,
            },
        }
    }
}

#[derive(Serialize)]
struct Occurrence<'a> {
    timestamp: Timestamp,
    #[serde(flatten)]
    event: &'a Event,
}

/// An event that happens now, ready to send.
pub(crate) fn event(event: &Event) -> Vec<u8> {
    line(&Occurrence {
        timestamp: Timestamp::now(),
        event,
    })
}

fn line(message: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(message).expect("the schema's types have string keys only");
    bytes.extend_from_slice(b"\r\n");
    bytes
}
