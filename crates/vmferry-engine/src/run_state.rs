//! The section that tells whether a guest arrives running or paused.

use vmferry_wire::DeviceState;

use crate::seam::{Activity, GuestError};

/// Name of the section; vmferry's counterpart of QEMU's `globalstate`.
pub(crate) const IDSTR: &str = "vmferry/run-state";
const VERSION: u32 = 1;

pub(crate) fn encode(activity: Activity) -> DeviceState {
    DeviceState {
        idstr: IDSTR.to_owned(),
        instance_id: 0,
        version_id: VERSION,
        data: match activity {
            Activity::Running => b"running".to_vec(),
            Activity::Paused => b"paused".to_vec(),
        },
    }
}

pub(crate) fn decode(state: &DeviceState) -> Result<Activity, GuestError> {
    match (state.version_id, state.data.as_slice()) {
        (VERSION, b"running") => Ok(Activity::Running),
        (VERSION, b"paused") => Ok(Activity::Paused),
        (version, _) => Err(GuestError(format!(
            "section {IDSTR} (version {version}) is not one that this vmferry understands: use the same \
             version of vmferry on both sides"
        ))),
    }
}
