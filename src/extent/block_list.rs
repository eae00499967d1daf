//! The extents still to be copied, in ascending order, which suits reading and writing alike.

use super::{Extent, ExtentSet};
use crate::base::{SegmentIx, SegmentSize};

/// Extents in ascending order, coalesced. Segments are cut when they are asked for, so the memory depends on
/// the number of runs and not on the size of the device.
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

    /// The list cut at multiples of the segment size. A segment appears once for each run that reaches into
    /// it; segments ascend.
    pub fn segments(&self, size: SegmentSize) -> impl Iterator<Item = (SegmentIx, Extent)> + '_ {
        self.runs.iter().flat_map(move |run| cut(*run, size))
    }

    /// The list with at most `parts_max` (at least 1) extents in each segment, since a frame names no more.
    /// If a segment has more, its smallest gaps are filled. Their content is then copied too, so this must
    /// be decided before the origin's table says what is preserved.
    #[must_use]
    pub fn with_parts_max(&self, size: SegmentSize, parts_max: usize) -> Self {
        let mut set = ExtentSet::new();
        let mut segment: Option<(SegmentIx, Vec<Extent>)> = None;
        for (ix, part) in self.segments(size) {
            match &mut segment {
                Some((at, parts)) if *at == ix => parts.push(part),
                other => {
                    let ended = other.replace((ix, vec![part]));
                    set.extend(ended.into_iter().flat_map(|(_, parts)| join(parts, parts_max)));
                }
            }
        }
        set.extend(segment.into_iter().flat_map(|(_, parts)| join(parts, parts_max)));
        Self::from(&set)
    }
}

/// Fills the smallest gaps between the parts of a segment, until there are at most `parts_max`.
fn join(mut parts: Vec<Extent>, parts_max: usize) -> Vec<Extent> {
    let Some(excess) = parts.len().checked_sub(parts_max.max(1)).filter(|excess| *excess > 0) else {
        return parts;
    };
    let gap = |pair: &[Extent]| Extent::new(pair[0].end(), pair[1].start());
    let mut gaps: Vec<Extent> = parts.windows(2).filter_map(gap).collect();
    gaps.sort_by_key(|gap| gap.length());
    gaps.truncate(excess);
    parts.extend(gaps);
    parts
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
