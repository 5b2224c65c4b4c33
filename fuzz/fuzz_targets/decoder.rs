//! Any bytes as a migration stream: events or an error, never a panic; pages only inside their block.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_wire::{Decoder, Event, PAGE_SIZE, RamLayout};

fuzz_target!(|stream: &[u8]| {
    let layout = RamLayout::new([("microvm.ram", 0x10000), ("pc.bios", 0x2000)]).expect("valid");
    let mut dec = Decoder::new(stream, layout.clone());
    while let Ok(event) = dec.next() {
        match event {
            Event::Page { block, offset, .. } | Event::ZeroPage { block, offset } => {
                let page = PAGE_SIZE as u64;
                assert!(offset % page == 0 && offset + page <= layout.blocks()[block].len);
            }
            _ => {}
        }
    }
    assert!(dec.consumed() <= stream.len() as u64);
});
