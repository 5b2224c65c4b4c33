//! The JSON description of a stream's sections.

use serde_json::json;

use crate::DeviceState;
use crate::format::PAGE_SIZE;

/// One FULL section, as the description lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescribedSection {
    /// idstr of the section.
    pub idstr: String,
    /// Which of several of that name.
    pub instance_id: u32,
    /// Version of its format.
    pub version_id: u32,
    /// Bytes of its state.
    pub size: usize,
}

impl From<&DeviceState> for DescribedSection {
    fn from(state: &DeviceState) -> Self {
        DescribedSection {
            idstr: state.idstr.clone(),
            instance_id: state.instance_id,
            version_id: state.version_id,
            size: state.data.len(),
        }
    }
}

/// The JSON for [`crate::Encoder::vm_description`], in the form that QEMU's stream tools read.
///
/// `machine` is the name given to [`crate::Encoder::configuration`]. Each section has the two fields that it has on the wire: a length and a buffer of that many bytes.
#[must_use]
pub fn vm_description<'a>(
    machine: &str,
    sections: impl IntoIterator<Item = &'a DescribedSection>,
) -> String {
    let devices: Vec<_> = sections
        .into_iter()
        .map(|s| {
            json!({
                "name": s.idstr,
                "instance_id": s.instance_id,
                "vmsd_name": s.idstr,
                "version": s.version_id,
                "fields": [
                    {"name": "length", "type": "uint32", "size": 4},
                    {"name": "state", "type": "buffer", "size": s.size},
                ],
            })
        })
        .collect();
    json!({
        "configuration": {
            "vmsd_name": "configuration",
            "version": 1,
            "fields": [
                {"name": "len", "type": "uint32", "size": 4},
                {"name": "name", "type": "buffer", "size": machine.len()},
            ],
        },
        "page_size": PAGE_SIZE,
        "devices": devices,
    })
    .to_string()
}
