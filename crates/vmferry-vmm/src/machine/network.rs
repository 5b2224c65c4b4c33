//! The machine's network interfaces, and how they tell their networks where the guest is.

use std::sync::MutexGuard;

use super::Machine;
use crate::config::{MacAddress, NetBackend};
use crate::error::MachineError;
use crate::virtio::Announcement;

/// A network interface, for its user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicInfo {
    /// Its name.
    pub id: String,
    /// Its address.
    pub mac: MacAddress,
    /// What it is connected to.
    pub backend: NetBackend,
}

impl Machine {
    /// The network interfaces.
    pub fn nics(&self) -> Vec<NicInfo> {
        let info = |nic: crate::config::Nic<'_>| NicInfo {
            id: nic.id,
            mac: nic.mac,
            backend: nic.backend.clone(),
        };
        self.config.nics().map(info).collect()
    }

    /// Chooses how the guest is announced when it arrives here.
    pub fn set_announcement(&self, announcement: Announcement) {
        *self.announcement() = announcement;
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
        let announcement = *self.announcement();
        self.announce(announcement, None)
            .expect("no interface is named");
    }

    fn announcement(&self) -> MutexGuard<'_, Announcement> {
        self.announcement
            .lock()
            .expect("no holder of the announcement panics")
    }
}
