//! Streams that are cut, damaged or lie: an error that says so, never a panic, never a wrong page.

mod common;

use common::{Way, device, join, layout, sections, walk};
use proptest::prelude::*;
use vmferry_wire::{
    Command, Decoder, Encoder, EofPlace, Event, LayoutMismatch, RamLayout, StreamError, limits,
};

const WAYS: [Way; 2] = [Way::One, Way::Two];

/// The error that a stream must end with.
fn error(stream: &[u8]) -> StreamError {
    walk(stream).1.expect("the stream must be refused")
}

#[test]
fn cut_at_every_byte() {
    for way in WAYS {
        let pieces = sections(way);
        let stream = join(&pieces);
        let (ends, _) = walk(&stream);
        let mut boundaries = vec![0u64];
        for (_, bytes) in &pieces {
            boundaries.push(boundaries[boundaries.len() - 1] + bytes.len() as u64);
        }
        // A one-way stream is complete with its EOF; the description behind it may be missing.
        let eof = boundaries[boundaries.len() - 2];
        for cut in 0..stream.len() {
            let (got, error) = walk(&stream[..cut]);
            let cut = cut as u64;
            // Every event that is complete was given before more bytes were asked for.
            let want = ends.iter().take_while(|&&end| end <= cut);
            assert_eq!(got.len(), want.count(), "{way:?} cut at {cut}");
            if way == Way::One && cut == eof {
                assert!(error.is_none());
                continue;
            }
            let Some(StreamError::UnexpectedEof { offset, place }) = error else {
                panic!("{way:?} cut at {cut}: {error:?}");
            };
            assert_eq!(offset, cut);
            let clean = cut > 0 && boundaries.contains(&cut);
            assert_eq!(
                matches!(place, EofPlace::SectionBoundary { .. }),
                clean,
                "{way:?} cut at {cut}: {place}"
            );
        }
    }
}

/// Asserts which of several variations of a stream are accepted, by name.
fn accepted(variations: impl Iterator<Item = (String, Vec<u8>)>, want: &[&str]) {
    let got: Vec<String> = variations
        .filter(|(_, stream)| walk(stream).1.is_none())
        .map(|(name, _)| name)
        .collect();
    assert_eq!(got, want);
}

#[test]
fn sections_swapped() {
    let swaps = |way| {
        let pieces = sections(way);
        (1..pieces.len()).map(move |i| {
            let mut swapped = pieces.clone();
            swapped.swap(i - 1, i);
            (
                format!("{} / {}", pieces[i - 1].0, pieces[i].0),
                join(&swapped),
            )
        })
    };
    let harmless = ["part 1 / part 2", "part 2 / switchover"];
    let with = |more: &[&'static str]| {
        let mut all = harmless.to_vec();
        all.extend_from_slice(more);
        all
    };
    accepted(swaps(Way::One), &with(&["eof / vmdesc"]));
    let mut two = vec!["ping / machine"];
    two.extend(with(&[]));
    accepted(swaps(Way::Two), &two);
}

#[test]
fn sections_doubled() {
    let doubles = |way| {
        let pieces = sections(way);
        (0..pieces.len()).map(move |i| {
            let mut doubled = pieces.clone();
            doubled.insert(i, pieces[i].clone());
            (pieces[i].0.to_owned(), join(&doubled))
        })
    };
    accepted(doubles(Way::One), &["part 1", "part 2"]);
    accepted(doubles(Way::Two), &["ping", "part 1", "part 2"]);
}

#[test]
fn sections_left_out() {
    let without = |way| {
        let pieces = sections(way);
        (0..pieces.len()).map(move |i| {
            let mut rest = pieces.clone();
            rest.remove(i);
            (pieces[i].0.to_owned(), join(&rest))
        })
    };
    accepted(
        without(Way::One),
        &["machine", "part 1", "part 2", "switchover", "cpu", "vmdesc"],
    );
    // Above all, "run" is not in the list: without it the guest stays the source's.
    accepted(
        without(Way::Two),
        &["ping", "machine", "part 1", "part 2", "switchover", "cpu"],
    );
}

/// A stream up to and with one piece, followed by other bytes.
fn after(way: Way, last: &str, more: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    for (name, bytes) in sections(way) {
        stream.extend_from_slice(&bytes);
        if name == last {
            break;
        }
    }
    stream.extend_from_slice(more);
    stream
}

fn encoded(command: Command) -> Vec<u8> {
    let mut out = Vec::new();
    Encoder::new(layout()).command(&mut out, command);
    out
}

#[test]
fn a_guest_that_is_kept_ends_the_stream() {
    let keep = encoded(Command::HandoverKeep);
    let stream = after(Way::Two, "vmdesc", &keep);
    let mut decoder = Decoder::new(stream.as_slice(), layout());
    while decoder.next().unwrap() != Event::Command(Command::HandoverKeep) {}
    assert!(decoder.next().is_err());
    let got = error(&after(Way::Two, "cpu", &keep));
    assert!(got.to_string().contains("HANDOVER_KEEP"), "{got}");
}

#[test]
fn hand_over_only_where_it_belongs() {
    let run = encoded(Command::HandoverRun);
    for (way, last) in [
        (Way::One, "configuration"),
        (Way::One, "cpu"),
        (Way::Two, "ram end"),
        (Way::Two, "cpu"),
    ] {
        let got = error(&after(way, last, &run));
        assert!(
            matches!(&got, StreamError::UnexpectedSection { found, .. } if found.contains("HANDOVER_RUN")),
            "{way:?} {last}: {got}"
        );
    }
    let got = error(&after(Way::Two, "vmdesc", &[0]));
    assert_eq!(
        got.to_string(),
        format!(
            "the EOF at byte {} of the stream, where the command HANDOVER_RUN or HANDOVER_KEEP was expected; \
             the stream is damaged or its sender speaks another protocol",
            after(Way::Two, "vmdesc", &[]).len()
        )
    );
}

#[test]
fn header_of_something_else() {
    let mut stream = join(&sections(Way::One));
    stream[0] = b'X';
    assert!(matches!(
        error(&stream),
        StreamError::BadMagic { found: 0x5845_564d }
    ));
    stream[0] = b'Q';
    stream[7] = 2;
    assert!(matches!(
        error(&stream),
        StreamError::BadVersion { found: 2 }
    ));
}

#[test]
fn footers() {
    for name in ["machine", "ram start", "part 1", "ram end", "cpu"] {
        let stream = after(Way::Two, name, &[]);
        let footer = stream.len() - 5;
        let mut bad = stream.clone();
        bad[footer] = 0x7f;
        assert!(
            matches!(error(&bad), StreamError::MissingFooter { found: 0x7f, .. }),
            "{name}"
        );
        let mut bad = stream;
        bad[footer + 1] = 0x80;
        assert!(
            matches!(error(&bad), StreamError::WrongFooter { found, .. } if found >= 0x8000_0000),
            "{name}"
        );
    }
}

#[test]
fn every_length_at_its_maximum() {
    // Where in its section a length is, and how many bytes it has.
    let fields = [
        ("configuration", 1, 4),
        ("open", 3, 2),
        ("ping", 3, 2),
        ("machine", 5, 1),
        ("machine", 1 + 4 + 1 + 15 + 8, 4),
        ("ram start", 5, 1),
        ("ram start", 17, 8),
        ("ram start", 25, 1),
        ("ram start", 26 + 11, 8),
        ("part 1", 5 + 8, 1),
        ("switchover", 3, 2),
        ("cpu", 1 + 4 + 1 + 11 + 8, 4),
        ("vmdesc", 1, 4),
        ("run", 3, 2),
    ];
    for (name, at, len) in fields {
        let mut pieces = sections(Way::Two);
        let (_, bytes) = pieces
            .iter_mut()
            .find(|(n, _)| *n == name)
            .expect("a section");
        bytes[at..at + len].fill(0xff);
        let got = error(&join(&pieces));
        let bounded = len != 4
            || matches!(
                got,
                StreamError::TooLong {
                    len: 0xffff_ffff,
                    ..
                }
            );
        assert!(bounded, "{name} at {at}: {got}");
    }
}

#[test]
fn all_device_states_together_are_bounded() {
    let mut stream = after(Way::One, "configuration", &[]);
    let mut enc = Encoder::new(layout());
    for i in 0..4 {
        enc.device_state(&mut stream, &device("vmferry/x", i, limits::DEVICE_STATE))
            .unwrap();
    }
    let one_more = device("vmferry/x", 9, 1);
    assert!(enc.device_state(&mut stream, &one_more).is_err());
    Encoder::new(layout())
        .device_state(&mut stream, &one_more)
        .unwrap();
    assert!(matches!(
        error(&stream),
        StreamError::TooLong {
            limit: 0,
            len: 1,
            ..
        }
    ));
}

/// The beginning of a PART section whose first record is this word, with block `microvm.ram` if it has no
/// CONTINUE flag.
fn part(word: u64) -> Vec<u8> {
    let mut out = vec![0x02, 0, 0, 0, 0];
    out.extend_from_slice(&word.to_be_bytes());
    if word & 0x20 == 0 {
        out.push(11);
        out.extend_from_slice(b"microvm.ram");
    }
    out
}

#[test]
fn records_that_lie() {
    let first = |more: &[u8]| error(&after(Way::One, "ram start", more));
    for page in [0x10000, 0x11000, !0xfff] {
        for kind in [0x02, 0x08] {
            let got = first(&part(page | kind));
            assert!(
                matches!(got, StreamError::PageOutsideBlock { page: p, len: 0x10000, .. } if p == page),
                "{got}"
            );
        }
    }
    // Also for a block that an earlier record named.
    let got = error(&after(Way::One, "part 2", &part(0x2000 | 0x28)));
    assert!(
        matches!(got, StreamError::PageOutsideBlock { len: 0x2000, .. }),
        "{got}"
    );
    // An offset that is not a page's shows as flags that do not exist.
    for word in [
        0x1001 | 0x08,
        u64::MAX,
        0,
        0x01,
        0x04,
        0x0a,
        0x18,
        0x1010,
        0x30,
    ] {
        let got = first(&part(word));
        assert!(
            matches!(got, StreamError::UnknownRecord { word: w, .. } if w == word),
            "{got}"
        );
    }
    for (flag, name) in [
        (0x40, "XBZRLE"),
        (0x80, "HOOK"),
        (0x100, "COMPRESS"),
        (0x200, "MULTIFD_FLUSH"),
    ] {
        let got = first(&part(flag));
        assert!(got.to_string().contains(name), "{got}");
    }
    assert!(matches!(first(&part(0x28)), StreamError::NoBlock { .. }));

    let mut filled = part(0x02);
    filled.push(7);
    assert!(matches!(
        first(&filled),
        StreamError::FilledPage { fill: 7, .. }
    ));

    let mut unknown = part(0x08);
    let last = unknown.len() - 1;
    unknown[last] = 0x1b;
    let got = first(&unknown);
    assert!(
        matches!(&got, StreamError::UnknownBlock { name, .. } if name == "microvm.ra\u{fffd}"),
        "{got}"
    );

    let mut other_section = part(0x02);
    other_section[4] = 9;
    assert!(matches!(
        first(&other_section),
        StreamError::UnknownSectionId {
            found: 9,
            ram: 0,
            ..
        }
    ));
}

#[test]
fn a_block_is_continued_from_one_part_to_the_next_as_qemu_does() {
    let mut second = part(0x3000 | 0x22);
    second.push(0);
    let stream = after(Way::One, "part 1", &second);
    let mut dec = Decoder::new(stream.as_slice(), layout());
    let mut last = None;
    while let Ok(event) = dec.next() {
        if let Event::ZeroPage { block, offset } = event {
            last = Some((block, offset));
        }
    }
    assert_eq!(last, Some((0, 0x3000)));
}

#[test]
fn other_ram_than_expected() {
    let refused = |source: &[(&str, u64)]| {
        let source = RamLayout::new(source.iter().copied()).unwrap();
        let mut stream = after(Way::One, "configuration", &[]);
        Encoder::new(source).ram_start(&mut stream);
        match error(&stream) {
            StreamError::Layout(mismatch) => mismatch,
            other => panic!("{other}"),
        }
    };
    let (ram, bios) = (("microvm.ram", 0x10000), ("pc.bios", 0x2000));
    let got = refused(&[("microvm.ram", 0x20000), bios]);
    assert_eq!(
        got.to_string(),
        "RAM block \"microvm.ram\" has 131072 bytes on the source and 65536 bytes here; start the \
         destination with the same --memory as the source"
    );
    assert!(matches!(refused(&[ram]), LayoutMismatch::Missing { name, .. } if name == "pc.bios"));
    assert!(matches!(
        refused(&[ram, ("vga", 0x1000), bios]),
        LayoutMismatch::Unknown { name, len: 0x1000 } if name == "vga"
    ));

    // The order is the source's business.
    let reversed = RamLayout::new([bios, ram]).unwrap();
    let mut stream = after(Way::One, "configuration", &[]);
    Encoder::new(reversed).ram_start(&mut stream);
    assert!(matches!(error(&stream), StreamError::UnexpectedEof { .. }));

    // A list that does not add up, and one that repeats itself.
    let mut start = Vec::new();
    Encoder::new(layout()).ram_start(&mut start);
    let list = |total: u64, names: &[(&str, u64)]| {
        let mut bytes = start[..17].to_vec();
        bytes.extend_from_slice(&(total | 4).to_be_bytes());
        for (name, len) in names {
            bytes.push(name.len() as u8);
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(&len.to_be_bytes());
        }
        error(&after(Way::One, "configuration", &bytes)).to_string()
    };
    assert!(list(0x20000, &[ram, ram]).contains("twice"));
    assert!(list(0x11000, &[ram, bios]).contains("announces 69632 bytes"));
}

#[test]
fn sections_and_commands_of_qemu_that_are_not_spoken() {
    let full = |name: &str| {
        let mut bytes = vec![0x04, 0, 0, 0, 9, name.len() as u8];
        bytes.extend_from_slice(name.as_bytes());
        bytes
    };
    let got = error(&after(Way::One, "ram end", &full("timer")));
    assert!(matches!(&got, StreamError::ForeignSection { idstr, .. } if idstr == "timer"));
    let got = error(&after(Way::One, "ram end", &full("vmferry/\u{1b}c")));
    assert!(matches!(got, StreamError::BadText { .. }));
    let got = error(&after(Way::One, "configuration", &[0x05]));
    assert!(got.to_string().contains("a subsection"));
    let got = error(&after(Way::Two, "ping", &[0x08, 0, 8, 0, 0]));
    assert!(got.to_string().contains("ENABLE_COLO"));
    let got = error(&after(Way::Two, "ping", &[0x08, 0x77, 0, 0, 0]));
    assert!(matches!(
        got,
        StreamError::UnsupportedCommand { number: 0x7700, .. }
    ));
}

#[test]
fn an_error_of_the_reader_keeps_its_kind() {
    struct Gone;
    impl std::io::Read for Gone {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::ConnectionReset.into())
        }
    }
    let stream = after(Way::One, "ram start", &part(0x08));
    let reader = std::io::Read::chain(stream.as_slice(), Gone);
    let mut dec = Decoder::new(reader, layout());
    let error = loop {
        if let Err(error) = dec.next() {
            break error;
        }
    };
    let StreamError::Io {
        offset,
        reading,
        source,
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((offset, reading), (stream.len() as u64, "a page"));
    assert_eq!(source.kind(), std::io::ErrorKind::ConnectionReset);
}

/// Failures are printed with their seed, not kept in a file beside the tests.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    }
}

proptest! {
    #![proptest_config(config(8192))]

    #[test]
    fn flipped_bytes(
        two in any::<bool>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1..=255u8), 1..6),
    ) {
        let pieces = sections(if two { Way::Two } else { Way::One });
        let mut stream = join(&pieces);
        // Most bytes are a page's content, where a flip changes nothing: aim past it half of the time.
        let tail = stream.len() - 400;
        for (i, (index, mask)) in flips.iter().enumerate() {
            let at = match i % 3 {
                0 => index.index(250),
                1 => tail + index.index(400),
                _ => index.index(stream.len()),
            };
            stream[at] ^= mask;
        }
        let (ends, _) = walk(&stream);
        prop_assert!(ends.iter().all(|&end| end <= stream.len() as u64));
    }

    #[test]
    fn any_bytes_behind_a_section(
        last in 0..11usize,
        kind in 0..10u8,
        bytes in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut stream = join(&sections(Way::Two)[..=last]);
        stream.push(kind);
        stream.extend_from_slice(&bytes);
        walk(&stream);
    }
}
