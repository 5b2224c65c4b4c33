//! A process watches which pages of its own memory are written: once each 100 ms, for a second.
//!
//!     cargo run --release -p vmferry-dirty --example track_process

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vmferry_dirty::log::{UffdLog, UffdRegion};
use vmferry_dirty::{BlockIndex, DirtyLog, LogError, PAGE_SIZE};

const PAGES: usize = 1024;
const WORDS_IN_PAGE: usize = PAGE_SIZE / size_of::<AtomicU64>();

fn main() -> Result<(), LogError> {
    // One page more than is tracked, since a vector need not begin at a page.
    let memory: Vec<AtomicU64> = (0..(PAGES + 1) * WORDS_IN_PAGE)
        .map(|_| AtomicU64::new(0))
        .collect();
    let first = memory.as_ptr().align_offset(PAGE_SIZE);
    let page = |i: usize| &memory[first + i * WORDS_IN_PAGE];

    let log = UffdLog::new(vec![UffdRegion {
        block: BlockIndex(0),
        first_page: 0,
        host_addr: (&raw const *page(0)).addr() as u64,
        pages: PAGES,
    }]);
    log.start()?;
    std::thread::scope(|s| {
        s.spawn(|| {
            for i in 0..100 {
                page(i * i % PAGES).fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(100));
            let mut bits = [0; PAGES / 64];
            log.fetch(BlockIndex(0), &mut bits)?;
            let written = (0..PAGES).filter(|i| bits[i / 64] >> (i % 64) & 1 == 1);
            println!("{:?}", written.collect::<Vec<_>>());
        }
        log.stop()
    })
}
