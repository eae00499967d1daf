//! The segments that an earlier process has placed: one byte for each if there was such a process, else
//! nothing.

use super::schedule::Schedule;
use crate::base::{Bytes, SegmentIx};
use crate::secondary::PlacedSegment;

/// A set of segments.
#[derive(Clone, Debug, Default)]
pub struct PlacedSet {
    placed: Vec<bool>,
}

impl PlacedSet {
    /// For an origin of `segment_count` segments; segments past its end are ignored.
    pub(super) fn new(segments: &[PlacedSegment], segment_count: u64) -> Self {
        if segments.is_empty() {
            return Self::default();
        }
        let mut placed = vec![false; Bytes(segment_count).as_len()];
        for segment in segments {
            if let Some(entry) = placed.get_mut(Bytes(segment.ix.get()).as_len()) {
                *entry = true;
            }
        }
        Self { placed }
    }

    pub(super) fn contains(&self, ix: SegmentIx) -> bool {
        self.placed.get(Bytes(ix.get()).as_len()).copied().unwrap_or(false)
    }

    /// Bytes of the block list in these segments.
    pub(super) fn bytes(&self, schedule: &Schedule) -> Bytes {
        if self.placed.is_empty() {
            return Bytes::ZERO;
        }
        schedule.works().filter(|work| self.contains(work.ix)).map(|work| work.valid_bytes()).sum()
    }

    /// The number of segments in the set.
    pub(super) fn count(&self) -> u64 {
        Bytes::from_len(self.placed.iter().filter(|placed| **placed).count()).get()
    }
}
