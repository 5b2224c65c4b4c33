//! A destination that cannot take the guest says why to the source's user, and the guest runs on.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::mmap::MmapRegion;
use vmferry_dirty::{DirtyLog, PAGE_SIZE};
use vmferry_engine::seam::{Activity, DeviceState, Guest, GuestError, PauseError};
use vmferry_engine::{Destination, RamBlock};

use crate::common::{any_port, move_on, parameters, running_guest, send};
use crate::toy::{PAGES, Quiet, Toy};

/// A toy that differs from its source in one thing.
struct Odd {
    toy: Arc<Toy>,
    ram: Option<Vec<RamBlock>>,
    description: Option<&'static str>,
    devices: Option<&'static str>,
}

impl Odd {
    fn new() -> Self {
        Odd {
            toy: Toy::new(),
            ram: None,
            description: None,
            devices: None,
        }
    }

    fn with_ram(blocks: &[(&str, usize)]) -> Self {
        let block = |&(name, pages): &(&str, usize)| {
            let region: Arc<MmapRegion> = Arc::new(MmapRegion::new(pages * PAGE_SIZE).unwrap());
            // SAFETY: the region is mapped as long as the Arc lives, and nobody else reaches it.
            unsafe { RamBlock::new(name, region.as_ptr(), pages * PAGE_SIZE, region.clone()) }
                .unwrap()
        };
        Odd {
            ram: Some(blocks.iter().map(block).collect()),
            ..Odd::new()
        }
    }
}

fn refuse(why: Option<&str>) -> Result<(), GuestError> {
    why.map_or(Ok(()), |why| Err(GuestError::new(why)))
}

impl Guest for Odd {
    fn ram(&self) -> &[RamBlock] {
        self.ram.as_deref().unwrap_or(self.toy.ram())
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        self.toy.dirty_log()
    }

    fn describe(&self) -> Result<DeviceState, GuestError> {
        self.toy.describe()
    }

    fn check_description(&self, _: &DeviceState) -> Result<(), GuestError> {
        refuse(self.description)
    }

    fn pause(&self, limit: Duration) -> Result<Activity, PauseError> {
        self.toy.pause(limit)
    }

    fn resume(&self, was: Activity) -> Result<(), GuestError> {
        self.toy.resume(was)
    }

    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError> {
        self.toy.save_devices()
    }

    fn load_devices(&self, _: &[DeviceState]) -> Result<(), GuestError> {
        refuse(self.devices)
    }

    fn start(&self, _: Activity, _: Duration) -> Result<(), GuestError> {
        panic!("a misfit is started");
    }
}

/// Migrates to `odd`. Every one of `wanted` must be in the source's error, and all of the destination's.
fn is_refused(odd: Odd, wanted: &[&str]) {
    let here = running_guest();
    let odd = Arc::new(odd);
    let incoming = Destination::start(odd, &any_port(), Box::new(Quiet)).unwrap();
    let outgoing = send(&here, incoming.uri(), parameters());
    let at_source = outgoing.wait().unwrap_err().to_string();
    let at_destination = incoming.wait().unwrap_err().to_string();
    for words in wanted {
        assert!(
            at_source.contains(words),
            "'{words}' is not in: {at_source}"
        );
    }
    assert_eq!(
        at_source,
        format!("the destination refused: {at_destination}")
    );
    here.run_some();
    move_on(&here, parameters()).stop_and_verify();
}

#[test]
fn another_size_of_ram() {
    let (less, more) = (PAGES - 1, PAGES + 64);
    is_refused(Odd::with_ram(&[("toy.ram", less)]), &["toy.ram"]);
    is_refused(Odd::with_ram(&[("toy.ram", more)]), &["toy.ram"]);
}

#[test]
fn another_block_name() {
    let odd = Odd::with_ram(&[("other.ram", PAGES)]);
    is_refused(odd, &["\"toy.ram\"", "does not exist here"]);
}

#[test]
fn another_number_of_blocks() {
    is_refused(
        Odd::with_ram(&[("toy.ram", PAGES), ("more.ram", 1)]),
        &["more.ram"],
    );
}

#[test]
fn another_machine() {
    let why = "the source has 4 vCPUs, this machine 2; start the destination with --cpus 4";
    let odd = Odd {
        description: Some(why),
        ..Odd::new()
    };
    is_refused(odd, &[why]);
}

#[test]
fn devices_that_do_not_fit() {
    let why = "vmferry/toy-cpu holds 9 bytes, not 8";
    let odd = Odd {
        devices: Some(why),
        ..Odd::new()
    };
    is_refused(odd, &[why]);
}
