//! The synchronisation primitives, replaced by loom's when the concurrency models are checked.

pub(crate) use std::sync::PoisonError;

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard, RwLock,
    atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard, RwLock,
    atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
};
