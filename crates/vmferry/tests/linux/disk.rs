//! A disk with a file system that is looked after from outside when the guest is gone.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use crate::LOST;
use crate::common::PATIENCE;
use crate::common::command::{Finished, Running};
use crate::common::lab::Lab;
use crate::common::say;
use crate::host::tool;

/// What of e2fsprogs is used.
pub const TOOLS: [&str; 3] = ["mke2fs", "e2fsck", "debugfs"];

const SIZE: u64 = 32 << 20;

/// What the file system must have for this to be a test of it: a journal, and sums of its own structures.
const FEATURES: &str = "has_journal,extent,metadata_csum";

/// The image of a disk.
pub struct Disk<'a> {
    lab: &'a Lab,
    image: PathBuf,
}

fn run(name: &str, args: &[&str]) -> Finished {
    let program = tool(name).expect("it was there before");
    Running::start(Command::new(program).args(args)).finish_within(PATIENCE)
}

/// What a check says that finds everything in order.
#[track_caller]
fn whole(check: Finished) -> String {
    assert!(check.status.success(), "{LOST}{check:?}");
    check.stdout
}

impl<'a> Disk<'a> {
    /// A disk with an empty ext4. None, loudly, where nobody can make one.
    pub fn make(lab: &'a Lab, test: &str) -> Option<Self> {
        if let Some(missing) = TOOLS.into_iter().find(|name| tool(name).is_none()) {
            say(&format!(
                "SKIPPED: {test}: there is no {missing}: install the package e2fsprogs"
            ));
            return None;
        }
        let image = lab.path("disk");
        let file = File::create(&image).expect("the test's directory is writable");
        file.set_len(SIZE).expect("there is room");
        let path = image.to_str().expect("its path is UTF-8");
        let made = run("mke2fs", &["-q", "-t", "ext4", "-O", FEATURES, path]);
        made.succeeded();
        Some(Disk { lab, image })
    }

    /// The option of `vmferry run`.
    pub fn option(&self) -> String {
        format!("path={},id=data", self.image.display())
    }

    /// The file system is in order, and the files in it are what their sums say. Returns how many files that are.
    #[track_caller]
    pub fn check(&self) -> usize {
        let image = self.image.to_str().expect("its path is UTF-8");
        whole(run("e2fsck", &["-n", "-f", image]));
        let content = self.lab.path("content");
        fs::create_dir(&content).expect("the test's directory is writable");
        let dump = format!("rdump / {}", content.display());
        run("debugfs", &["-R", &dump, image]).succeeded();
        let mut check = Command::new("sh");
        check
            .args(["-c", "cat *.sum | sha256sum -c"])
            .current_dir(&content);
        let checked = Running::start(&mut check).finish_within(PATIENCE);
        whole(checked)
            .lines()
            .filter(|line| line.ends_with(": OK"))
            .count()
    }
}
