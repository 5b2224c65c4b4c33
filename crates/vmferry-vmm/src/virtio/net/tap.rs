//! A TAP interface of the host: frames that the guest sends come in there, frames that go out there reach the guest.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use linux_raw_sys::if_tun::{
    IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6,
};
use linux_raw_sys::ioctl::{TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ};
use virtio_bindings::virtio_net as net;

use super::HEADER;
use super::link::{Frame, Link, incoming, must_wait};
use crate::error::MachineError;
use crate::virtio::Watch;

/// An interface's name, with the zero behind it, has room for this.
const NAME: usize = libc::IFNAMSIZ;

/// The interface, held by us alone.
pub(super) struct Tap {
    file: File,
    id: String,
    /// Whether the host has removed it.
    gone: bool,
}

/// What the guest takes, by virtio's feature, and what the kernel is told then.
const OFFLOADS: [(u32, u32); 4] = [
    (net::VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (net::VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (net::VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (net::VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
];

impl Tap {
    /// Takes the interface `name` for the guest's interface `id`.
    pub fn open(name: &str, id: &str) -> Result<Self, MachineError> {
        let failed = |source| MachineError::Os {
            action: format!("connect the interface '{id}' to the TAP interface '{name}'"),
            source,
        };
        let refuse = |why: String| {
            Err(MachineError::Config(format!(
                "the interface '{id}' cannot be connected to '{name}': {why}"
            )))
        };
        let zero_ended = match CString::new(name) {
            Ok(name) if (1..NAME).contains(&name.count_bytes()) => name,
            _ => return refuse(format!("a name has 1 to {} characters", NAME - 1)),
        };
        // The kernel would make one, which nobody has set up, and remove it when we end.
        // SAFETY: the call reads a string up to its zero, which `zero_ended` is.
        if unsafe { libc::if_nametoindex(zero_ended.as_ptr()) } == 0 {
            return refuse(format!(
                "there is no such interface; make it with 'ip tuntap add dev {name} mode tap user USER' and set it up"
            ));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(failed)?;
        match attach(&file, name) {
            Ok(()) => Ok(Tap {
                file,
                id: id.to_owned(),
                gone: false,
            }),
            Err(e) if e.kind() == ErrorKind::ResourceBusy => {
                refuse("another process uses it".into())
            }
            Err(e) if e.kind() == ErrorKind::PermissionDenied => refuse(format!(
                "it belongs to somebody else; make it with 'ip tuntap add dev {name} mode tap user USER', or run as root"
            )),
            Err(e) if e.kind() == ErrorKind::InvalidInput => refuse(
                "it is no TAP interface with one queue; make it with 'ip tuntap add dev NAME mode tap'".into(),
            ),
            Err(e) => Err(failed(e)),
        }
    }
}

/// Makes `file` the other end of the interface `name`; frames come and go behind a header of virtio.
fn attach(file: &File, name: &str) -> io::Result<()> {
    // SAFETY: all of the structure may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as libc::c_short;
    let header = HEADER as libc::c_int;
    // SAFETY: the first call reads and writes one `ifreq`, the second reads one `int`; both are there.
    unsafe {
        check(libc::ioctl(
            file.as_raw_fd(),
            TUNSETIFF.into(),
            &mut request,
        ))?;
        check(libc::ioctl(
            file.as_raw_fd(),
            TUNSETVNETHDRSZ.into(),
            &header,
        ))
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl Link for Tap {
    fn activate(&mut self, features: u64) {
        if self.gone {
            return;
        }
        let offloads = OFFLOADS
            .iter()
            .filter(|(feature, _)| features & 1 << feature != 0)
            .fold(0, |all, (_, offload)| all | offload);
        // SAFETY: the call takes a number, and has no effect on this process's memory.
        let done = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                TUNSETOFFLOAD.into(),
                libc::c_ulong::from(offloads),
            )
        };
        if let Err(error) = check(done) {
            tracing::warn!(id = self.id, %error, "the host will not leave checksums and segments to the guest");
        }
    }

    fn receive(&mut self, frame: &mut Frame) -> bool {
        match frame.fill(|room| self.file.read(room)) {
            Ok(()) => !frame.is_empty(),
            Err(error) => {
                if error.raw_os_error() == Some(libc::EBADFD) && !self.gone {
                    self.gone = true;
                    tracing::error!(
                        id = self.id,
                        "the TAP interface of an interface is gone, which is unplugged now"
                    );
                } else if !must_wait(&error) {
                    tracing::debug!(id = self.id, %error, "a frame is lost");
                }
                false
            }
        }
    }

    fn send(&mut self, frame: &[u8]) {
        // It takes a frame as a whole, or none of it. It refuses what is no frame, and while the interface is down.
        if let Err(error) = self.file.write(frame) {
            tracing::debug!(id = self.id, %error, "a frame is lost");
        }
    }

    fn watches(&self, wanted: bool) -> Vec<Watch> {
        // One that is gone would always have something to tell.
        match wanted && !self.gone {
            true => vec![incoming(self.file.as_raw_fd())],
            false => Vec::new(),
        }
    }
}
