//! A place for one test: a directory for its sockets and files, removed at its end.

use std::cell::Cell;
use std::path::PathBuf;

use tempfile::TempDir;

use super::say;

/// One test's directory, and the names of its processes.
pub struct Lab {
    dir: TempDir,
    processes: Cell<usize>,
}

impl Lab {
    /// None, loudly, where no guest can run.
    pub fn new() -> Option<Self> {
        if let Err(error) = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
        {
            let test = std::thread::current();
            let test = test.name().unwrap_or("a test").to_owned();
            say(&format!("SKIPPED: {test}: no /dev/kvm here: {error}"));
            return None;
        }
        Some(Lab::without_kvm())
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
