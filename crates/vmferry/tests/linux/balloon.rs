//! Linux and its balloon: what it has freed is not sent, and what it is asked for it gives back.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::PathBuf;

use serde_json::{Value, json};
use vmferry_control::schema::RunState;
use vmferry_rig::{Debian, Initramfs, RigError};

use crate::common::lab::Lab;
use crate::common::vm::Vm;
use crate::common::{eventually, say};
use crate::host;

const MACHINE: [&str; 4] = ["--memory", "256M", "--balloon", "free-page-reporting=on"];
const INCOMING: [&str; 2] = ["--incoming", "tcp:127.0.0.1:0"];
const MEMORY: u64 = 256 << 20;
/// What the guest should at least tell of the 112 MiB that it has freed, and of what it has never used.
const TOLD: u64 = 64 << 20;

/// The guest's initial RAM disk.
pub fn initrd(debian: &Debian, lab: &Lab) -> Result<PathBuf, RigError> {
    let path = lab.path("balloon.cpio");
    let mut initramfs = Initramfs::new(debian, include_str!("balloon.sh"))?;
    initramfs.module("virtio_mmio")?.module("virtio_balloon")?;
    let file = File::create(&path).expect("the test's directory is writable");
    initramfs.write(BufWriter::new(file))?;
    Ok(path)
}

/// Waits until the guest has said, where it is now, so often that all is well.
#[track_caller]
fn verifies(vm: &Vm, times: usize) {
    eventually("Linux to verify its memory", || {
        let text = fs::read_to_string(&vm.serial).ok()?;
        let complaint = text.contains("linux: corrupt") || text.contains("linux: kernel=");
        assert!(!complaint, "{text}");
        (text.matches("linux: verified").count() >= times).then_some(())
    });
}

/// Asks the guest to make do with so many bytes, and waits until it does.
fn resize(vm: &mut Vm, bytes: u64) {
    vm.execute("balloon", json!({"value": bytes}));
    eventually("the balloon", || {
        let info = vm.execute("query-balloon", Value::Null);
        (info["actual"] == bytes).then_some(())
    });
}

#[test]
fn free_memory_is_not_sent_and_is_given_back() {
    let test = "free_memory_is_not_sent_and_is_given_back";
    let Some((lab, images)) = host::lab(test) else {
        return;
    };
    let kernel = images.kernel.display().to_string();
    let initrd = images.balloon.display().to_string();
    let cmdline = "console=ttyS0 panic=-1 quiet";
    let what = ["--kernel", &kernel, "--initrd", &initrd];
    let cmdline = ["--cmdline", cmdline, "--no-reboot"];
    let mut source = Vm::start(&lab, &[&MACHINE[..], &what, &cmdline].concat());
    verifies(&source, 1);
    eventually("statistics", || {
        let info = source.execute("query-balloon", Value::Null);
        let free = info["x-vmferry-stats"]["free-memory"].as_u64()?;
        (free > TOLD).then_some(())
    });

    // Slow enough for the guest to say what is free before it is sent.
    source.set_parameters(json!({"max-bandwidth": 20 << 20}));
    let mut destination = Vm::start(&lab, &[&MACHINE[..], &INCOMING].concat());
    let info = source.migrate(&destination.uri());
    destination.wait_for_state(RunState::Running);
    let ram = info.ram.expect("it is over");
    let told = ram.x_vmferry_hinted_pages * ram.page_size;
    assert!(told > TOLD, "{ram:?}");
    verifies(&destination, 2);

    resize(&mut destination, MEMORY - (64 << 20));
    verifies(&destination, 4);
    resize(&mut destination, MEMORY);
    verifies(&destination, 6);
    say(&format!(
        "{test}: {} MiB were not sent, {} MiB were; corrupt 0",
        told >> 20,
        ram.transferred >> 20
    ));
}
