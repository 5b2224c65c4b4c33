//! Sizes, bandwidths and durations the way people write them on a command line.
//!
//! A suffix of one letter is binary, as in QEMU: `64M` is 64 MiB. `64MiB` says so; `64MB` is 64 million bytes, as the
//! `B` without an `i` is how decimal sizes are written. Case is free but for a lone `b`, which would be bits and which
//! is refused rather than taken for bytes.

use std::time::Duration;

use bytesize::ByteSize;

/// A size, bandwidth or duration that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error(
        "'{0}' is no size: write a number with K, M, G, T (times 1024 each), KiB, MiB, ..., or kB, MB, ... (times 1000 each), such as 64M or 1.5GiB"
    )]
    Size(String),
    /// Bits where bytes are meant.
    #[error("'{0}' has a small b, which means bits: write bytes, such as 1GiB or 1GB")]
    Bits(String),
    /// Above what 64 bits hold.
    #[error("'{0}' is too large")]
    TooLarge(String),
    /// Not a duration.
    #[error(
        "'{text}' is no duration: {reason}; write a number with us, ms, s, min or h, such as 300ms or 2s"
    )]
    Duration {
        /// What was written.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Reads a size, in bytes: `4096`, `64M`, `1.5GiB`, `100 MB`.
///
/// # Errors
/// [`UnitError`] if it is no size, or above 2^64 - 2 bytes.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let trimmed = text.trim();
    if trimmed.ends_with('b') {
        return Err(UnitError::Bits(text.to_owned()));
    }
    let explicit = match trimmed.chars().last() {
        Some('0'..='9') => format!("{trimmed}B"),
        Some(last) if "kmgtpeKMGTPE".contains(last) => format!("{trimmed}iB"),
        _ => trimmed.to_owned(),
    };
    match explicit.parse() {
        // What is above the range is made the end of the range.
        Ok(ByteSize(u64::MAX)) => Err(UnitError::TooLarge(text.to_owned())),
        Ok(ByteSize(size)) => Ok(size),
        Err(_) => Err(UnitError::Size(text.to_owned())),
    }
}

/// Reads a bandwidth, in bytes per second: a size, with or without `/s` behind it. 0 stands for no limit, as it does in
/// QEMU's `max-bandwidth`.
///
/// # Errors
/// As for [`parse_size`].
pub fn parse_bandwidth(text: &str) -> Result<u64, UnitError> {
    parse_size(text.trim().strip_suffix("/s").unwrap_or(text))
}

/// Reads a duration: `300ms`, `2s`, `1min 30s`. A number without a unit is refused, as QEMU would take milliseconds
/// in one place and seconds in another.
///
/// # Errors
/// [`UnitError::Duration`].
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    humantime::parse_duration(text.trim()).map_err(|reason| UnitError::Duration {
        text: text.to_owned(),
        reason: reason.to_string(),
    })
}

/// Writes a size in bytes for people, in binary units: `1.5 GiB`.
pub fn format_size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// Writes a bandwidth in bytes per second for people: `1.5 GiB/s`.
pub fn format_bandwidth(bytes_per_second: u64) -> String {
    format!("{}/s", format_size(bytes_per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, size) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64M", 64 << 20),
            ("64m", 64 << 20),
            ("64MiB", 64 << 20),
            ("64 MiB", 64 << 20),
            ("64Mi", 64 << 20),
            ("64MB", 64_000_000),
            ("1k", 1024),
            ("1kB", 1000),
            ("1.5G", 3 << 29),
            (" 2T ", 2 << 40),
            ("9007199254740993", 9_007_199_254_740_993),
        ] {
            assert_eq!(parse_size(text), Ok(size), "for {text}");
        }
    }

    #[test]
    fn what_is_no_size_is_named() {
        for text in [
            "", "M", "-1", "1X", "1 2", "1,5G", "0x10", "1..5G", "NaN", "inf",
        ] {
            assert_eq!(parse_size(text), Err(UnitError::Size(text.into())));
        }
        for text in ["1Gb", "1Gib", "1b"] {
            assert_eq!(parse_size(text), Err(UnitError::Bits(text.into())));
        }
        for text in [
            "99999999E",
            "99999999999999999999999",
            "18446744073709551615",
        ] {
            assert_eq!(parse_size(text), Err(UnitError::TooLarge(text.into())));
        }
    }

    #[test]
    fn bandwidths() {
        assert_eq!(parse_bandwidth("1GiB/s"), Ok(1 << 30));
        assert_eq!(parse_bandwidth("1G"), Ok(1 << 30));
        assert_eq!(parse_bandwidth("125 MB/s"), Ok(125_000_000));
        assert_eq!(parse_bandwidth("0"), Ok(0));
        assert!(parse_bandwidth("1Gb/s").is_err());
        assert!(parse_bandwidth("/s").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse_duration("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_duration("1min 30s"), Ok(Duration::from_secs(90)));
        for text in ["", "300", "-1s", "1x", "1.2.3s"] {
            let error = parse_duration(text).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("'{text}' is no duration: ")),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        assert_eq!(format_size(3 << 29), "1.5 GiB");
        assert_eq!(format_bandwidth(1 << 20), "1.0 MiB/s");
        assert_eq!(parse_size(&format_size(3 << 29)), Ok(3 << 29));
        assert_eq!(parse_bandwidth(&format_bandwidth(1 << 20)), Ok(1 << 20));
    }
}
