//! The toy's dirty log made as demanding as a hypervisor's: reading and arming it are two steps, and a write
//! that comes between them is forgotten.

use std::sync::{Arc, Mutex};

use vmferry_dirty::{BlockIndex, DirtyLog, LogError, PageRange};
use vmferry_engine::seam::Guest;

use crate::toy::{PAGES, Toy};

/// Reports a page at every fetch until it is armed (law 3).
pub struct ArmingLog {
    toy: Arc<Toy>,
    /// Written, and not armed since.
    written: Mutex<Vec<u64>>,
}

impl ArmingLog {
    pub fn new(toy: &Arc<Toy>) -> Self {
        ArmingLog {
            toy: toy.clone(),
            written: Mutex::new(vec![0; PAGES.div_ceil(64)]),
        }
    }
}

impl DirtyLog for ArmingLog {
    fn start(&self) -> Result<(), LogError> {
        // As KVM's with initially-set: there is nothing that could be clean before it was armed once.
        self.written.lock().unwrap().fill(u64::MAX);
        self.toy.dirty_log().start()
    }

    fn stop(&self) -> Result<(), LogError> {
        let mut written = self.written.lock().unwrap();
        self.toy.dirty_log().fetch(BlockIndex(0), &mut written)?;
        written.fill(0);
        self.toy.dirty_log().stop()
    }

    fn fetch(&self, block: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        let mut written = self.written.lock().unwrap();
        self.toy.dirty_log().fetch(block, &mut written)?;
        for (into, written) in into.iter_mut().zip(&*written) {
            *into |= written;
        }
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        true
    }

    fn arm(&self, block: BlockIndex, range: PageRange, pages: &[u64]) -> Result<(), LogError> {
        let mut written = self.written.lock().unwrap();
        self.toy.dirty_log().fetch(block, &mut written)?;
        let first = range.start.0 / 64;
        for (written, armed) in written[first..].iter_mut().zip(pages) {
            *written &= !armed;
        }
        Ok(())
    }
}
