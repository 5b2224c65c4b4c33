//! Cuts a byte stream into JSON values.
//!
//! QMP values follow each other without a terminator: one may come in many packets, many in one. The cut is found by
//! counting brackets outside strings, one look at each byte, so a peer that sends a megabyte byte by byte costs a
//! megabyte's work and not its square, as parsing from the start at each packet would.
//!
//! QEMU also takes strings in single quotes, and `\'` in any string. These become what JSON has for them as the bytes
//! come in, so that what is cut out is JSON.
//!
//! How it finds its feet after rubbish, which is close to what QEMU does:
//! - a balanced `{...}` that is no JSON is reported, and reading goes on behind it;
//! - a word outside brackets (`garbage`, `nul`) is reported, and reading goes on behind it;
//! - a control character inside a string, which JSON forbids and a lost quote soon leads to, and the byte 0xFF, which
//!   UTF-8 forbids and which clients may send to clear the line, drop everything that is pending;
//! - a value that is larger or deeper than the limits ends the conversation: there is no telling where it stops.

use std::slice;

use serde_json::Value;

use crate::json;

/// Nesting that a value may have. serde_json stops at 128 of its own accord.
const MAX_DEPTH: usize = 100;

/// One thing cut out of the stream.
#[derive(Debug, PartialEq)]
pub(crate) enum Frame {
    /// A JSON value.
    Value(Value),
    /// Something else, described; the stream goes on behind it.
    Malformed(String),
    /// A value beyond the limits, described; nothing behind it can be read.
    Excessive(String),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Between values.
    Idle,
    /// Inside brackets, outside strings.
    Nested,
    /// Inside a string that ends with this quote.
    Text { quote: u8, escaped: bool },
    /// Inside a word outside brackets: a bare number, `null`, or rubbish.
    Word,
    /// Behind a value that exceeded a limit.
    Ended,
}

/// The state between bytes. Holds at most `limit` bytes.
#[derive(Debug)]
pub(crate) struct Framer {
    pending: Vec<u8>,
    state: State,
    depth: usize,
    limit: usize,
}

impl Framer {
    /// A framer for values of up to `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Framer {
            pending: Vec::new(),
            state: State::Idle,
            depth: 0,
            limit,
        }
    }

    /// Takes in `bytes` and hands what they complete to `deliver`, in order.
    pub(crate) fn push(&mut self, bytes: &[u8], mut deliver: impl FnMut(Frame)) {
        for &byte in bytes {
            if self.state == State::Word && ends_word(byte) {
                deliver(self.finish());
            }
            if let Some(frame) = self.step(byte) {
                deliver(frame);
            }
            if self.state == State::Ended {
                return;
            }
        }
    }

    fn step(&mut self, byte: u8) -> Option<Frame> {
        match (self.state, byte) {
            (State::Ended, _) => return None,
            (_, 0xff) => {
                self.reset();
                return Some(malformed("stray '\\uFFFD'"));
            }
            (State::Idle, b' ' | b'\t' | b'\r' | b'\n') => return None,
            (State::Idle, b'}' | b']') => return Some(malformed("expecting value")),
            (State::Text { .. }, 0..0x20) => {
                self.reset();
                return Some(malformed("control character inside a string"));
            }
            _ => {}
        }
        let json: &[u8] = match (self.state, byte) {
            (State::Idle | State::Nested, b'\'') => b"\"",
            (State::Text { escaped: true, .. }, b'\'') => {
                // JSON has no such escape, and needs none.
                self.pending.pop();
                b"'"
            }
            (
                State::Text {
                    quote: b'\'',
                    escaped: false,
                },
                b'\'',
            ) => b"\"",
            (
                State::Text {
                    quote: b'\'',
                    escaped: false,
                },
                b'"',
            ) => b"\\\"",
            _ => slice::from_ref(&byte),
        };
        if self.pending.len() + json.len() > self.limit {
            return Some(self.end(format!(
                "JSON token size limit exceeded: a request has at most {} bytes",
                self.limit
            )));
        }
        self.pending.extend_from_slice(json);
        match (self.state, byte) {
            (State::Idle | State::Nested, b'{' | b'[') => {
                self.depth += 1;
                self.state = State::Nested;
                if self.depth > MAX_DEPTH {
                    return Some(self.end(format!(
                        "JSON nesting depth limit exceeded: at most {MAX_DEPTH} levels"
                    )));
                }
            }
            (State::Nested, b'}' | b']') => {
                self.depth -= 1;
                return (self.depth == 0).then(|| self.finish());
            }
            (State::Idle | State::Nested, quote @ (b'"' | b'\'')) => {
                self.state = State::Text {
                    quote,
                    escaped: false,
                }
            }
            (State::Idle, _) => self.state = State::Word,
            (State::Text { quote, escaped }, _) if escaped || byte == b'\\' => {
                self.state = State::Text {
                    quote,
                    escaped: !escaped,
                }
            }
            (State::Text { quote, .. }, _) if byte == quote => {
                if self.depth == 0 {
                    return Some(self.finish());
                }
                self.state = State::Nested;
            }
            _ => {}
        }
        None
    }

    fn finish(&mut self) -> Frame {
        let frame = match json::from_slice(&self.pending) {
            Ok(value) => Frame::Value(value),
            Err(error) if error.is_data() => malformed("duplicate key"),
            Err(_) if self.state == State::Word => malformed(&format!(
                "invalid keyword '{}'",
                String::from_utf8_lossy(&self.pending)
            )),
            Err(error) => malformed(&error.to_string()),
        };
        self.reset();
        frame
    }

    fn end(&mut self, description: String) -> Frame {
        self.reset();
        self.state = State::Ended;
        Frame::Excessive(description)
    }

    fn reset(&mut self) {
        // A large request should not leave a large buffer behind for the life of the connection.
        self.pending = Vec::new();
        self.state = State::Idle;
        self.depth = 0;
    }
}

/// A word ends where nothing that belongs to a number or a name goes on.
fn ends_word(byte: u8) -> bool {
    byte.is_ascii_whitespace()
        || matches!(byte, b'{' | b'[' | b'}' | b']' | b'"' | b'\'' | b',' | b':')
}

fn malformed(what: &str) -> Frame {
    Frame::Malformed(format!("JSON parse error, {what}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cut(limit: usize, pieces: &[&[u8]]) -> Vec<Frame> {
        let mut framer = Framer::new(limit);
        let mut frames = Vec::new();
        for piece in pieces {
            framer.push(piece, |frame| frames.push(frame));
        }
        frames
    }

    #[test]
    fn values_need_no_terminator_and_may_come_in_any_pieces() {
        let text = br#" {"a":"}{\"\\"}[1,[2]]"x" {"b":{}} 17 "#;
        let expected = vec![
            Frame::Value(json!({"a": "}{\"\\"})),
            Frame::Value(json!([1, [2]])),
            Frame::Value(json!("x")),
            Frame::Value(json!({"b": {}})),
            Frame::Value(json!(17)),
        ];
        assert_eq!(cut(64, &[text]), expected);
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(cut(64, &bytes), expected);
        for split in 0..text.len() {
            let (head, tail) = text.split_at(split);
            assert_eq!(cut(64, &[head, tail]), expected, "split at {split}");
        }
    }

    #[test]
    fn reading_goes_on_behind_rubbish() {
        for rubbish in [
            &b"garbage "[..],
            b"nul\n",
            b"}",
            b"@@@ ",
            b"{\"a\" 5}",
            b"{]",
            b"{\"a\": \"lost\n",
            b"{\"a\": [\xff",
            b"{\"\xc3\x28\": 1}",
        ] {
            let frames = cut(64, &[rubbish, b"{}"]);
            assert_eq!(frames.len(), 2, "{frames:?}");
            assert!(
                matches!(&frames[0], Frame::Malformed(text) if text.starts_with("JSON parse error, ")),
                "{frames:?}"
            );
            assert_eq!(frames[1], Frame::Value(json!({})));
        }
    }

    #[test]
    fn wording_of_words_is_qemus() {
        let keyword = Frame::Malformed("JSON parse error, invalid keyword 'garbage'".into());
        assert_eq!(cut(64, &[b"garbage{}"])[0], keyword);
        let stray = Frame::Malformed("JSON parse error, expecting value".into());
        assert_eq!(cut(64, &[b"}"])[0], stray);
    }

    #[test]
    fn single_quotes_are_quotes() {
        for (text, value) in [
            (&br#"{'a': 'b"c'}"#[..], json!({"a": "b\"c"})),
            (br#"{"a": 'it\'s'}"#, json!({"a": "it's"})),
            (br#"{"a": "it's"}"#, json!({"a": "it's"})),
            (br#"{"a": "it\'s"}"#, json!({"a": "it's"})),
            (br#"{'\\': '\"'}"#, json!({"\\": "\""})),
            (br"'}{'", json!("}{")),
        ] {
            assert_eq!(cut(64, &[text]), [Frame::Value(value.clone())]);
            let bytes: Vec<_> = text.chunks(1).collect();
            assert_eq!(cut(64, &bytes), [Frame::Value(value)]);
        }
        // They take no more room than there is.
        let quotes = [&b"'"[..], &[b'"'; 40], b"'"].concat();
        assert!(matches!(cut(64, &[&quotes])[..], [Frame::Excessive(_)]));
    }

    #[test]
    fn of_two_members_with_one_name_none_counts() {
        for text in [r#"{"a":1,"a":1}"#, r#"[{"b":{"a":1,"c":2,'a':3}}]"#] {
            let twice = Frame::Malformed("JSON parse error, duplicate key".into());
            assert_eq!(cut(64, &[text.as_bytes()]), [twice]);
        }
    }

    #[test]
    fn a_value_beyond_a_limit_ends_the_stream() {
        let deep = [b'['; MAX_DEPTH + 1];
        let long = br#"{"a":"0123456789"}"#;
        for (limit, bytes, word) in [(4096, &deep[..], "nesting"), (16, long, "size")] {
            let frames = cut(limit, &[bytes, b"{}"]);
            assert_eq!(frames.len(), 1, "{frames:?}");
            assert!(
                matches!(&frames[0], Frame::Excessive(text) if text.contains(word)),
                "{frames:?}"
            );
        }
        assert_eq!(cut(long.len(), &[long]).len(), 1);
        let mut level = vec![b'['; MAX_DEPTH];
        level.extend(vec![b']'; MAX_DEPTH]);
        assert!(matches!(cut(4096, &[&level])[..], [Frame::Value(_)]));
    }

    #[test]
    fn any_bytes_are_survived() {
        // A small deterministic generator of bracket-heavy noise.
        let alphabet = b"{}[]\"',:\\ 1an\n\xff\x00\xc3";
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        for _ in 0..2_000 {
            let mut noise = Vec::new();
            for _ in 0..64 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                noise.push(alphabet[(seed % alphabet.len() as u64) as usize]);
            }
            let mut framer = Framer::new(32);
            framer.push(&noise, |_| {});
            assert!(framer.pending.len() <= 32);
        }
    }
}
