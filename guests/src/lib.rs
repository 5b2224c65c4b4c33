//! Payload guests: small freestanding programs for the virtual machines that vmferry moves.
//!
//! They are PVH ELF images, built with this crate and embedded in it. They need no disk, no firmware
//! and no kernel, start in milliseconds, and check their own memory, so that a migration that loses a
//! page is caught by its guest. `vmferry run --kernel guest:NAME` runs one; what it prints once a
//! second is read with [`Heartbeat::parse`].
//!
//! ```
//! let elf = vmferry_guests::find("dirtier").unwrap();
//! assert_eq!(elf[..4], *b"\x7fELF");
//!
//! let line = "dirtier: vcpu=0 t=12 written=600000 verified=612345 corrupt=0 gap_us=1234 \
//!             maxgap_us=56789 sweeps=1 rate=50000";
//! let heartbeat = vmferry_guests::Heartbeat::parse(line).unwrap();
//! assert_eq!(heartbeat.corrupt, 0);
//! ```

mod parse;

#[path = "../payload/dirtier/heartbeat.rs"]
mod heartbeat;

#[cfg(test)]
mod payload;

pub use heartbeat::{Heartbeat, Hints};

/// A payload guest.
#[derive(Clone, Copy)]
pub struct Guest {
    /// What it is called on command lines, as `guest:NAME`.
    pub name: &'static str,
    /// What it does, in one line.
    pub about: &'static str,
    /// The image: a 64-bit ELF with a PVH entry note.
    pub elf: &'static [u8],
}

/// All payload guests.
pub const GUESTS: &[Guest] = &[Guest {
    name: "dirtier",
    about: "rewrites its memory at a chosen rate and verifies all of it",
    elf: include_bytes!(concat!(env!("OUT_DIR"), "/dirtier")),
}];

/// The image of the guest of that name.
pub fn find(name: &str) -> Option<&'static [u8]> {
    let guest = GUESTS.iter().find(|guest| guest.name == name)?;
    Some(guest.elf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_found_by_name() {
        assert!(find("dirtier").is_some());
        assert!(find("no such guest").is_none());
    }

    /// Reads `N` little-endian bytes as a number.
    fn number<const N: usize>(elf: &[u8], at: usize) -> usize {
        elf[at..at + N]
            .iter()
            .rev()
            .fold(0, |all, &byte| all << 8 | usize::from(byte))
    }

    #[test]
    fn images_load_at_1_mib_and_have_a_pvh_entry() {
        const PT_LOAD: usize = 1;
        const PT_NOTE: usize = 4;
        for guest in GUESTS {
            let elf = guest.elf;
            let (mut loads, mut notes) = (Vec::new(), Vec::new());
            for index in 0..number::<2>(elf, 56) {
                let header = number::<8>(elf, 32) + index * number::<2>(elf, 54);
                let offset = number::<8>(elf, header + 8);
                let physical = number::<8>(elf, header + 24);
                match number::<4>(elf, header) {
                    PT_LOAD => loads.push(physical..physical + number::<8>(elf, header + 40)),
                    PT_NOTE => notes.push(offset),
                    _ => {}
                }
            }
            assert_eq!(loads.iter().map(|load| load.start).min(), Some(1 << 20));
            let note = notes[0];
            assert_eq!(number::<4>(elf, note + 8), 18, "XEN_ELFNOTE_PHYS32_ENTRY");
            assert_eq!(elf[note + 12..note + 16], *b"Xen\0");
            let entry = number::<8>(elf, note + 16);
            assert!(loads.iter().any(|load| load.contains(&entry)));
        }
    }
}
