//! The status of a snapshot: the text of its status line, as a type.

use serde::{Deserialize, Serialize};

use crate::base::Sectors;

/// State of a `snapshot` target (Linux `drivers/md/dm-snap.c`, `snapshot_status`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum SnapshotStatus {
    /// Sectors of the COW store: in use (including metadata), in total, and of metadata.
    Active {
        /// In use.
        used: Sectors,
        /// Total size.
        total: Sectors,
        /// The part of `used` that is header and metadata areas.
        metadata: Sectors,
    },
    /// The store failed, or was full when an original should have been preserved: the snapshot is lost.
    Invalid,
    /// The store was full when the snapshot itself was written, and the table has "O": nothing is lost, but further
    /// writes to the snapshot fail.
    Overflow,
    /// A merge failed (we never start one).
    MergeFailed,
    /// "Unknown": the store does not report its use.
    Unknown,
    /// An unknown text.
    Other {
        /// The text.
        text: String,
    },
}

impl SnapshotStatus {
    /// Parses the kernel's text.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.trim() {
            "Invalid" => return Self::Invalid,
            "Overflow" => return Self::Overflow,
            "Merge failed" => return Self::MergeFailed,
            "Unknown" => return Self::Unknown,
            _ => {}
        }
        parse_active(text.trim()).unwrap_or_else(|| Self::Other { text: text.to_owned() })
    }

    /// True if the originals of the snapshot can be trusted.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Active { .. })
    }
}

fn parse_active(text: &str) -> Option<SnapshotStatus> {
    let (fill, metadata) = text.split_once(' ')?;
    let (used, total) = fill.split_once('/')?;
    let number = |word: &str| word.parse::<u64>().ok().map(Sectors);
    let (used, total, metadata) = (number(used)?, number(total)?, number(metadata)?);
    (metadata <= used && used <= total).then_some(SnapshotStatus::Active { used, total, metadata })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn kernel_texts() {
        assert_eq!(
            SnapshotStatus::parse("16/2048 16"),
            SnapshotStatus::Active { used: Sectors(16), total: Sectors(2048), metadata: Sectors(16) }
        );
        assert_eq!(SnapshotStatus::parse("Invalid"), SnapshotStatus::Invalid);
        assert_eq!(SnapshotStatus::parse("Overflow"), SnapshotStatus::Overflow);
        assert_eq!(SnapshotStatus::parse("Merge failed"), SnapshotStatus::MergeFailed);
        assert_eq!(SnapshotStatus::parse("Unknown"), SnapshotStatus::Unknown);
        for odd in ["", "1/2", "3/2 1", "1/2 2", "a/b c", "1/2 1 1", "-1/2 0"] {
            assert!(!SnapshotStatus::parse(odd).is_usable(), "{odd}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_reads_what_is_in_order(text in "[0-9/ A-Za-z]{0,40}", a: u64, b: u64, c: u64) {
            let _ = SnapshotStatus::parse(&text);
            let mut sorted = [a, b, c];
            sorted.sort_unstable();
            let [metadata, used, total] = sorted;
            prop_assert_eq!(
                SnapshotStatus::parse(&format!("{used}/{total} {metadata}")),
                SnapshotStatus::Active { used: Sectors(used), total: Sectors(total), metadata: Sectors(metadata) }
            );
        }
    }
}
