//! The return path: a thread that listens to the destination.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
        /// More than a destination has to say before it is listened to.
        const MOST_WORDS: usize = 8;
        let (sender, words) = sync_channel(MOST_WORDS);
        let reader = std::thread::Builder::new()
            .name("return-path".to_owned())
            .spawn(move || {
                loop {
                    let word = ReturnPathMessage::read_from(&mut &reading);
                    let last = matches!(word, Err(_) | Ok(ReturnPathMessage::Shut(_)));
                    // The first of too many words is refused when it is read; the others need not be kept.
                    if sender.try_send(word).is_err() || last {
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

    /// Waits for the next message. Fails when for `timeout` neither the message nor any of what was sent
    /// before has come through. `what` completes "the destination has ...".
    pub(super) fn wait(
        &self,
        timeout: Duration,
        what: &'static str,
    ) -> Result<ReturnPathMessage, MigrationError> {
        /// How often to look whether something moves.
        const LOOK: Duration = Duration::from_millis(100);
        let mut unsent = self.channel.unsent();
        let mut still_since = Instant::now();
        loop {
            match self.words.recv_timeout(LOOK.min(timeout)) {
                Ok(Ok(ReturnPathMessage::Error(why))) => return Err(MigrationError::Refused(why)),
                Ok(Ok(message)) => return Ok(message),
                Ok(Err(e)) => return Err(e.into()),
                Err(RecvTimeoutError::Disconnected) => return Err(ReturnPathError::Closed.into()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now_unsent = self.channel.unsent();
            if now_unsent != std::mem::replace(&mut unsent, now_unsent) {
                still_since = Instant::now();
            } else if still_since.elapsed() >= timeout {
                return Err(MigrationError::PeerTimeout {
                    what,
                    waited: timeout,
                });
            }
        }
    }

    /// Waits for the answer to PING `number`.
    pub(super) fn wait_for_pong(
        &self,
        number: u32,
        timeout: Duration,
    ) -> Result<(), MigrationError> {
        match self.wait(timeout, "not answered")? {
            ReturnPathMessage::Pong(n) if n == number => Ok(()),
            other => Err(self.refusal(Ok(other))),
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
