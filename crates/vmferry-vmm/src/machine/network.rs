//! The machine's network interfaces, and how they tell their networks where the guest is.

use std::sync::MutexGuard;

use super::Machine;
use crate::error::MachineError;
use crate::virtio::Announcement;

impl Machine {
    /// How the guest is announced when it arrives here.
    pub fn announcement(&self) -> Announcement {
        *self.lock_announcement()
    }

    /// Chooses how the guest is announced when it arrives here.
    pub fn set_announcement(&self, announcement: Announcement) {
        *self.lock_announcement() = announcement;
    }

    fn lock_announcement(&self) -> MutexGuard<'_, Announcement> {
        self.announcement
            .lock()
            .expect("no holder of the announcement panics")
    }

    /// Has the interfaces of these names, or all, tell their networks where the guest is: each sends a reverse ARP
    /// request in each round of `announcement`. While the guest stands still they wait.
    ///
    /// # Errors
    /// There is no interface of one of the names; none is announced then.
    pub fn announce(
        &self,
        announcement: Announcement,
        interfaces: Option<&[String]>,
    ) -> Result<(), MachineError> {
        let nics: Vec<String> = self.config.nics().map(|nic| nic.id).collect();
        let unknown = interfaces.and_then(|ids| ids.iter().find(|id| !nics.contains(id)));
        if let Some(id) = unknown {
            return Err(MachineError::Config(format!(
                "cannot announce the interface '{id}': {}",
                match nics.is_empty() {
                    true => "the machine has none".to_owned(),
                    false => format!("the machine has {}", nics.join(", ")),
                }
            )));
        }
        for (place, id) in nics.iter().enumerate() {
            if interfaces.is_none_or(|ids| ids.contains(id)) {
                self.devices.announce(place, announcement);
            }
        }
        Ok(())
    }

    /// The guest has arrived here.
    pub(crate) fn announce_arrival(&self) {
        self.announce(self.announcement(), None)
            .expect("no interface is named");
    }
}
