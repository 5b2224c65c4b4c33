//! QMP, the monitor protocol of QEMU: a server that any QMP client can drive, and a client.
//!
//! - [`Handler`] is what a machine implements: one typed method per command. Names and units are those of QEMU 10,
//!   with extensions under `x-vmferry-`; the types are in [`schema`].
//! - [`QmpServer`] listens on a unix socket and calls the handler; [`EventBus`] carries what happens to every client.
//! - [`QmpClient`] is a blocking client with a timeout on everything.
//! - [`units`] reads and writes sizes, bandwidths and durations the way people write them.
//!
//! Where it differs from QEMU, on purpose: there is no out-of-band execution; an address that is no
//! [`Uri`](vmferry_engine::Uri) is refused in that type's words, and ports and descriptors
//! are numbers; a negative number is never taken for a huge one; and a request is limited to 1 MiB and 100 levels, beyond which the connection is closed after an error.
//!
//! After malformed JSON the server answers `JSON parse error, ...` and reads on behind it: behind the closing bracket,
//! the word, or the line that a string was left open on. A client that has lost its place sends the byte 0xFF, which
//! drops what is pending.

mod arguments;
mod client;
mod commands;
mod error;
mod events;
mod framing;
mod json;
mod message;
mod outbox;
pub mod schema;
mod server;
mod session;
pub mod units;

pub use client::{ClientError, QmpClient, ReceivedEvent};
pub use commands::Handler;
pub use error::{ErrorClass, QmpError};
pub use events::EventBus;
pub use message::Timestamp;
pub use server::QmpServer;
pub use vmferry_socket::{Problem, SocketError};
