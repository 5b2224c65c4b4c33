//! A stream out of the first level that tells where it ends.
//!
//! A port of a virtual machine does not close, so what comes through it ends with a mark: random, different in every
//! run, so nobody else says it by chance. What follows the mark up to the end of the line is the rig's own.

use std::io::{self, Read, Write};

/// Copies until the mark; what the rig itself says behind it. None if the stream ends before.
pub(crate) fn copy_until_mark(
    mut from: impl Read,
    mut to: impl Write,
    mark: &[u8],
) -> io::Result<Option<String>> {
    let mut held = Vec::new();
    let mut chunk = [0; 1 << 16];
    loop {
        let count = from.read(&mut chunk)?;
        if count == 0 {
            to.write_all(&held)?;
            to.flush()?;
            return Ok(None);
        }
        held.extend_from_slice(&chunk[..count]);
        if let Some(at) = position(&held, mark) {
            let behind = held.split_off(at + mark.len());
            to.write_all(&held[..at])?;
            to.flush()?;
            return rest_of_line(from, behind);
        }
        // All goes out at once but what may be the beginning of the mark.
        let keep = (1..mark.len().min(held.len() + 1))
            .rev()
            .find(|len| held.ends_with(&mark[..*len]))
            .unwrap_or(0);
        to.write_all(&held[..held.len() - keep])?;
        to.flush()?;
        held.drain(..held.len() - keep);
    }
}

fn position(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark)
}

fn rest_of_line(mut from: impl Read, mut text: Vec<u8>) -> io::Result<Option<String>> {
    let mut chunk = [0; 64];
    loop {
        if let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&text[..end]);
            return Ok(Some(line.into_owned()));
        }
        let count = from.read(&mut chunk)?;
        if count == 0 {
            return Ok(None);
        }
        text.extend_from_slice(&chunk[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hands out one piece a read.
    struct Pieces<'a>(Vec<&'a [u8]>);

    impl Read for Pieces<'_> {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            let piece = self.0.remove(0);
            to[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        }
    }

    fn copied(pieces: &[&'static [u8]]) -> (String, Option<String>) {
        let mut out = Vec::new();
        let end = copy_until_mark(Pieces(pieces.to_vec()), &mut out, b"@MARK").unwrap();
        (String::from_utf8(out).unwrap(), end)
    }

    #[test]
    fn the_mark_ends_the_stream_wherever_reads_are_cut() {
        let end = || Some("7".to_owned());
        assert_eq!(copied(&[b"words@MARK7\nmore"]), ("words".into(), end()));
        assert_eq!(
            copied(&[b"wo", b"rds@M", b"ARK", b"7", b"\n"]),
            ("words".into(), end())
        );
        assert_eq!(
            copied(&[b"a@MA", b"@MAR@", b"MARK7\n"]),
            ("a@MA@MAR".into(), end())
        );
        assert_eq!(copied(&[b"@MARK\n"]), (String::new(), Some(String::new())));
    }

    #[test]
    fn a_stream_without_its_mark_is_cut_off() {
        assert_eq!(copied(&[b"words@MA"]), ("words@MA".into(), None));
        assert_eq!(copied(&[b"words@MARK7"]), ("words".into(), None));
    }
}
