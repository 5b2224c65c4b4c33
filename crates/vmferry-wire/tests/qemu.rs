//! A stream written by QEMU decodes up to its device sections, which are QEMU's own.
//!
//! Runs `qemu-system-x86_64` (8.2 or later, without KVM) if it is installed, and says so if it is not.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use vmferry_wire::{Decoder, Event, LayoutMismatch, RamLayout, StreamError};

const MEMORY_MIB: u64 = 16;

/// The migration stream of a paused microvm, or `None` if QEMU is not installed.
fn qemu_stream() -> Option<Vec<u8>> {
    let file = std::env::temp_dir().join(format!("vmferry-wire-{}.qemu", std::process::id()));
    let memory = format!("{MEMORY_MIB}");
    let child = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm", "-accel", "tcg", "-m", &memory, "-S"])
        .args(["-nodefaults", "-display", "none", "-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return None;
    };
    let mut stdin = child.stdin.take().expect("piped");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let uri = format!("file:{}", file.display());
    let mut events = serde_json::Map::new();
    events.insert("capability".to_owned(), "events".into());
    events.insert("state".to_owned(), true.into());
    for (command, arguments) in [
        ("qmp_capabilities", serde_json::json!({})),
        (
            "migrate-set-capabilities",
            serde_json::json!({"capabilities": [events]}),
        ),
        ("migrate", serde_json::json!({"uri": uri})),
    ] {
        let request = serde_json::json!({"execute": command, "arguments": arguments});
        writeln!(stdin, "{request}").expect("QEMU reads its monitor");
    }
    let completed = lines.any(|line| {
        let line = line.expect("QEMU writes to its monitor");
        assert!(
            !line.contains("\"error\"") && !line.contains("\"failed\""),
            "{line}"
        );
        line.contains("\"completed\"")
    });
    assert!(completed, "QEMU ended before its migration did");
    writeln!(stdin, "{}", serde_json::json!({"execute": "quit"})).expect("QEMU reads its monitor");
    child.wait().expect("QEMU ends");
    let stream = std::fs::read(&file).expect("QEMU wrote the stream");
    std::fs::remove_file(&file).expect("the file is ours");
    Some(stream)
}

#[test]
fn up_to_its_device_sections() {
    let Some(stream) = qemu_stream() else { return };
    // Besides its RAM, a microvm has blocks for firmware and tables, which vary with QEMU's version: learn
    // them from the decoder's own refusals.
    let mut blocks = vec![("microvm.ram".to_owned(), MEMORY_MIB << 20)];
    let error = loop {
        let layout = RamLayout::new(blocks.clone()).expect("QEMU's blocks are valid");
        match walk(&stream, layout) {
            StreamError::Layout(LayoutMismatch::Unknown { name, len }) => blocks.push((name, len)),
            other => break other,
        }
    };
    let StreamError::ForeignSection { offset, idstr } = error else {
        panic!("{error}");
    };
    eprintln!("first section of QEMU's own: {idstr:?} at byte {offset}; blocks {blocks:?}");
    assert!(blocks.len() > 1);
}

/// Decodes up to an error, and checks that RAM arrived whole if it got that far.
fn walk(stream: &[u8], layout: RamLayout) -> StreamError {
    let total = layout.total();
    let mut dec = Decoder::new(stream, layout);
    let mut pages = HashSet::new();
    loop {
        match dec.next() {
            Ok(Event::Configuration { machine }) => assert_eq!(machine, "microvm"),
            Ok(Event::Page { block, offset, .. } | Event::ZeroPage { block, offset }) => {
                pages.insert((block, offset));
            }
            Ok(Event::RamPartEnd { last: true }) => {
                assert_eq!(pages.len() as u64 * 4096, total);
            }
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}
