//! The return path: a thread that listens to the destination.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_wire::{ReturnPathError, ReturnPathMessage};

use super::bandwidth::{BandwidthMeter, MOST_PINGS};
use super::standstill::Standstill;
use crate::error::MigrationError;
use crate::transport::Channel;

/// What was said, and when it was heard.
type Word = (Result<ReturnPathMessage, ReturnPathError>, Instant);

/// What the destination says, as it says it.
pub(super) struct ReturnPath {
    words: Receiver<Word>,
    channel: Channel,
    reader: Option<JoinHandle<()>>,
}

impl ReturnPath {
    /// Starts listening on a two-way channel.
    pub(super) fn open(channel_to_read: &Channel) -> std::io::Result<Self> {
        /// More than a destination has to say before it is listened to: answers to PINGs, and why it gives up.
        const MOST_WORDS: usize = MOST_PINGS + 4;
        // All that can fail comes before the thread, which nothing would end if something did.
        let reading = channel_to_read.try_clone()?;
        let channel = channel_to_read.try_clone()?;
        let (sender, words) = sync_channel(MOST_WORDS);
        let reader = std::thread::Builder::new()
            .name("return-path".to_owned())
            .spawn(move || {
                loop {
                    let word = ReturnPathMessage::read_from(&mut &reading);
                    let last = matches!(word, Err(_) | Ok(ReturnPathMessage::Shut(_)));
                    // The first of too many words is refused when it is read; the others need not be kept.
                    if sender.try_send((word, Instant::now())).is_err() || last {
                        return;
                    }
                }
            })?;
        Ok(ReturnPath {
            words,
            channel,
            reader: Some(reader),
        })
    }

    /// Takes note of the answers to PINGs that have come. Fails if the destination has given up: it says nothing else
    /// before the hand-over.
    pub(super) fn check(&self, meter: &mut BandwidthMeter) -> Result<(), MigrationError> {
        loop {
            match self.words.try_recv() {
                Ok((word, at)) => {
                    if let Some(other) = hear(word, at, meter)? {
                        return Err(unexpected(&other));
                    }
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(()),
            }
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
            Ok((Ok(ReturnPathMessage::Error(why)), _)) => MigrationError::Refused(why),
            _ => error,
        }
    }

    /// Waits until all PINGs are answered.
    pub(super) fn wait_for_pongs(
        &self,
        meter: &mut BandwidthMeter,
        timeout: Duration,
    ) -> Result<(), MigrationError> {
        while meter.unanswered() > 0 {
            let (word, at) = self.next(timeout, None, "not answered")?;
            if let Some(other) = hear(word, at, meter)? {
                return Err(unexpected(&other));
            }
        }
        Ok(())
    }

    /// Waits for the next message that is no answer to a PING. Fails when for `timeout` neither a message nor any of what
    /// was sent before has come through, and at the moment `until`. `what` completes "the destination has ...".
    pub(super) fn wait(
        &self,
        meter: &mut BandwidthMeter,
        timeout: Duration,
        until: Option<Standstill>,
        what: &'static str,
    ) -> Result<ReturnPathMessage, MigrationError> {
        loop {
            let (word, at) = self.next(timeout, until, what)?;
            if let Some(message) = hear(word, at, meter)? {
                return Ok(message);
            }
        }
    }

    fn next(
        &self,
        timeout: Duration,
        until: Option<Standstill>,
        what: &'static str,
    ) -> Result<Word, MigrationError> {
        /// How often to look whether something moves.
        const LOOK: Duration = Duration::from_millis(100);
        let mut unsent = self.channel.unsent();
        let mut still_since = Instant::now();
        loop {
            let mut wait = LOOK.min(timeout);
            if let Some(until) = until {
                wait = wait.min(until.left());
            }
            match self.words.recv_timeout(wait) {
                Ok(word) => return Ok(word),
                Err(RecvTimeoutError::Disconnected) => return Err(ReturnPathError::Closed.into()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(until) = until {
                until.check(what)?;
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
}

/// Takes note of an answer to a PING; gives back what else was said, unless it is that the destination gives up.
fn hear(
    word: Result<ReturnPathMessage, ReturnPathError>,
    at: Instant,
    meter: &mut BandwidthMeter,
) -> Result<Option<ReturnPathMessage>, MigrationError> {
    match word? {
        ReturnPathMessage::Error(why) => Err(MigrationError::Refused(why)),
        ReturnPathMessage::Pong(number) if meter.ponged(number, at) => Ok(None),
        other => Ok(Some(other)),
    }
}

/// What a message means that came when none was expected.
fn unexpected(message: &ReturnPathMessage) -> MigrationError {
    MigrationError::Refused(format!("unexpected answer {message:?}"))
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
