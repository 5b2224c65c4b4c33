//! A peer's promises take no memory: what is held grows with the bytes that came.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Way, join, sections, walk};

/// The system's allocator, with a count of what is held and the most that ever was.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; the counters are beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `ptr` came from `alloc` above, so from the system, with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that decoding this stream held, in bytes beyond what was held before.
fn peak(stream: &[u8]) -> usize {
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    walk(stream);
    PEAK.load(Ordering::Relaxed) - before
}

// One test: the counters are the whole process's.
#[test]
fn promises_take_no_memory() {
    /// The decoder's buffer, and a little for names and errors.
    const BASE: usize = (1 << 20) + (64 << 10);
    let pieces = sections(Way::Two);
    for (i, (name, bytes)) in pieces.iter().enumerate() {
        let before = join(&pieces[..i]);
        // Every byte of the section in turn, and the section's end with it, replaced by the largest claims.
        for at in 1..bytes.len().min(64) {
            for claim in [
                [0xff; 4],
                (16u32 << 20).to_be_bytes(),
                (1u32 << 20).to_be_bytes(),
            ] {
                let mut stream = before.clone();
                stream.extend_from_slice(&bytes[..at]);
                stream.extend_from_slice(&claim);
                stream.extend_from_slice(&[0; 100]);
                let held = peak(&stream);
                assert!(held < BASE, "{name}, {claim:x?} at {at}: {held} bytes");
            }
        }
    }
}
