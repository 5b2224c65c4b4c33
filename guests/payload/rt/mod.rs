//! What every payload guest needs: the way from the PVH entry to ring 3 on every processor, memory
//! mapping, the serial line, virtio, clocks and the command line. The program itself provides
//! `crate::NAME`, the name it prints before each line, and `crate::main`.

pub mod clock;
pub mod cmdline;
pub mod cpu;
pub mod entry;
pub mod lapic;
mod libc;
pub mod once;
pub mod paging;
pub mod pvh;
pub mod serial;
pub mod smp;
pub mod traps;
pub mod try_lock;
pub mod virtio;
