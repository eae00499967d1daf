//! Divides a block list into segments, lazily.
//!
//! Pure. Memory: the block list itself; segments are created when they are asked for.

use crate::base::limits::{DIRECT_IO_ALIGN, SEGMENT_COUNT_MAX};
use crate::base::{Bytes, Error, Result, SegmentIx, SegmentSize};
use crate::extent::Extent;

/// One segment to be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its index.
    pub ix: SegmentIx,
    /// The whole segment, or less at the origin's end.
    pub extent: Extent,
    /// The parts of it in the block list; sorted, disjoint, at least one.
    pub valid: Vec<Extent>,
}

impl Work {
    /// Bytes of the parts in the block list.
    #[must_use]
    pub fn valid_bytes(&self) -> Bytes {
        self.valid.iter().map(|extent| extent.length()).sum()
    }
}

/// A block list and its segments.
#[derive(Clone, Debug)]
pub struct Schedule {
    extents: Vec<Extent>,
    size: Bytes,
    segment: SegmentSize,
}

impl Schedule {
    /// `extents`: what to copy of an origin of `size` bytes; sorted, disjoint, cut at multiples of
    /// [`DIRECT_IO_ALIGN`] or the origin's end.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) if they are not, or if the origin has more than
    /// [`SEGMENT_COUNT_MAX`] segments.
    pub fn new(extents: Vec<Extent>, size: Bytes, segment: SegmentSize) -> Result<Self> {
        segment_size_for(size, Some(segment))?;
        let mut last = Bytes::ZERO;
        for extent in &extents {
            let cut = |at: Bytes| at == size || at.is_aligned(DIRECT_IO_ALIGN);
            if extent.start() < last || extent.end() > size || !cut(extent.start()) || !cut(extent.end()) {
                return Err(Error::usage(format!(
                    "extent {extent} of the block list is out of order, unaligned, or past the origin's \
                     end at {}",
                    size.get()
                )));
            }
            last = extent.end();
        }
        Ok(Self { extents, size, segment })
    }

    /// The origin's size.
    #[must_use]
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// The segment size.
    #[must_use]
    pub fn segment(&self) -> SegmentSize {
        self.segment
    }

    /// Segments of the whole origin, those outside the block list included.
    #[must_use]
    pub fn segment_count(&self) -> u64 {
        self.segment.count_for(self.size)
    }

    /// Bytes in the block list.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.extents.iter().map(|extent| extent.length()).sum()
    }

    /// The number of segments that [`Schedule::works`] returns, without creating them.
    #[must_use]
    pub fn work_count(&self) -> u64 {
        let mut next = SegmentIx(0);
        let mut count = 0;
        for extent in &self.extents {
            let end = self.segment.count_for(extent.end());
            let start = self.segment.index_of(extent.start()).max(next);
            count += end.saturating_sub(start.get());
            next = next.max(SegmentIx(end));
        }
        count
    }

    /// The ranges that are not in the block list, in order.
    pub fn gaps(&self) -> impl Iterator<Item = Extent> + '_ {
        let ends = self.extents.iter().map(|extent| extent.end());
        let starts = self.extents.iter().map(|extent| extent.start());
        std::iter::once(Bytes::ZERO)
            .chain(ends)
            .zip(starts.chain(std::iter::once(self.size)))
            .filter_map(|(start, end)| Extent::new(start, end))
    }

    /// The segments that hold a part of the block list, in order.
    pub fn works(&self) -> impl Iterator<Item = Work> + '_ {
        let mut next = Bytes::ZERO;
        std::iter::from_fn(move || {
            let at = self.extents.partition_point(|extent| extent.end() <= next);
            let start = self.extents.get(at)?.start().max(next);
            let work = self.work(self.segment.index_of(start))?;
            next = work.extent.end();
            Some(work)
        })
    }

    /// One segment, or None if no part of it is in the block list.
    #[must_use]
    pub fn work(&self, ix: SegmentIx) -> Option<Work> {
        let start = self.segment.offset_of(ix)?;
        let extent = Extent::new(start, self.size.min(start.checked_add(self.segment.bytes())?))?;
        let valid = self.parts_of(extent);
        (!valid.is_empty()).then_some(Work { ix, extent, valid })
    }

    /// The parts of `extent` that are in the block list.
    #[must_use]
    pub fn parts_of(&self, extent: Extent) -> Vec<Extent> {
        let at = self.extents.partition_point(|listed| listed.end() <= extent.start());
        self.extents[at..].iter().map_while(|listed| listed.intersection(extent)).collect()
    }
}

/// The segment size for an origin: the requested one, else 1 MiB, else the smallest one that keeps the number
/// of segments within [`SEGMENT_COUNT_MAX`].
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) if the requested size is too small (the error names
/// the size to use), or if the origin is too large for any size.
pub fn segment_size_for(origin_size: Bytes, requested: Option<SegmentSize>) -> Result<SegmentSize> {
    let fits = |size: SegmentSize| size.count_for(origin_size) <= SEGMENT_COUNT_MAX;
    let mut smallest = requested.map_or(SegmentSize::default().bytes(), SegmentSize::bytes);
    let needed = loop {
        let Ok(size) = SegmentSize::new(smallest) else {
            return Err(Error::usage(format!(
                "an origin of {origin_size} needs more than {SEGMENT_COUNT_MAX} segments of {}",
                SegmentSize::MAX
            )));
        };
        if fits(size) {
            break size;
        }
        smallest = smallest * 2;
    };
    match requested {
        Some(size) if size != needed => Err(Error::usage(format!(
            "segments of {size} are too small for an origin of {origin_size}: a copy has at most \
             {SEGMENT_COUNT_MAX} segments"
        ))
        .next(format!("use --segment {}KiB or omit --segment", needed.bytes().get() / 1024))),
        _ => Ok(needed),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::ErrorKind;

    fn extent(start: u64, end: u64) -> Extent {
        Extent::new(Bytes(start), Bytes(end)).unwrap()
    }

    #[test]
    fn segment_sizes_grow_with_the_origin() {
        let size = |origin| segment_size_for(origin, None).unwrap().bytes();
        assert_eq!(size(Bytes(1)), Bytes::mib(1));
        assert_eq!(size(Bytes::gib(4096)), Bytes::mib(1));
        assert_eq!(size(Bytes(Bytes::gib(4096).0 + 1)), Bytes::mib(2));
        assert_eq!(size(Bytes::gib(16 * 1024)), Bytes::mib(4));
        assert_eq!(segment_size_for(Bytes::gib(1 << 20), None).unwrap_err().kind(), ErrorKind::Usage);
        let small = SegmentSize::new(Bytes::kib(64)).unwrap();
        assert_eq!(segment_size_for(Bytes::gib(256), Some(small)).unwrap(), small);
        let error = segment_size_for(Bytes::gib(257), Some(small)).unwrap_err();
        assert_eq!(error.next_step(), Some("use --segment 128KiB or omit --segment"));
    }

    #[test]
    fn block_lists_are_checked() {
        let segment = SegmentSize::new(Bytes::kib(64)).unwrap();
        for bad in [
            vec![extent(0, 4097)],
            vec![extent(0, 16384)],
            vec![extent(4096, 8192), extent(0, 4096)],
            vec![extent(512, 4096)],
        ] {
            assert!(Schedule::new(bad, Bytes(10_000), segment).is_err());
        }
        Schedule::new(vec![extent(0, 10_000)], Bytes(10_000), segment).unwrap();
    }

    proptest! {
        #[test]
        fn works_cover_the_block_list_exactly(pages in prop::collection::vec(any::<bool>(), 1..200), tail in 1u64..=4096) {
            let size = Bytes((u64::try_from(pages.len()).unwrap() - 1) * 4096 + tail);
            let mut extents: Vec<Extent> = Vec::new();
            for (page, _) in pages.iter().enumerate().filter(|(_, listed)| **listed) {
                let start = Bytes::from_len(page) * 4096;
                let end = size.min(start + Bytes(4096));
                match extents.last_mut() {
                    Some(last) if last.end() == start => *last = Extent::new(last.start(), end).unwrap(),
                    _ => extents.push(Extent::new(start, end).unwrap()),
                }
            }
            let segment = SegmentSize::new(Bytes::kib(64)).unwrap();
            let schedule = Schedule::new(extents.clone(), size, segment).unwrap();
            let mut merged: Vec<Extent> = Vec::new();
            let mut last = None;
            for work in schedule.works() {
                prop_assert!(last < Some(work.ix));
                last = Some(work.ix);
                for part in work.valid {
                    prop_assert!(work.extent.contains(part));
                    match merged.last_mut() {
                        Some(last) if last.end() == part.start() => {
                            *last = Extent::new(last.start(), part.end()).unwrap();
                        }
                        _ => merged.push(part),
                    }
                }
            }
            prop_assert_eq!(&merged, &extents);
            prop_assert_eq!(schedule.work_count(), u64::try_from(schedule.works().count()).unwrap());
            let mut all: Vec<Extent> = merged.into_iter().chain(schedule.gaps()).collect();
            all.sort_by_key(|extent| extent.start());
            prop_assert_eq!(all.iter().map(|extent| extent.length()).sum::<Bytes>(), size);
            prop_assert!(all.windows(2).all(|pair| pair[0].end() == pair[1].start()));
        }
    }
}
