//! A value for one processor at a time. Nobody waits for it: who comes while it is in use does something else.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// See the module's documentation.
pub struct TryLock<T> {
    busy: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached by whoever turned `busy` from false to true, until it turns it back, so by one
// processor at a time.
unsafe impl<T: Send> Sync for TryLock<T> {}

impl<T> TryLock<T> {
    /// Nobody uses it yet.
    pub const fn new(value: T) -> Self {
        Self {
            busy: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// What `work` does with the value. `None` if another processor has it now.
    pub fn try_with<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        if self.busy.swap(true, Ordering::Acquire) {
            return None;
        }
        // SAFETY: `busy` was false and is true now, and only this call turns it back.
        let result = work(unsafe { &mut *self.value.get() });
        self.busy.store(false, Ordering::Release);
        Some(result)
    }
}
