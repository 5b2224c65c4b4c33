//! Everything that makes up a guest beside its RAM, out and in.
//!
//! Each kind of state is a section of its own: `vmferry/cpu` for each vCPU, then one each of
//! `vmferry/irqchip`, `vmferry/pit`, `vmferry/clock`, `vmferry/serial`, `vmferry/acpi-ged` and `vmferry/power`, and one
//! for each virtio device (`vmferry/virtio-blk` and so on). A section's data is
//! [`postcard`]; KVM's structures are in it as the kernel lays them out, which is stable. Data from a stream is
//! hostile: whatever it holds gives a value or an error.

use std::fmt::Display;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmferry_engine::seam::{DeviceState, GuestError};

pub(crate) mod clock;
pub(crate) mod cpu;
pub(crate) mod events;
pub(crate) mod irqchip;
pub(crate) mod machine;
pub(crate) mod msrs;
pub(crate) mod power;
pub(crate) mod serial;
pub(crate) mod virtio;

/// A kind of section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SectionKind {
    pub name: &'static str,
    pub version: u32,
}

impl SectionKind {
    /// A section of this kind.
    pub fn encode<T: Serialize>(self, instance: u32, value: &T) -> Result<DeviceState, GuestError> {
        let data = postcard::to_stdvec(value).map_err(|e| self.error(instance, "save", e))?;
        Ok(DeviceState {
            idstr: self.name.to_owned(),
            instance_id: instance,
            version_id: self.version,
            data,
        })
    }

    /// What a section of this kind holds.
    pub fn decode<T: DeserializeOwned>(self, section: &DeviceState) -> Result<T, GuestError> {
        let instance = section.instance_id;
        if section.version_id != self.version {
            let why = format!(
                "it has format version {}, this vmferry knows version {}: use the same vmferry release on both \
                 hosts",
                section.version_id, self.version
            );
            return Err(self.error(instance, "load", why));
        }
        let (value, rest) = postcard::take_from_bytes(&section.data)
            .map_err(|e| self.error(instance, "load", e))?;
        if !rest.is_empty() {
            let why = format!("{} bytes follow its end", rest.len());
            return Err(self.error(instance, "load", why));
        }
        Ok(value)
    }

    /// An error that names the section.
    pub fn error(self, instance: u32, attempted: &str, why: impl Display) -> GuestError {
        GuestError(format!(
            "cannot {attempted} section '{}' (instance {instance}): {why}",
            self.name
        ))
    }
}

/// The sections of a stream, each found once.
pub(crate) struct Sections<'a> {
    unused: Vec<&'a DeviceState>,
}

impl<'a> Sections<'a> {
    pub fn new(sections: &'a [DeviceState]) -> Self {
        Sections {
            unused: sections.iter().collect(),
        }
    }

    /// Takes the section of `kind` with number `instance` and decodes it.
    pub fn take<T: DeserializeOwned>(
        &mut self,
        kind: SectionKind,
        instance: u32,
    ) -> Result<T, GuestError> {
        let position = self
            .unused
            .iter()
            .position(|s| s.idstr == kind.name && s.instance_id == instance)
            .ok_or_else(|| kind.error(instance, "load", "the source has not sent it"))?;
        kind.decode(self.unused.swap_remove(position))
    }

    /// Refuses what nobody has taken: unknown sections, duplicates, instances too many.
    pub fn finish(self) -> Result<(), GuestError> {
        match self.unused.first() {
            None => Ok(()),
            Some(section) => Err(GuestError(format!(
                "the source has sent section '{}' (instance {}), which this machine has no place for: it is \
                 unknown, a duplicate, or one device too many",
                section.idstr.escape_debug(),
                section.instance_id
            ))),
        }
    }
}
