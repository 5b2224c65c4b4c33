//! Linux and its disk: it is moved while its requests are under way.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::PathBuf;

use serde_json::Value;
use vmferry_control::schema::RunState;
use vmferry_rig::{Debian, Initramfs, RigError};

use crate::common::lab::Lab;
use crate::common::vm::Vm;
use crate::common::{eventually, say};
use crate::host;

const HOPS: usize = 3;
const WORKERS: usize = 4;

/// The guest's initial RAM disk.
pub fn initrd(debian: &Debian, lab: &Lab) -> Result<PathBuf, RigError> {
    let path = lab.path("disk.cpio");
    let mut initramfs = Initramfs::new(debian, include_str!("disk.sh"))?;
    initramfs.module("virtio_mmio")?.module("virtio_blk")?;
    let file = File::create(&path).expect("the test's directory is writable");
    initramfs.write(BufWriter::new(file))?;
    Ok(path)
}

/// Waits until every worker of the guest has said, where it is now, so often that what it reads is what it wrote.
#[track_caller]
fn verifies(vm: &Vm, times: usize) {
    eventually("Linux to verify its disk", || {
        let text = fs::read_to_string(&vm.serial).ok()?;
        let complaint = text.contains("linux: corrupt") || text.contains("linux: kernel=");
        assert!(!complaint, "{text}");
        let often = |worker| text.matches(&format!("linux: verified {worker}")).count() >= times;
        (0..WORKERS).all(often).then_some(())
    });
}

#[test]
fn a_busy_disk_moves_with_its_guest() {
    let test = "a_busy_disk_moves_with_its_guest";
    let Some((lab, images)) = host::lab(test) else {
        return;
    };
    let image = lab.path("image");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let disk = format!("path={},id=root", image.display());
    let machine = ["--memory", "256M", "--cpus", "2", "--disk", &disk];
    let kernel = images.kernel.display().to_string();
    let initrd = images.disk.display().to_string();
    let cmdline = "console=ttyS0 panic=-1 quiet";
    let what = ["--kernel", &kernel, "--initrd", &initrd];
    let cmdline = ["--cmdline", cmdline, "--no-reboot"];
    let mut vm = Vm::start(&lab, &[&machine[..], &what, &cmdline].concat());
    verifies(&vm, 1);
    let boot = fs::read_to_string(&vm.serial).unwrap();
    assert!(boot.contains("serial=root block=512"), "{boot}");
    let disks = vm.execute("query-block", Value::Null);
    let io = disks[0]["inserted"]["x-vmferry-io"].clone();
    let mut longest = 0;
    for _ in 0..HOPS {
        let incoming = ["--incoming", "tcp:127.0.0.1:0"];
        let mut destination = Vm::start(&lab, &[&machine[..], &incoming].concat());
        let info = vm.migrate(&destination.uri());
        longest = longest.max(info.x_vmferry_downtime_us.expect("it is known at the end"));
        destination.wait_for_state(RunState::Running);
        assert!(vm.quit().success());
        vm = destination;
        verifies(&vm, 2);
    }
    say(&format!(
        "{test}: {HOPS} migrations; requests by {io}; longest downtime {} ms; corrupt 0",
        longest / 1000
    ));
}
