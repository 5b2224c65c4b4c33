//! Network interfaces.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A network interface of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// What it is connected to.
    pub backend: NetBackend,
    /// Its name; without one it is called after its place, `net0` and so on.
    pub id: Option<String>,
    /// Its address; without one it is [`MacAddress::default_of`] its place. A guest keeps it where it goes, so give one
    /// wherever guests share a network.
    pub mac: Option<MacAddress>,
}

/// What a network interface is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBackend {
    /// A TAP interface of the host, which must be there. The host computes checksums and cuts segments for the guest.
    Tap(String),
    /// A Unix stream socket that somebody listens on: each frame behind its length, 32 bits in network order, as QEMU
    /// and passt do. It is connected again when the connection is lost.
    UnixStream(PathBuf),
    /// A Unix datagram socket: a frame is a datagram.
    UnixDatagram {
        /// Where frames are sent to.
        remote: PathBuf,
        /// Where they come from, a socket that is made; without one the kernel gives it a name.
        local: Option<PathBuf>,
    },
}

/// A network interface with all that may be left out.
pub(crate) struct Nic<'a> {
    pub id: String,
    pub mac: MacAddress,
    pub backend: &'a NetBackend,
}

impl NetBackend {
    /// Whether checksums and segments may be left to it.
    pub(crate) fn offloads(&self) -> bool {
        matches!(self, NetBackend::Tap(_))
    }
}

/// The address of a network interface, which no other in its network may have.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address of interface number `place` of a machine that was given none: QEMU's, 52:54:00:12:34:56 and those
    /// that follow.
    pub fn default_of(place: usize) -> Self {
        MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56u8.wrapping_add(place as u8)])
    }

    /// Its bytes, in the order of the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is no address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no address of an interface: use six bytes in hexadecimal, as 52:54:00:12:34:56, the first of them even"
)]
pub struct BadMacAddress(String);

impl FromStr for MacAddress {
    type Err = BadMacAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadMacAddress(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| digits)
                .ok_or_else(bad)?;
        }
        // The lowest bit of the first byte says that many are meant.
        match parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6] {
            true => Ok(MacAddress(bytes)),
            false => Err(bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_six_bytes_of_one_interface() {
        let text = "52:54:00:ab:CD:ef";
        let mac: MacAddress = text.parse().unwrap();
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
        assert_eq!(mac.to_string(), text.to_lowercase());
        assert_eq!(MacAddress::default_of(1).to_string(), "52:54:00:12:34:57");
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:+5",
            "53:54:00:12:34:56",
            "00:00:00:00:00:00",
            "52-54-00-12-34-56",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }
}
