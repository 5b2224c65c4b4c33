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

/// A complete stream, one section (or the header) a piece.
pub fn sections(way: Way) -> Vec<Vec<u8>> {
    let mut enc = Encoder::new(layout());
    let mut pieces = Vec::new();
    let mut piece = |write: &mut dyn FnMut(&mut Vec<u8>)| {
        let mut out = Vec::new();
        write(&mut out);
        pieces.push(out);
    };
    piece(&mut |out| enc.stream_header(out));
    piece(&mut |out| enc.configuration(out, "microvm").unwrap());
    if way == Way::Two {
        piece(&mut |out| enc.command(out, Command::OpenReturnPath));
        piece(&mut |out| enc.command(out, Command::Ping(7)));
    }
    let machine = device("vmferry/machine", 0, 20);
    let cpu = device("vmferry/cpu", 0, 33);
    piece(&mut |out| enc.device_state(out, &machine).unwrap());
    piece(&mut |out| enc.ram_start(out));
    piece(&mut |out| {
        enc.ram_part(out);
        enc.zero_page(out, 0, 0);
        enc.page(out, 0, 0x1000);
        out.extend_from_slice(&[0xab; 4096]);
        enc.end_of_ram_records(out);
    });
    piece(&mut |out| {
        enc.ram_part(out);
        enc.zero_page(out, 1, 0x1000);
        enc.zero_page(out, 1, 0);
        enc.end_of_ram_records(out);
    });
    piece(&mut |out| enc.command(out, Command::SwitchoverStart));
    piece(&mut |out| {
        enc.ram_end(out);
        enc.zero_page(out, 0, 0xf000);
        enc.end_of_ram_records(out);
    });
    piece(&mut |out| enc.device_state(out, &cpu).unwrap());
    let json = vm_description("microvm", &[DescribedSection::from(&cpu)]);
    match way {
        Way::One => {
            piece(&mut |out| enc.eof(out));
            piece(&mut |out| enc.vm_description(out, &json).unwrap());
        }
        Way::Two => {
            piece(&mut |out| enc.vm_description(out, &json).unwrap());
            piece(&mut |out| enc.command(out, Command::HandoverRun));
            piece(&mut |out| enc.eof(out));
        }
    }
    pieces
}

/// Decodes all of a stream, up to its `EndOfStream` and the description behind it, if one follows.
pub fn decode(stream: &[u8]) -> Result<usize, StreamError> {
    let mut dec = Decoder::new(stream, layout());
    let mut events = 0;
    loop {
        let end = matches!(dec.next()?, Event::EndOfStream);
        events += 1;
        if end {
            break;
        }
    }
    if dec.consumed() < stream.len() as u64 {
        dec.next()?;
        events += 1;
    }
    assert_eq!(
        dec.consumed(),
        stream.len() as u64,
        "the decoder stopped early"
    );
    Ok(events)
}
