//! The extents still to be copied, in the order in which both sides like them: ascending.

use super::{Extent, ExtentSet};
use crate::base::{Bytes, SegmentIx, SegmentSize};

/// Extents in ascending order, coalesced; segments are cut as they are asked for, so a device of any
/// size costs no more than its runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockList {
    runs: Vec<Extent>,
}

impl BlockList {
    /// From extents in any order, overlapping or not.
    #[must_use]
    pub fn new(extents: impl IntoIterator<Item = Extent>) -> Self {
        Self::from(&extents.into_iter().collect::<ExtentSet>())
    }

    /// The runs: sorted, disjoint, no two touching.
    #[must_use]
    pub fn runs(&self) -> &[Extent] {
        &self.runs
    }

    /// Bytes in the list.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.runs.iter().map(|run| run.length()).sum()
    }

    /// The list cut at multiples of the segment size; a segment appears once for each run that it
    /// holds a part of, and segments ascend.
    pub fn segments(&self, size: SegmentSize) -> impl Iterator<Item = (SegmentIx, Extent)> + '_ {
        self.runs.iter().flat_map(move |run| cut(*run, size))
    }
}

impl From<&ExtentSet> for BlockList {
    fn from(set: &ExtentSet) -> Self {
        Self { runs: set.iter().collect() }
    }
}

/// `extent` cut at multiples of the segment size.
pub fn cut(extent: Extent, size: SegmentSize) -> impl Iterator<Item = (SegmentIx, Extent)> {
    let mut rest = Some(extent);
    std::iter::from_fn(move || {
        let extent = rest?;
        let ix = size.index_of(extent.start());
        // A segment whose end does not fit 64 bits ends with the extent.
        let segment_end = extent.start().align_down(size.bytes()).checked_add(size.bytes());
        let end = segment_end.map_or(extent.end(), |end| end.min(extent.end()));
        rest = Extent::new(end, extent.end());
        Extent::new(extent.start(), end).map(|part| (ix, part))
    })
}
