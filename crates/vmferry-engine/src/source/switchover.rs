//! The switch-over: the last pages, the devices, and the guest itself change sides.

use std::time::{Duration, Instant};

use vmferry_dirty::DirtyTracker;
use vmferry_wire::{Command, DescribedSection, ReturnPathMessage, vm_description};

use super::driver::{Driver, Hold, MACHINE_TYPE};
use super::precopy::Pace;
use super::writer::Flushed;
use crate::error::{CONNECTION_LOST, MigrationError};
use crate::run_state;
use crate::wait::Wait;

impl Driver<'_> {
    /// Sends what is left of the paused guest: pages, then devices.
    pub(super) fn send_the_rest(&mut self, tracker: &DirtyTracker) -> Result<(), MigrationError> {
        self.writer.command(Command::SwitchoverStart);
        // Saving may write to guest memory, so the last look at the dirty log comes after it (law 1).
        let waiting = self.shared.waits.begin(Wait::DeviceState);
        let mut states = self.guest.save_devices()?;
        drop(waiting);
        if let Hold::Paused { was, .. } = self.hold {
            states.push(run_state::encode(was));
        }
        self.sync(tracker)?;
        self.pass(tracker, Pace::Unlimited)?;
        self.writer.put(|e, out| {
            e.ram_end(out);
            e.end_of_ram_records(out);
        });
        for state in &states {
            self.writer.device(state)?;
        }
        let sections: Vec<_> = states.iter().map(DescribedSection::from).collect();
        let description = vm_description(MACHINE_TYPE, &sections);
        if self.return_path.is_some() {
            self.writer
                .put(|e, out| e.vm_description(out, &description))?;
        } else {
            self.writer.put(|e, out| {
                e.eof(out);
                e.vm_description(out, &description)
            })?;
        }
        match self.bound() {
            None => self.flush_all()?,
            Some(bound) => {
                while self.flush(Some(Instant::now() + bound.left()))? == Flushed::Partly {
                    bound.check("not taken the state of its devices")?;
                }
            }
        }
        self.publish(tracker);
        Ok(())
    }

    /// Waits until the destination has loaded the guest.
    fn wait_until_loaded(&mut self, timeout: Duration) -> Result<(), MigrationError> {
        let bound = self.bound();
        let _waiting = self.shared.waits.begin(Wait::Loaded);
        let return_path = self.return_path.as_ref().expect("somebody is asked");
        let what = "not said that it has loaded the guest";
        match return_path.wait(&mut self.meter, timeout, bound, what)? {
            ReturnPathMessage::HandoverLoaded => Ok(()),
            other => Err(MigrationError::Refused(format!(
                "unexpected answer {other:?} instead of a guest that is loaded"
            ))),
        }
    }

    /// Gives the guest away, once the destination has said that it has all of it.
    ///
    /// Whatever fails before [`give_away`](super::shared::Shared::give_away) leaves the guest ours. From
    /// there on the destination may be running it, and only its answer tells: without one, the guest stays
    /// paused here and its user decides. A one-way stream has nobody to ask: what is left to do when all of it is
    /// written is its transport's ([`Outgoing::finish`](crate::transport::Outgoing::finish)).
    pub(super) fn hand_over(&mut self) -> Result<(), MigrationError> {
        if self.return_path.is_none() {
            return Ok(());
        }
        let timeout = self.shared.parameters().peer_timeout;
        let loaded = self.wait_until_loaded(timeout);
        let given_away = loaded.and_then(|()| match self.shared.give_away() {
            true => Ok(()),
            false => Err(MigrationError::Cancelled),
        });
        if let Err(error) = given_away {
            // A destination that has loaded the guest would else keep its copy, in doubt. If it cannot be
            // told at once, it is in doubt, and does not run it either.
            self.writer.command(Command::HandoverKeep);
            let _ = self.flush(Some(Instant::now()));
            return Err(error);
        }
        self.writer.command(Command::HandoverRun);
        self.writer.put(|e, out| e.eof(out));
        let undecided = |why: String| MigrationError::Undecided {
            what: CONNECTION_LOST,
            peer: "destination",
            why,
        };
        self.flush_all().map_err(|e| undecided(e.to_string()))?;
        let return_path = self.return_path.as_ref().expect("checked above");
        let _waiting = self.shared.waits.begin(Wait::Confirmation);
        match return_path.wait(
            &mut self.meter,
            timeout,
            None,
            "not confirmed that the guest runs",
        ) {
            Ok(ReturnPathMessage::Shut(0)) => Ok(()),
            Ok(other) => Err(undecided(format!("unexpected answer {other:?}"))),
            Err(e) => Err(undecided(e.to_string())),
        }
    }
}
