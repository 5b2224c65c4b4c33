//! A place for one test: a directory for its sockets and files, removed at its end.

use std::cell::Cell;
use std::path::PathBuf;

use tempfile::TempDir;
use vmferry_testing::host::{has_kvm, skip};

use super::command::vmferry;

/// One test's directory, and the names of its processes.
pub struct Lab {
    dir: TempDir,
    processes: Cell<usize>,
}

impl Lab {
    /// None, loudly, where no guest can run.
    pub fn new() -> Option<Self> {
        has_kvm().then(Lab::without_kvm)
    }

    /// None, loudly, where no guest can run or KVM has no dirty ring.
    pub fn with_dirty_ring() -> Option<Self> {
        let lab = Lab::new()?;
        let nothing = lab.uri("file", "nothing");
        let machine = ["run", "--serial", "null", "--dirty-log", "ring"];
        // The machine is built first; that nothing arrives shows that it could be.
        let words = vmferry([&machine[..], &["--incoming", &nothing]].concat()).failed();
        if words.contains("no dirty ring") {
            skip(&words);
            return None;
        }
        assert!(words.contains("No such file"), "{words}");
        Some(lab)
    }

    /// For tests of which none of the guests runs.
    pub fn without_kvm() -> Self {
        // Not below the target directory: paths of sockets are short.
        let dir = tempfile::Builder::new().prefix("vmferry-test-").tempdir();
        Lab {
            dir: dir.expect("a temporary directory"),
            processes: Cell::new(0),
        }
    }

    /// A file of this test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same, behind a prefix such as `unix:`.
    pub fn uri(&self, scheme: &str, name: &str) -> String {
        format!("{scheme}:{}", self.path(name).display())
    }

    /// A name that no other process of this test has.
    pub(super) fn new_name(&self) -> String {
        let number = self.processes.get();
        self.processes.set(number + 1);
        format!("vm{number}")
    }
}
