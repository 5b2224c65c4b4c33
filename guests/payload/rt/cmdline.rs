//! The command line: `key=value` words between spaces.

/// The `key=value` words of a command line. A word without `=` has an empty value. What VMMs append on
/// their own (QEMU's `virtio_mmio.device=...`) is left out.
pub fn words(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.split_ascii_whitespace()
        .filter(|word| !word.starts_with("virtio_mmio."))
        .map(|word| word.split_once('=').unwrap_or((word, "")))
}

/// A number of bytes: decimal digits, then nothing, `K`, `M` or `G` (powers of 1024).
pub fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    number(digits)?.checked_mul(1 << shift)
}

/// A decimal number, digits only.
pub fn number(text: &str) -> Option<u64> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_at_spaces_and_the_first_equals_sign() {
        let line = " ws=64M  quiet virtio_mmio.device=512@0xfeb00000:5 a=b=c ";
        let all: Vec<_> = words(line).collect();
        assert_eq!(all, [("ws", "64M"), ("quiet", ""), ("a", "b=c")]);
        assert_eq!(words("").count(), 0);
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(bytes("4096"), Some(4096));
        assert_eq!(bytes("4K"), Some(4096));
        assert_eq!(bytes("64M"), Some(64 << 20));
        assert_eq!(bytes("2g"), Some(2 << 30));
        for bad in [
            "",
            "M",
            "-1",
            "+1",
            "1.5G",
            "1T",
            "64MB",
            "99999999999G",
            "é",
        ] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }
}
