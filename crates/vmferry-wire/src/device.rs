//! Device state, opaque to the stream.

/// State of one device, as it travels in a FULL section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Name of the device in the stream, for example `vmferry/cpu`; at most 255 bytes, and it begins with
    /// `vmferry/`, which tells a reader that an explicit length follows.
    pub idstr: String,
    /// Which of several devices of that name.
    pub instance_id: u32,
    /// Version of the format of `data`; a reader refuses versions that it does not know.
    pub version_id: u32,
    /// The state, in the device's own encoding; at most [`crate::limits::DEVICE_STATE`] bytes.
    pub data: Vec<u8>,
}
