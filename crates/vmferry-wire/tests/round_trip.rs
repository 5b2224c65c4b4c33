//! What was encoded is decoded, whatever the reader's pace.

mod common;

use std::io::Read;

use common::{Way, device, layout};
use proptest::prelude::*;
use vmferry_wire::{
    Command, Decoder, DeviceState, Encoder, Event, ReturnPathError, ReturnPathMessage,
};

/// Gives at most `step` bytes a read.
struct Slow<'a> {
    bytes: &'a [u8],
    step: usize,
}

impl Read for Slow<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = buf.len().min(self.step);
        self.bytes.read(&mut buf[..n])
    }
}

#[test]
fn both_kinds_of_stream_decode() {
    for (way, events) in [(Way::One, 15), (Way::Two, 18)] {
        let (ends, error) = common::walk(&common::join(&common::sections(way)));
        assert!(error.is_none(), "{error:?}");
        assert_eq!(ends.len(), events);
    }
}

#[derive(Clone, Debug)]
enum Record {
    Page { block: usize, page: u64, fill: u8 },
    Zero { block: usize, page: u64 },
}

fn record() -> impl Strategy<Value = Record> {
    (any::<bool>(), 0..18u64, any::<u8>()).prop_map(|(zero, page, fill)| {
        let (block, page) = if page < 16 { (0, page) } else { (1, page - 16) };
        if zero {
            Record::Zero { block, page }
        } else {
            Record::Page { block, page, fill }
        }
    })
}

fn devices() -> impl Strategy<Value = Vec<DeviceState>> {
    let sizes = prop::collection::vec(0..5000usize, 0..6);
    sizes.prop_map(|sizes| {
        let states = sizes.iter().enumerate();
        states
            .map(|(i, &len)| device("vmferry/dev", i as u32, len))
            .collect()
    })
}

/// Every record of the next PART or END, compared with what was written.
fn expect_part(dec: &mut Decoder<Slow<'_>>, part: &[Record], is_last: bool) {
    for record in part {
        match (dec.next().unwrap(), record) {
            (
                Event::Page {
                    block,
                    offset,
                    data,
                },
                Record::Page {
                    block: b,
                    page,
                    fill,
                },
            ) => {
                assert_eq!((block, offset), (*b, page * 4096));
                assert!(data.iter().all(|byte| byte == fill));
            }
            (Event::ZeroPage { block, offset }, Record::Zero { block: b, page }) => {
                assert_eq!((block, offset), (*b, page * 4096));
            }
            (got, want) => panic!("{got:?} instead of {want:?}"),
        }
    }
    assert_eq!(dec.next().unwrap(), Event::RamPartEnd { last: is_last });
}

/// Failures are printed with their seed, not kept in a file beside the tests.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    }
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn any_stream(
        parts in prop::collection::vec(prop::collection::vec(record(), 0..40), 1..8),
        devices in devices(),
        machine in "[a-z0-9.-]{1,64}",
        ping in any::<u32>(),
        step in 1..100_000usize,
    ) {
        let mut enc = Encoder::new(layout());
        let mut out = Vec::new();
        enc.stream_header(&mut out);
        enc.configuration(&mut out, &machine).unwrap();
        enc.command(&mut out, Command::OpenReturnPath);
        enc.command(&mut out, Command::Ping(ping));
        enc.ram_start(&mut out);
        for (i, part) in parts.iter().enumerate() {
            if i + 1 == parts.len() {
                enc.command(&mut out, Command::SwitchoverStart);
                enc.ram_end(&mut out);
            } else {
                enc.ram_part(&mut out);
            }
            for record in part {
                match *record {
                    Record::Page { block, page, fill } => {
                        enc.page(&mut out, block, page * 4096);
                        out.extend_from_slice(&[fill; 4096]);
                    }
                    Record::Zero { block, page } => enc.zero_page(&mut out, block, page * 4096),
                }
            }
            enc.end_of_ram_records(&mut out);
        }
        for state in &devices {
            enc.device_state(&mut out, state).unwrap();
        }
        enc.vm_description(&mut out, "{}").unwrap();
        enc.command(&mut out, Command::HandoverRun);
        enc.eof(&mut out);

        let mut dec = Decoder::new(Slow { bytes: &out, step }, layout());
        assert_eq!(dec.next().unwrap(), Event::Configuration { machine });
        assert_eq!(dec.next().unwrap(), Event::Command(Command::OpenReturnPath));
        assert_eq!(dec.next().unwrap(), Event::Command(Command::Ping(ping)));
        assert_eq!(dec.next().unwrap(), Event::RamSetup);
        for (i, part) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            if last {
                assert_eq!(dec.next().unwrap(), Event::Command(Command::SwitchoverStart));
            }
            expect_part(&mut dec, part, last);
        }
        for state in devices {
            assert_eq!(dec.next().unwrap(), Event::DeviceState(state));
        }
        assert_eq!(dec.next().unwrap(), Event::VmDescription("{}".to_owned()));
        assert_eq!(dec.next().unwrap(), Event::Command(Command::HandoverRun));
        assert_eq!(dec.next().unwrap(), Event::EndOfStream);
        assert_eq!(dec.consumed(), out.len() as u64);
        assert_eq!(dec.buffered(), 0);
        assert!(dec.next().is_err());
    }

    #[test]
    fn any_return_path_message(number in any::<u32>(), sentence in "\\PC{0,200}") {
        for message in [
            ReturnPathMessage::Shut(number),
            ReturnPathMessage::Pong(number),
            ReturnPathMessage::HandoverLoaded,
            ReturnPathMessage::Error(sentence.clone()),
        ] {
            let mut out = Vec::new();
            message.encode(&mut out);
            let mut bytes = out.as_slice();
            let got = ReturnPathMessage::read_from(&mut bytes).unwrap();
            assert!(bytes.is_empty());
            if let (ReturnPathMessage::Error(got), ReturnPathMessage::Error(_)) = (&got, &message) {
                // What cannot be shown was replaced when it was sent; what arrives is already clean.
                let mut again = Vec::new();
                ReturnPathMessage::Error(got.clone()).encode(&mut again);
                assert_eq!(again, out);
            } else {
                assert_eq!(got, message);
            }
        }
    }

    #[test]
    fn any_bytes_on_the_return_path(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        // Whatever it is, it is an answer, not a panic.
        let _ = ReturnPathMessage::read_from(&mut bytes.as_slice());
    }
}

#[test]
fn a_return_path_that_ends_or_lies_is_refused() {
    let read = |bytes: &[u8]| ReturnPathMessage::read_from(&mut &*bytes).unwrap_err();
    assert!(matches!(read(&[]), ReturnPathError::Closed));
    assert!(matches!(read(&[0]), ReturnPathError::Truncated));
    assert!(matches!(read(&[0, 1, 0, 4, 0]), ReturnPathError::Truncated));
    assert!(matches!(
        read(&[0, 1, 0xff, 0xff]),
        ReturnPathError::Length { expected: 4, .. }
    ));
    assert!(matches!(
        read(&[0x76, 2, 0xff, 0xff]),
        ReturnPathError::Length { expected: 1024, .. }
    ));
    assert!(matches!(
        read(&[0, 4, 0, 12]),
        ReturnPathError::Unsupported { number: 4, .. }
    ));
    assert!(matches!(
        read(&[0x12, 0x34, 0, 0]),
        ReturnPathError::Unknown { number: 0x1234 }
    ));
}

#[test]
fn an_error_sentence_is_bounded_and_clean() {
    let mut out = Vec::new();
    ReturnPathMessage::Error("\u{1b}[2Jé".repeat(1000)).encode(&mut out);
    assert!(out.len() <= 4 + 1024);
    let ReturnPathMessage::Error(got) = ReturnPathMessage::read_from(&mut out.as_slice()).unwrap()
    else {
        panic!("not an error message");
    };
    assert!(!got.contains('\u{1b}') && got.contains('é'));

    let mut raw = vec![0x76, 2, 4, 0];
    raw.extend_from_slice(&[0xff; 1024]);
    let ReturnPathMessage::Error(got) = ReturnPathMessage::read_from(&mut raw.as_slice()).unwrap()
    else {
        panic!("not an error message");
    };
    assert!(got.len() <= 1024);
}
