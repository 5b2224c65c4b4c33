//! The return path: a thread that listens to the destination.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use vmferry_wire::{ReturnPathError, ReturnPathMessage};

use crate::error::MigrationError;
use crate::transport::Channel;

type Word = Result<ReturnPathMessage, ReturnPathError>;

/// What the destination says, as it says it.
pub(super) struct ReturnPath {
    words: Receiver<Word>,
    channel: Channel,
    reader: Option<JoinHandle<()>>,
}

impl ReturnPath {
    /// Starts listening on a two-way channel.
    pub(super) fn open(channel_to_read: &Channel) -> std::io::Result<Self> {
        let reading = channel_to_read.try_clone()?;
        let (sender, words) = channel();
        let reader = std::thread::Builder::new()
            .name("return-path".to_owned())
            .spawn(move || {
                loop {
                    let word = ReturnPathMessage::read_from(&mut &reading);
                    let last = matches!(word, Err(_) | Ok(ReturnPathMessage::Shut(_)));
                    if sender.send(word).is_err() || last {
                        return;
                    }
                }
            })?;
        Ok(ReturnPath {
            words,
            channel: channel_to_read.try_clone()?,
            reader: Some(reader),
        })
    }

    /// Fails if the destination has given up. Nothing else is said before the hand-over.
    pub(super) fn check(&self) -> Result<(), MigrationError> {
        match self.words.try_recv() {
            Ok(word) => Err(self.refusal(word)),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => Ok(()),
        }
    }

    /// The better reason for an error of our own: a destination that gives up says why and closes the
    /// channel, and often the closing is noticed first.
    pub(super) fn explain(&self, error: MigrationError) -> MigrationError {
        if !matches!(error, MigrationError::Connection { .. }) {
            return error;
        }
        /// How long its words may be behind the closing.
        const GRACE: Duration = Duration::from_millis(500);
        match self.words.recv_timeout(GRACE) {
            Ok(word @ Ok(ReturnPathMessage::Error(_))) => self.refusal(word),
            _ => error,
        }
    }

    /// Waits for the next message, for at most `timeout`. `what` completes "the destination has ...".
    pub(super) fn wait(
        &self,
        timeout: Duration,
        what: &'static str,
    ) -> Result<ReturnPathMessage, MigrationError> {
        match self.words.recv_timeout(timeout) {
            Ok(Ok(ReturnPathMessage::Error(why))) => Err(MigrationError::Refused(why)),
            Ok(Ok(message)) => Ok(message),
            Ok(Err(e)) => Err(e.into()),
            Err(RecvTimeoutError::Timeout) => Err(MigrationError::PeerTimeout {
                what,
                waited: timeout,
            }),
            Err(RecvTimeoutError::Disconnected) => Err(ReturnPathError::Closed.into()),
        }
    }

    /// What a message means that came when none was expected.
    fn refusal(&self, word: Word) -> MigrationError {
        match word {
            Ok(ReturnPathMessage::Error(why)) => MigrationError::Refused(why),
            Ok(other) => MigrationError::Refused(format!("unexpected answer {other:?}")),
            Err(e) => e.into(),
        }
    }
}

impl Drop for ReturnPath {
    fn drop(&mut self) {
        self.channel.shutdown();
        if let Some(reader) = self.reader.take() {
            // A panic there has ended the words, and that was noticed.
            let _ = reader.join();
        }
    }
}
