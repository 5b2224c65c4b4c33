//! Changes of the balloon, for the monitor's clients: at most one a second, as in QEMU, and always the last.

use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::Context;
use vmferry_control::EventBus;
use vmferry_control::schema::{BalloonChangeData, Event};

/// Between two events.
const PAUSE: Duration = Duration::from_secs(1);

/// Where the machine sends how many bytes of RAM its guest has left.
pub fn changes(events: EventBus) -> anyhow::Result<Sender<u64>> {
    let (sender, changes) = channel();
    std::thread::Builder::new()
        .name("balloon events".to_owned())
        .spawn(move || {
            while let Ok(first) = changes.recv() {
                let actual = changes.try_iter().last().unwrap_or(first);
                events.emit(Event::BalloonChange(BalloonChangeData { actual }));
                std::thread::sleep(PAUSE);
            }
        })
        .context("cannot start a thread")?;
    Ok(sender)
}
