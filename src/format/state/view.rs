//! The progress of a copy, for display: one JSON object, replaced a few times a second (see FORMAT.md).
//!
//! No decision depends on it, so it has no checksum and is never synced; one that does not decode counts as
//! absent.

use serde::{Deserialize, Serialize};

use crate::base::{Bytes, Error, Result};

/// Longest view, in bytes.
pub const VIEW_BYTES_MAX: usize = 64 << 10;

/// The version that is written, and the only one that is read.
pub const VIEW_VERSION: u32 = 1;

/// One snapshot of a copy's progress. Unknown values are None.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressView {
    /// [`VIEW_VERSION`].
    pub version: u32,
    /// When it was written, UTC, in nanoseconds since 1970.
    pub updated_utc_ns: u64,
    /// "prepare", "instant", "data", "originals", "verify", "finish".
    pub phase: String,
    /// Bytes of the phase done.
    pub done_bytes: Bytes,
    /// Bytes of the phase in all.
    pub total_bytes: Option<Bytes>,
    /// Measured over the recent past.
    pub rate_bytes_per_second: Option<Bytes>,
    /// Segments on the secondary, in the data phase.
    pub segments_done: Option<u64>,
    /// Segments to be copied in all.
    pub segments_total: Option<u64>,
    /// The COW store.
    pub store: Option<StoreView>,
    /// The regions released so far.
    pub regions: Option<RegionsView>,
    /// The applications' I/O on the origin.
    pub origin: Option<OriginView>,
    /// The path of the origin, if several are copied together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin_path: Option<String>,
}

/// The COW store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreView {
    /// Bytes in use, metadata included.
    pub used_bytes: Bytes,
    /// Bytes it has.
    pub total_bytes: Bytes,
    /// Bytes in use in RAM.
    pub ram_used_bytes: Bytes,
    /// Bytes in use on disk.
    pub disk_used_bytes: Bytes,
    /// Exceptions.
    pub exceptions: u64,
    /// New ones per second.
    pub exceptions_per_second: u64,
}

/// The regions released so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionsView {
    /// Regions released.
    pub released: u64,
    /// Regions in all.
    pub total: u64,
    /// Bytes released.
    pub released_bytes: Bytes,
    /// The longest time for which a release held the origin, microseconds.
    pub longest_stall_us: u64,
}

/// The applications' I/O on the origin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginView {
    /// Mean time of their reads and writes, microseconds; None while they do none.
    pub latency_us: Option<u64>,
    /// Their latency without the copier, as last sampled.
    pub baseline_us: Option<u64>,
    /// The rate at which the copier may read; None for no limit.
    pub allowed_bytes_per_second: Option<Bytes>,
}

impl Default for ProgressView {
    fn default() -> Self {
        Self {
            version: VIEW_VERSION,
            updated_utc_ns: 0,
            phase: String::new(),
            done_bytes: Bytes::ZERO,
            total_bytes: None,
            rate_bytes_per_second: None,
            segments_done: None,
            segments_total: None,
            store: None,
            regions: None,
            origin: None,
            origin_path: None,
        }
    }
}

impl ProgressView {
    /// The encoded view: one line.
    ///
    /// # Errors
    /// None in practice: its keys are strings.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(self)
            .map_err(|source| Error::bad_data("encoding the progress view failed").with_source(source))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// The view in `bytes`; None for anything else. Fields that this program does not know are ignored.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > VIEW_BYTES_MAX {
            return None;
        }
        serde_json::from_slice(bytes).ok().filter(|view: &Self| view.version == VIEW_VERSION)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn view() -> ProgressView {
        ProgressView {
            updated_utc_ns: 1_763_712_000_000_000_000,
            phase: "data".to_owned(),
            done_bytes: Bytes::mib(20),
            total_bytes: Some(Bytes::mib(100)),
            rate_bytes_per_second: Some(Bytes::mib(10)),
            segments_done: Some(20),
            segments_total: Some(100),
            store: Some(StoreView {
                used_bytes: Bytes::mib(12),
                total_bytes: Bytes::gib(1),
                ram_used_bytes: Bytes::mib(4),
                disk_used_bytes: Bytes::mib(8),
                exceptions: 3012,
                exceptions_per_second: 40,
            }),
            regions: Some(RegionsView {
                released: 1,
                total: 5,
                released_bytes: Bytes::mib(20),
                longest_stall_us: 1500,
            }),
            origin: Some(OriginView {
                latency_us: Some(1200),
                baseline_us: None,
                allowed_bytes_per_second: Some(Bytes::mib(50)),
            }),
            ..ProgressView::default()
        }
    }

    #[test]
    fn the_golden_file_of_version_1_is_read_and_written_the_same() {
        let golden: &[u8] = include_bytes!("golden/progress-v1.json");
        assert_eq!(ProgressView::decode(golden), Some(view()));
        assert_eq!(view().encode().unwrap(), golden);
    }

    #[test]
    fn unknown_fields_are_ignored_and_other_versions_refused() {
        let text = String::from_utf8(view().encode().unwrap()).unwrap();
        let more = text.replacen('{', "{\"new\":[1],", 1);
        assert_eq!(ProgressView::decode(more.as_bytes()), Some(view()));
        let other = text.replacen("\"version\":1", "\"version\":2", 1);
        assert_ne!(other, text);
        assert_eq!(ProgressView::decode(other.as_bytes()), None);
        for cut in 0..text.len() - 1 {
            assert_eq!(ProgressView::decode(&text.as_bytes()[..cut]), None, "cut at {cut}");
        }
        let long = text.trim_end().to_owned() + &" ".repeat(VIEW_BYTES_MAX);
        assert_eq!(ProgressView::decode(long.as_bytes()), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = ProgressView::decode(&bytes);
        }
    }
}
