//! The error a QMP command answers with.

use serde::{Deserialize, Serialize};

/// QEMU's error classes. Clients are told to look at the class only where it is not [`ErrorClass::GenericError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// No such command, or not at this point of the conversation.
    CommandNotFound,
    /// The device exists and cannot do this now.
    DeviceNotActive,
    /// No such device.
    DeviceNotFound,
    /// The host's KVM lacks something that the command needs.
    KVMMissingCap,
}

/// A command's failure: a class for programs and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// What programs may act on.
    pub class: ErrorClass,
    /// What people read: what was attempted, on what, and what they can do.
    pub desc: String,
}

impl QmpError {
    /// An error of the given class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        QmpError {
            class,
            desc: desc.into(),
        }
    }

    /// An error of class [`ErrorClass::GenericError`], the usual one.
    pub fn generic(desc: impl Into<String>) -> Self {
        QmpError::new(ErrorClass::GenericError, desc)
    }
}
