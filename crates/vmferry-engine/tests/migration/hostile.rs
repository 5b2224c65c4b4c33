//! Streams that are cut or damaged, sent to a destination by something that only looks like a source.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

use vmferry_engine::seam::{DeviceState, Guest};
use vmferry_engine::{MigrationError, Uri};
use vmferry_wire::{Command, DescribedSection, Encoder, RamLayout, vm_description};

use crate::common::{Random, Runners, Watched, any_port, listen};
use crate::toy::PAGES;

/// A small stream that a toy accepts and, at its end, runs.
struct Recording {
    bytes: Vec<u8>,
    /// Where the destination has everything, and says so.
    loaded: usize,
    /// Where the source has given the guest up.
    run: usize,
}

fn recording() -> Recording {
    let toy = Watched::new(&Runners::none());
    let layout = RamLayout::new([("toy.ram", PAGES as u64 * 4096)]).unwrap();
    let mut encoder = Encoder::new(layout);
    let mut bytes = Vec::new();
    encoder.stream_header(&mut bytes);
    encoder.configuration(&mut bytes, "microvm").unwrap();
    encoder.command(&mut bytes, Command::OpenReturnPath);
    encoder
        .device_state(&mut bytes, &toy.describe().unwrap())
        .unwrap();
    encoder.ram_start(&mut bytes);
    encoder.ram_part(&mut bytes);
    encoder.zero_page(&mut bytes, 0, 0);
    encoder.page(&mut bytes, 0, 4096);
    bytes.extend_from_slice(&[0xab; 4096]);
    encoder.end_of_ram_records(&mut bytes);
    encoder.command(&mut bytes, Command::SwitchoverStart);
    encoder.ram_end(&mut bytes);
    encoder.end_of_ram_records(&mut bytes);
    let mut states = toy.save_devices().unwrap();
    states.push(DeviceState {
        idstr: "vmferry/run-state".to_owned(),
        instance_id: 0,
        version_id: 1,
        data: b"running".to_vec(),
    });
    for state in &states {
        encoder.device_state(&mut bytes, state).unwrap();
    }
    let sections: Vec<_> = states.iter().map(DescribedSection::from).collect();
    let description = vm_description("microvm", &sections);
    encoder.vm_description(&mut bytes, &description).unwrap();
    let loaded = bytes.len();
    encoder.command(&mut bytes, Command::HandoverRun);
    let run = bytes.len();
    encoder.eof(&mut bytes);
    Recording { bytes, loaded, run }
}

/// Sends `stream` to a new guest and returns it with how its migration ended.
fn feed(stream: &[u8]) -> (Arc<Watched>, Result<(), MigrationError>) {
    let there = Watched::new(&Runners::none());
    let incoming = listen(&there, &any_port());
    let Uri::Tcp { port, .. } = *incoming.uri() else {
        panic!("{} is not TCP", incoming.uri());
    };
    let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    // The destination may have seen enough before all is sent.
    let _ = socket.write_all(stream);
    let _ = socket.shutdown(Shutdown::Write);
    // Returns when the receiving thread has ended, and panics if that has.
    let end = incoming.wait();
    (there, end)
}

#[test]
fn streams_that_end_early() {
    let mut random = Random::new("streams_that_end_early");
    let recording = recording();
    let end = recording.bytes.len();
    let mut cuts: Vec<_> = (recording.loaded - 1..=end).collect();
    cuts.extend((0..150).map(|_| random.below(end as u64) as usize));
    for cut in cuts {
        let (there, end) = feed(&recording.bytes[..cut]);
        let wanted = match cut {
            cut if cut >= recording.run => end.is_ok() && there.is_running(),
            cut if cut >= recording.loaded => {
                matches!(end, Err(MigrationError::Undecided { .. })) && !there.is_running()
            }
            _ => matches!(end, Err(MigrationError::Stream(_))) && !there.is_running(),
        };
        assert!(wanted, "cut at {cut} of {}: {end:?}", recording.bytes.len());
    }
}

#[test]
fn streams_with_a_flipped_bit() {
    let mut random = Random::new("streams_with_a_flipped_bit");
    let recording = recording();
    let (mut refused, count) = (0, 400);
    for _ in 0..count {
        // Mostly not in the one page of data, which is nobody's to check but the guest's.
        let at = match random.below(recording.bytes.len() as u64) as usize {
            at if recording.bytes[at] == 0xab => random.below(100) as usize,
            at => at,
        };
        let mut damaged = recording.bytes.clone();
        damaged[at] ^= 1 << random.below(8);
        let (there, end) = feed(&damaged);
        assert_eq!(there.is_running(), end.is_ok(), "damaged at {at}: {end:?}");
        refused += usize::from(end.is_err());
    }
    println!("{refused} of {count} refused");
    assert!(refused > count / 2);
}

#[test]
fn noise() {
    let mut random = Random::new("noise");
    for _ in 0..50 {
        let len = random.below(5000);
        let noise: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
        let (there, end) = feed(&noise);
        assert!(end.is_err() && !there.is_running());
    }
}
