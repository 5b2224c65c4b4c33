//! What a guest tells of its memory, in a buffer that the device keeps until it wants to be told again.

use std::collections::BTreeMap;

/// Bytes of a statistic: its tag, then its value.
pub(super) const ENTRY: usize = 10;

/// The statistics by tag, as QEMU calls them.
const NAMES: [&str; 10] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free-memory",
    "total-memory",
    "available-memory",
    "disk-caches",
    "hugetlb-allocations",
    "hugetlb-failures",
];

/// Reads what the guest has told; entries without a meaning are left out.
pub(super) fn parse(bytes: &[u8]) -> BTreeMap<&'static str, u64> {
    let entry = |entry: &[u8; ENTRY]| {
        let [tag_low, tag_high, value @ ..] = *entry;
        let tag = u16::from_le_bytes([tag_low, tag_high]);
        let value = u64::from_le_bytes(value);
        // A guest that does not know says so with all bits.
        let name = NAMES.get(usize::from(tag)).filter(|_| value != u64::MAX)?;
        Some((*name, value))
    };
    bytes.as_chunks().0.iter().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_nothing_is_left_out() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 1u64 << 20), (5, u64::MAX), (10, 1), (0, 7)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([1, 0, 3]);
        let told = BTreeMap::from([("free-memory", 1 << 20), ("swap-in", 7)]);
        assert_eq!(parse(&bytes), told);
    }
}
