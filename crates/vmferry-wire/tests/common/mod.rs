//! A small stream in pieces, shared by the tests.

use vmferry_wire::{
    Command, Decoder, DescribedSection, DeviceState, Encoder, Event, RamLayout, StreamError,
    vm_description,
};

/// Two blocks, of 16 and 2 pages.
pub fn layout() -> RamLayout {
    RamLayout::new([("microvm.ram", 0x10000), ("pc.bios", 0x2000)]).expect("a valid layout")
}

pub fn device(idstr: &str, instance_id: u32, len: usize) -> DeviceState {
    DeviceState {
        idstr: idstr.to_owned(),
        instance_id,
        version_id: 1,
        data: (0..len).map(|i| i as u8).collect(),
    }
}

/// Which way the stream's channel goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    One,
    Two,
}

/// A complete stream, one section (or the header) a piece, with a name for each.
pub fn sections(way: Way) -> Vec<(&'static str, Vec<u8>)> {
    let mut enc = Encoder::new(layout());
    let mut pieces = Vec::new();
    let mut piece = |name, write: &mut dyn FnMut(&mut Vec<u8>)| {
        let mut out = Vec::new();
        write(&mut out);
        pieces.push((name, out));
    };
    piece("header", &mut |out| enc.stream_header(out));
    piece("configuration", &mut |out| {
        enc.configuration(out, "microvm").unwrap();
    });
    if way == Way::Two {
        piece("open", &mut |out| enc.command(out, Command::OpenReturnPath));
        piece("ping", &mut |out| enc.command(out, Command::Ping(7)));
    }
    let machine = device("vmferry/machine", 0, 20);
    let cpu = device("vmferry/cpu", 0, 33);
    piece("machine", &mut |out| {
        enc.device_state(out, &machine).unwrap()
    });
    piece("ram start", &mut |out| enc.ram_start(out));
    piece("part 1", &mut |out| {
        enc.ram_part(out);
        enc.zero_page(out, 0, 0);
        enc.page(out, 0, 0x1000);
        out.extend_from_slice(&[0xab; 4096]);
        enc.end_of_ram_records(out);
    });
    piece("part 2", &mut |out| {
        enc.ram_part(out);
        enc.zero_page(out, 1, 0x1000);
        enc.zero_page(out, 1, 0);
        enc.end_of_ram_records(out);
    });
    piece("switchover", &mut |out| {
        enc.command(out, Command::SwitchoverStart);
    });
    piece("ram end", &mut |out| {
        enc.ram_end(out);
        enc.zero_page(out, 0, 0xf000);
        enc.end_of_ram_records(out);
    });
    piece("cpu", &mut |out| enc.device_state(out, &cpu).unwrap());
    let json = vm_description("microvm", &[DescribedSection::from(&cpu)]);
    if way == Way::Two {
        piece("vmdesc", &mut |out| enc.vm_description(out, &json).unwrap());
        piece("run", &mut |out| enc.command(out, Command::HandoverRun));
    }
    piece("eof", &mut |out| enc.eof(out));
    if way == Way::One {
        piece("vmdesc", &mut |out| enc.vm_description(out, &json).unwrap());
    }
    pieces
}

/// The bytes of all pieces.
pub fn join(pieces: &[(&'static str, Vec<u8>)]) -> Vec<u8> {
    pieces
        .iter()
        .flat_map(|(_, bytes)| bytes)
        .copied()
        .collect()
}

/// Decodes all of a stream, and what follows its EOF. How far each event took the decoder, in bytes, and
/// the error that ended it, if one did.
pub fn walk(stream: &[u8]) -> (Vec<u64>, Option<StreamError>) {
    let mut dec = Decoder::new(stream, layout());
    let mut ends = Vec::new();
    let mut complete = false;
    while !complete || dec.consumed() < stream.len() as u64 {
        match dec.next() {
            Ok(event) => complete |= event == Event::EndOfStream,
            Err(error) => {
                assert!(matches!(dec.next(), Err(StreamError::GivenUp { .. })));
                return (ends, Some(error));
            }
        }
        ends.push(dec.consumed());
    }
    (ends, None)
}
