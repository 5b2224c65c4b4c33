//! Decode throughput: 256 MiB of page records from memory, next to a plain copy of the same bytes.
//!
//! `cargo bench -p vmferry-wire`. The decoder's work beyond the copy into its buffer is what it costs.

use std::hint::black_box;
use std::time::{Duration, Instant};

use vmferry_wire::{Decoder, Encoder, Event, RamLayout};

const PAGES: u64 = 65536;
const ROUNDS: usize = 9;

fn stream(layout: &RamLayout) -> Vec<u8> {
    let mut enc = Encoder::new(layout.clone());
    let mut out = Vec::with_capacity((PAGES as usize + 1) * 4104);
    enc.stream_header(&mut out);
    enc.configuration(&mut out, "microvm")
        .expect("a valid name");
    enc.ram_start(&mut out);
    enc.ram_end(&mut out);
    for page in 0..PAGES {
        enc.page(&mut out, 0, page * 4096);
        out.extend_from_slice(&[page as u8; 4096]);
    }
    enc.end_of_ram_records(&mut out);
    enc.eof(&mut out);
    out
}

/// The least of several runs: what the work takes when nothing else runs.
fn best(mut run: impl FnMut()) -> Duration {
    (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .min()
        .expect("at least one round")
}

fn main() {
    let layout = RamLayout::new([("microvm.ram", PAGES * 4096)]).expect("a valid layout");
    let stream = stream(&layout);
    let gb = |time: Duration| stream.len() as f64 / time.as_secs_f64() / 1e9;

    // The decoder's own pattern of access: piecewise into a buffer of 1 MiB.
    let mut buf = vec![0u8; 1 << 20];
    let copy = best(|| {
        for piece in stream.chunks(buf.len()) {
            buf[..piece.len()].copy_from_slice(black_box(piece));
            black_box(&mut buf);
        }
    });
    let decode = best(|| {
        let mut dec = Decoder::new(stream.as_slice(), layout.clone());
        let mut pages = 0;
        loop {
            match dec.next().expect("a valid stream") {
                Event::Page {
                    block,
                    offset,
                    data,
                } => {
                    black_box((block, offset, data));
                    pages += 1;
                }
                Event::EndOfStream => break,
                _ => {}
            }
        }
        assert_eq!(pages, PAGES);
    });
    let mut headers = Vec::with_capacity(1 << 20);
    let encode = best(|| {
        let mut enc = Encoder::new(layout.clone());
        headers.clear();
        for page in 0..PAGES {
            enc.page(black_box(&mut headers), 0, page * 4096);
        }
    });
    println!("copy into a 1 MiB buffer  {:7.2} GB/s", gb(copy));
    println!("decode, the copy included {:7.2} GB/s", gb(decode));
    let beyond = decode.saturating_sub(copy);
    println!(
        "decode / copy             {:7.3}   {:.1} ns a page beyond the copy",
        decode.as_secs_f64() / copy.as_secs_f64(),
        beyond.as_nanos() as f64 / PAGES as f64,
    );
    println!(
        "encode a page header      {:7.1} ns",
        encode.as_nanos() as f64 / PAGES as f64
    );
}
