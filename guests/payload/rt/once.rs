//! A value that one processor sets once and all may then read.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, Ordering};

/// See the module's documentation.
pub struct Once<T> {
    ready: AtomicBool,
    value: UnsafeCell<MaybeUninit<T>>,
}

// SAFETY: the value is written before `ready` is released, by the boot processor only, and is only
// read (through shared references) after `ready` was acquired.
unsafe impl<T: Sync + Send> Sync for Once<T> {}

impl<T> Once<T> {
    /// Not set yet.
    pub const fn new() -> Self {
        Self {
            ready: AtomicBool::new(false),
            value: UnsafeCell::new(MaybeUninit::uninit()),
        }
    }

    /// Sets the value and lets the processors in [`Once::wait`] go on.
    ///
    /// # Safety
    ///
    /// Must be called at most once.
    pub unsafe fn set(&self, value: T) -> &T {
        // SAFETY: nobody reads before `ready`, and the caller promises that nobody else writes.
        let value = unsafe { (*self.value.get()).write(value) };
        self.ready.store(true, Ordering::Release);
        value
    }

    /// Waits for the value.
    pub fn wait(&self) -> &T {
        while !self.ready.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
        // SAFETY: `ready` says that it was written, and nothing writes it again.
        unsafe { (*self.value.get()).assume_init_ref() }
    }
}
