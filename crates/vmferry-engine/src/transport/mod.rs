//! Transports: `tcp:`, `unix:`, `fd:`, `exec:` and `file:`, each ending in a [`Channel`].

mod channel;
mod incoming;
mod outgoing;
mod tcp;
mod unix;
mod uri;

use std::io;

pub use channel::{Channel, ChannelKind, Waited};
pub use incoming::Listener;
pub use outgoing::Outgoing;
pub use uri::{Uri, UriError};

/// A transport that could not be opened, used or closed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {uri}: {source}{}", advice(uri, source))]
pub struct TransportError {
    /// What was attempted, as a verb phrase ("connect to").
    pub action: &'static str,
    /// On what.
    pub uri: Uri,
    /// Why it failed.
    pub source: io::Error,
}

/// What the user can do about an error, where the error's own words do not say it.
fn advice(uri: &Uri, error: &io::Error) -> &'static str {
    match (error.kind(), uri) {
        (io::ErrorKind::ConnectionRefused, _) => {
            "; is the destination started with --incoming there?"
        }
        // Whether somebody listens is not tried: a destination takes the first connection for its source's.
        (io::ErrorKind::AddrInUse, Uri::Unix(_)) => {
            "; remove it if it was left behind by one that is gone"
        }
        (io::ErrorKind::AddrInUse, _) => {
            "; choose another port, or port 0 to let the system choose"
        }
        (io::ErrorKind::StorageFull, _) => "; free some space and migrate again",
        _ => "",
    }
}

impl TransportError {
    fn on<'a>(
        action: &'static str,
        uri: &'a Uri,
    ) -> impl Fn(io::Error) -> TransportError + use<'a> {
        move |source| TransportError {
            action,
            uri: uri.clone(),
            source,
        }
    }
}
