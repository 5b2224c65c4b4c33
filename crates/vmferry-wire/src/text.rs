//! Text from a peer, made safe to show on a terminal.

/// Whether `c` may be shown as it is: no control, format (text direction) or unassigned character.
fn is_printable(c: char) -> bool {
    // `escape_debug` follows Unicode's tables; quotes and the backslash are the printable ones it escapes.
    matches!(c, '\'' | '"' | '\\') || c.escape_debug().len() == 1
}

/// Whether all of `name` may be shown as it is.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(is_printable)
}

/// `bytes` as one line that can be shown: what is not printable becomes U+FFFD, line breaks become spaces.
pub(crate) fn one_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| match c {
            '\n' | '\r' | '\t' => ' ',
            c if is_printable(c) => c,
            _ => char::REPLACEMENT_CHARACTER,
        })
        .collect()
}

/// The longest beginning of `text` that has at most `limit` bytes and ends between two characters.
pub(crate) fn truncate(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_escapes_and_direction_marks_do_not_survive() {
        let shown = one_line(b"no \x1b[31mroom\x07\nfor \xe2\x80\xaepage \xff 'x' \\ \"y\"");
        assert_eq!(
            shown,
            "no \u{fffd}[31mroom\u{fffd} for \u{fffd}page \u{fffd} 'x' \\ \"y\""
        );
        assert!(!is_name("a\u{202e}b"));
        assert!(is_name("/rom@etc/acpi/tables"));
        assert!(!is_name(""));
    }

    #[test]
    fn truncation_keeps_characters_whole() {
        assert_eq!(truncate("aé", 2), "a");
        assert_eq!(truncate("aé", 3), "aé");
        assert_eq!(truncate("aé", 0), "");
    }
}
