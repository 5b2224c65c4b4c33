//! Why a migration did not succeed.

use std::io;

use vmferry_dirty::LogError;
use vmferry_wire::{EncodeError, LayoutError, ReturnPathError, StreamError};

use crate::seam::GuestError;
use crate::transport::TransportError;

/// What leaves a hand-over undecided, unless its user does.
pub(crate) const CONNECTION_LOST: &str = "the connection was lost";

/// What the user can do when the kernel gives this process no more descriptors, threads or processes.
fn resource_advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "; raise the process's limit on open files (ulimit -n)",
        Some(libc::ENFILE) => "; the host's limit on open files is reached (fs.file-max)",
        Some(libc::EAGAIN) => {
            "; raise the limit on threads and processes (ulimit -u, pids.max of the control group)"
        }
        _ => "",
    }
}

/// Why a migration failed, on either side. Unless it is [`Undecided`](MigrationError::Undecided) or
/// [`NotResumed`](MigrationError::NotResumed), the source's guest goes on as before, and the destination's never ran.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The transport could not be opened or completed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The connection broke.
    #[error("the connection to the {peer} broke: {source}; the guest goes on where it was")]
    Connection {
        /// "source" or "destination".
        peer: &'static str,
        /// The kernel's words.
        source: io::Error,
    },
    /// Nothing moved for too long.
    #[error(
        "the destination has {what} for {} ms (x-vmferry-peer-timeout); is it stopped, or the network down?",
        waited.as_millis()
    )]
    PeerTimeout {
        /// What the destination did not do.
        what: &'static str,
        /// For how long.
        waited: std::time::Duration,
    },
    /// The guest stood still for too long, and was taken back.
    #[error(
        "the guest stood still for {} ms, and the destination has {what}: it goes on where it was. A pause may take 3 times \
         the downtime-limit ({} ms), and two seconds at least; is the network or the destination too slow?",
        time.as_millis(), limit.as_millis()
    )]
    PauseTooLong {
        /// For how long.
        time: std::time::Duration,
        /// What the destination did not do.
        what: &'static str,
        /// The downtime limit.
        limit: std::time::Duration,
    },
    /// This process could not get what it needs.
    #[error("cannot {what}: {source}{}", resource_advice(source))]
    Resources {
        /// What was attempted.
        what: &'static str,
        /// The kernel's words.
        source: io::Error,
    },
    /// The destination said why it cannot take the guest.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// The destination's words made no sense, or it left without any.
    #[error(transparent)]
    ReturnPath(#[from] ReturnPathError),
    /// The source's stream is damaged, cut or not for this machine.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The virtual machine could not do its part.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The dirty log failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The guest does not fit into a stream.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The guest's RAM blocks do not fit into a stream.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The user cancelled.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The source was cancelled or failed after the guest had been loaded here, and said so.
    #[error("the source has kept its guest: the migration was cancelled there, or failed")]
    Kept,
    /// The connection was lost while the guest changed hands, or the user cancelled when a command had all of it: nobody can
    /// know from here whether it runs on the other side. It stays paused on this side.
    #[error(
        "{what} during the hand-over ({why}); the guest is paused here. If it runs on the \
         {peer}, quit this one; if it does not, continue it here with 'cont'"
    )]
    Undecided {
        /// What happened: "the connection was lost".
        what: &'static str,
        /// "source" or "destination".
        peer: &'static str,
        /// How.
        why: String,
    },
    /// The guest stayed on the source, but cannot go on there. It is paused.
    #[error(
        "{failure}. Yet the guest cannot go on here: {why}. It is paused; continue it with 'cont' when that has changed"
    )]
    NotResumed {
        /// Why the migration failed.
        failure: Box<MigrationError>,
        /// Why the guest cannot go on.
        why: GuestError,
    },
}
