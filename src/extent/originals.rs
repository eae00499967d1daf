//! Originals in the order in which they are applied to a copy.

use super::{Original, block_list};
use crate::base::{Bytes, SegmentIx, SegmentSize};
use crate::extent::Extent;

impl Original {
    /// The part of this original for `extent`, if any.
    #[must_use]
    pub fn part(&self, extent: Extent) -> Option<Self> {
        let part = self.extent.intersection(extent)?;
        Some(Self { extent: part, store_offset: self.store_offset + (part.start() - self.extent.start()) })
    }

    /// True if `next` directly follows this one both on the origin and in the store.
    #[must_use]
    pub fn continues_with(&self, next: &Self) -> bool {
        self.extent.end() == next.extent.start()
            && self.store_offset.checked_add(self.extent.length()) == Some(next.store_offset)
    }
}

/// Sorts by destination, and merges originals that follow each other on both sides.
#[must_use]
pub fn arrange(mut originals: Vec<Original>) -> Vec<Original> {
    originals.sort_unstable();
    originals.dedup_by(|next, last| {
        let continues = last.continues_with(next);
        if continues {
            last.extent =
                Extent::new(last.extent.start(), next.extent.end()).expect("the next ends after the last");
        }
        continues
    });
    originals
}

/// The originals of each segment of the destination, cut at segment ends. `originals`: the result of
/// [`arrange`]. Holds the originals of one segment at a time.
pub fn by_segment(
    originals: &[Original],
    size: SegmentSize,
) -> impl Iterator<Item = (SegmentIx, Vec<Original>)> + '_ {
    let parts = originals.iter().flat_map(move |original| {
        block_list::cut(original.extent, size)
            .filter_map(move |(ix, extent)| original.part(extent).map(|part| (ix, part)))
    });
    let mut parts = parts.peekable();
    std::iter::from_fn(move || {
        let (ix, first) = parts.next()?;
        let mut group = vec![first];
        while let Some((_, part)) = parts.next_if(|(next, _)| *next == ix) {
            group.push(part);
        }
        Some((ix, group))
    })
}

/// Bytes of `originals` together.
#[must_use]
pub fn total(originals: &[Original]) -> Bytes {
    originals.iter().map(|original| original.extent.length()).sum()
}
