//! Which free ranges are worth leaving out of a copy, and what is left to be copied.
//!
//! Invariants: what is left out is free to the last byte and consists of whole chunks (the origin's last
//! chunk may be partial). It is sorted, no two ranges touch, and their number is bounded. Together with what
//! is left to be copied it covers the origin, each byte once. This module does not decide *what* is free:
//! `volume::free` does.

use super::{BlockList, Extent, ExtentSet};
use crate::base::limits::{
    FREE_RANGE_BYTES_MIN, FREE_RANGES_MAX, KEPT_OMITTED_RANGES_MAX, OMITTED_RANGES_MAX,
};
use crate::base::{Bytes, ChunkSize};

/// Limits on the ranges that are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeLimits {
    /// The unit of copy-on-write: a chunk that is free only in part is preserved and copied whole.
    pub chunk: ChunkSize,
    /// The smallest range.
    pub range_min: Bytes,
    /// Most ranges; the largest are kept.
    pub count_max: usize,
}

impl FreeLimits {
    /// The named limits of [`crate::base::limits`], for a chunk size.
    #[must_use]
    pub fn for_chunk(chunk: ChunkSize) -> Self {
        Self { chunk, range_min: FREE_RANGE_BYTES_MIN, count_max: FREE_RANGES_MAX }
    }

    /// As [`FreeLimits::for_chunk`], for what the user leaves out: as much as can be.
    #[must_use]
    pub fn omitted(chunk: ChunkSize) -> Self {
        Self { chunk, range_min: chunk.bytes(), count_max: OMITTED_RANGES_MAX }
    }

    /// As [`FreeLimits::omitted`], for a kept snapshot.
    #[must_use]
    pub fn kept(chunk: ChunkSize) -> Self {
        Self { count_max: KEPT_OMITTED_RANGES_MAX, ..Self::omitted(chunk) }
    }
}

/// The ranges of `free` (in any order, overlapping or not) that a copy of an origin of `size` bytes leaves
/// out: whole chunks, sorted, within `limits`.
#[must_use]
pub fn skippable(free: &[Extent], size: Bytes, limits: &FreeLimits) -> Vec<Extent> {
    let merged: ExtentSet = free.iter().copied().collect();
    let whole_chunks = merged.iter().filter_map(|extent| inward(extent, size, limits.chunk));
    let mut kept: Vec<Extent> = whole_chunks.filter(|extent| extent.length() >= limits.range_min).collect();
    kept.sort_by_key(|extent| (std::cmp::Reverse(extent.length()), extent.start()));
    kept.truncate(limits.count_max);
    kept.sort();
    kept
}

/// What is left to be copied of an origin of `size` bytes without `skipped`, in the form that
/// `copy::Schedule` takes.
#[must_use]
pub fn needed(skipped: &[Extent], size: Bytes) -> Vec<Extent> {
    let skipped: ExtentSet = skipped.iter().copied().collect();
    let whole = Extent::new(Bytes::ZERO, size);
    BlockList::new(whole.into_iter().flat_map(|whole| skipped.gaps_in(whole))).runs().to_vec()
}

/// The whole chunks in `extent`. The origin's last chunk counts as whole if the extent reaches the
/// origin's end.
fn inward(extent: Extent, size: Bytes, chunk: ChunkSize) -> Option<Extent> {
    let extent = extent.intersection(Extent::new(Bytes::ZERO, size)?)?;
    let unit = chunk.bytes();
    // No overflow: a chunk that begins past the origin's end begins past the extent's end, too.
    let start = extent.start().align_down(unit);
    let start = if start == extent.start() { start } else { start.checked_add(unit)? };
    let end = if extent.end() == size { size } else { extent.end().align_down(unit) };
    Extent::new(start, end)
}

/// The largest extents of a list of any length. Memory is allocated once, because the list is read while
/// filesystems are frozen. Extents that touch are one.
#[derive(Debug)]
pub struct Largest {
    kept: Vec<Extent>,
    count_max: usize,
    last: Option<Extent>,
}

impl Largest {
    /// Keeps at least half of `count_max` extents, the largest, and at most `count_max`.
    #[must_use]
    pub fn new(count_max: usize) -> Self {
        let count_max = count_max.max(2);
        Self { kept: Vec::with_capacity(count_max), count_max, last: None }
    }

    /// Forgets the extents and keeps the memory.
    pub fn clear(&mut self) {
        self.kept.clear();
        self.last = None;
    }

    /// Adds an extent; only one that begins where the last one ended is joined with it.
    pub fn push(&mut self, extent: Extent) {
        let joined = self.last.filter(|last| last.end() == extent.start());
        self.last = match joined {
            Some(last) => Extent::new(last.start(), extent.end()),
            None => {
                self.settle();
                Some(extent)
            }
        };
    }

    /// The extents that were kept, in no order.
    pub fn finish(&mut self) -> &[Extent] {
        self.settle();
        &self.kept
    }

    fn settle(&mut self) {
        let Some(extent) = self.last.take() else { return };
        if self.kept.len() == self.count_max {
            // In place: an unstable sort allocates no memory.
            self.kept.sort_unstable_by_key(|extent| std::cmp::Reverse(extent.length()));
            self.kept.truncate(self.count_max / 2);
        }
        self.kept.push(extent);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::SegmentSize;
    use crate::base::limits::DIRECT_IO_ALIGN;
    use crate::base::units::SECTOR_BYTES as SECTOR;

    const SECTORS: u64 = 400;

    fn extent(start: u64, end: u64) -> Extent {
        Extent::new(Bytes(start), Bytes(end)).unwrap()
    }

    /// For every sector, whether it is free.
    fn map(extents: &[Extent], sectors: u64) -> Vec<bool> {
        let covers = |at: u64| extents.iter().any(|it| it.contains(extent(at * SECTOR, (at + 1) * SECTOR)));
        (0..sectors).map(covers).collect()
    }

    fn runs(map: &[bool]) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (at, _) in map.iter().enumerate().filter(|(_, set)| **set) {
            match runs.last_mut() {
                Some((_, end)) if *end == at => *end = at + 1,
                _ => runs.push((at, at + 1)),
            }
        }
        runs
    }

    fn free_extents() -> impl Strategy<Value = Vec<Extent>> {
        let one = (0..SECTORS + 50, 1u64..90);
        prop::collection::vec(
            one.prop_map(|(start, length)| extent(start * SECTOR, (start + length) * SECTOR)),
            0..12,
        )
    }

    proptest! {
        #[test]
        fn what_is_left_out_is_free_and_whole_chunks_and_the_largest(
            free in free_extents(), sectors in 1..SECTORS, chunk_log in 12u32..16, range_min in 0u64..100_000, count_max in 0usize..6,
        ) {
            let size = Bytes(sectors * SECTOR);
            let chunk = ChunkSize::new(Bytes(1 << chunk_log)).unwrap();
            let limits = FreeLimits { chunk, range_min: Bytes(range_min), count_max };
            let skipped = skippable(&free, size, &limits);
            // The oracle: a chunk is free if each of its sectors is.
            let is_free = map(&free, sectors);
            let per_chunk = chunk.bytes().get() / SECTOR;
            let chunk_of = |at: usize| at / usize::try_from(per_chunk).unwrap();
            let whole: Vec<bool> = (0..is_free.len())
                .map(|at| (0..is_free.len()).filter(|other| chunk_of(*other) == chunk_of(at)).all(|other| is_free[other]))
                .collect();
            let mut expected = runs(&whole);
            let bytes_of = |run: &(usize, usize)| u64::try_from(run.1 - run.0).unwrap() * SECTOR;
            expected.retain(|run| bytes_of(run) >= range_min);
            expected.sort_by_key(|run| (std::cmp::Reverse(bytes_of(run)), run.0));
            expected.truncate(count_max);
            expected.sort();
            let got: Vec<(usize, usize)> = skipped.iter().map(|it| {
                let sector = |at: Bytes| usize::try_from(at.to_sectors("cut").unwrap().get()).unwrap();
                (sector(it.start()), sector(it.end()))
            }).collect();
            prop_assert_eq!(got, expected);
        }

        #[test]
        fn what_is_left_is_the_complement_and_can_be_scheduled(free in free_extents(), sectors in 1..SECTORS) {
            let size = Bytes(sectors * SECTOR);
            let limits = FreeLimits { range_min: Bytes::ZERO, ..FreeLimits::for_chunk(ChunkSize::default()) };
            let skipped = skippable(&free, size, &limits);
            let needed = needed(&skipped, size);
            let (out, left) = (map(&skipped, sectors), map(&needed, sectors));
            prop_assert!(out.iter().zip(&left).all(|(out, left)| out != left));
            let cut = |at: Bytes| at == size || at.is_aligned(DIRECT_IO_ALIGN);
            prop_assert!(needed.iter().all(|it| cut(it.start()) && cut(it.end())));
            prop_assert!(needed.windows(2).all(|pair| pair[0].end() < pair[1].start()));
        }

        #[test]
        fn the_largest_survive(lengths in prop::collection::vec((0u64..3, 1u64..1000), 0..200), count_max in 2usize..20) {
            let mut largest = Largest::new(count_max);
            let (mut at, mut all) = (0, Vec::<Extent>::new());
            for (gap, length) in lengths {
                at += gap;
                let next = extent(at, at + length);
                at += length;
                largest.push(next);
                match all.last_mut() {
                    Some(last) if last.end() == next.start() => *last = extent(last.start().get(), next.end().get()),
                    _ => all.push(next),
                }
            }
            all.sort_by_key(|it| std::cmp::Reverse(it.length()));
            let mut kept = largest.finish().to_vec();
            prop_assert!(kept.len() <= count_max && kept.len() >= all.len().min(count_max / 2));
            kept.sort_by_key(|it| std::cmp::Reverse(it.length()));
            let sure = all.len().min(count_max / 2);
            let lengths = |of: &[Extent]| of.iter().take(sure).map(|it| it.length()).collect::<Vec<_>>();
            prop_assert_eq!(lengths(&kept), lengths(&all));
            prop_assert!(kept.iter().all(|it| all.contains(it)));
        }
    }

    #[test]
    fn a_frame_holds_no_more_extents_than_documented() {
        // The worst case: free ranges of the least size, one chunk of data between two.
        let size = SegmentSize::MAX * 2;
        let step = FREE_RANGE_BYTES_MIN + ChunkSize::MIN;
        let free: Vec<Extent> = (0..size.get() / step.get())
            .map(|at| extent(at * step.get(), at * step.get() + FREE_RANGE_BYTES_MIN.get()))
            .collect();
        let skipped = skippable(&free, size, &FreeLimits::for_chunk(ChunkSize::default()));
        assert!(skipped.len() > 400);
        let segment = extent(SegmentSize::MAX.get(), size.get());
        let in_frame = needed(&skipped, size).iter().filter(|it| it.overlaps(segment)).count();
        assert!((200..=257).contains(&in_frame), "{in_frame}");
    }
}
