//! The order in which the origin is copied, and the regions that are done.
//!
//! A region is a run of segments that is released together: once every segment of it is on the secondary,
//! writes to it need not be preserved any more. The origin is divided into *units* of a fixed number of segments.
//! A region is one unit, or a run of adjacent units after releases have proved slow ([`Regions::enlarge`]).
//!
//! | order | which region is next |
//! |---|---|
//! | physical | the next one on the origin |
//! | hot | the one with the most new exceptions recently, else the next one on the origin |
//!
//! In both orders, the extents passed to [`Regions::put_first`] come first: for example a filesystem's log, of
//! which every block is written again and again.
//!
//! Writers often advance through a device, as through a filesystem's journal. So half of the heat of a region
//! that is being copied goes to the next unit after it, which is then copied before the writers get there.
//!
//! Invariants, for any order and any number of enlargements:
//! - every segment that holds a part of the block list is returned by [`Regions::next`] exactly once, those of one
//!   region in their order on the origin;
//! - a region is reported done exactly once, after the last of its segments was reported placed; the reported
//!   regions are disjoint, and together they cover the origin.
//!
//! Pure: no I/O, no clock. Memory: a few words for each of at most [`UNITS_MAX`] units.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::schedule::{Schedule, Work};
use crate::base::{Bytes, Error, Result, SegmentIx, SegmentSize};
use crate::extent::Extent;

/// Most units of an origin. The released parts then form at most half as many runs, in any order, so that the
/// origin's table can always name all of them. That is necessary: a released range must never be preserved
/// again, since the store would record its present content as that of the instant.
pub const UNITS_MAX: u64 = 1024;

/// Default number of units of an origin.
const UNITS_DEFAULT: u64 = 128;

/// Smallest unit by default: with a smaller one a release costs more than the writes that it spares.
const REGION_BYTES_MIN: Bytes = Bytes::mib(4);

/// Largest unit by default: writes to parts that were copied long ago should not still be preserved.
const REGION_BYTES_MAX: Bytes = Bytes::gib(1);

/// A region is at most this part of the origin.
const REGION_SHARE: usize = 16;

/// A unit's heat is divided by this at each update: old heat fades.
const HEAT_KEPT: u64 = 2;

/// How many units after one that is being copied may receive its heat.
const FOLLOWING_MAX: usize = 4;

/// The order in which regions are copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// By offset on the origin.
    #[default]
    Physical,
    /// The most written regions first.
    Hot,
}

/// The size of a unit for an origin: the requested size, rounded up to whole segments, else a fraction of the
/// origin.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) if the requested size gives more than [`UNITS_MAX`]
/// units; the error names the size to use.
pub fn region_size_for(origin: Bytes, segment: SegmentSize, requested: Option<Bytes>) -> Result<Bytes> {
    let smallest = Bytes(origin.get().div_ceil(UNITS_MAX)).align_up(segment.bytes()).max(segment.bytes());
    match requested {
        Some(size) if size.align_up(segment.bytes()) < smallest => Err(Error::usage(format!(
            "regions of {size} are too small for an origin of {origin} with segments of {segment}: there are \
             at most {UNITS_MAX}"
        ))
        .next(format!("use --region {}KiB or omit --region", smallest.get() / 1024))),
        Some(size) => Ok(size.align_up(segment.bytes())),
        None => Ok(Bytes(origin.get() / UNITS_DEFAULT)
            .max(REGION_BYTES_MIN)
            .min(REGION_BYTES_MAX)
            .align_up(segment.bytes())
            .max(smallest)),
    }
}

/// A unit.
#[derive(Clone, Copy, Debug)]
struct Unit {
    /// Its segments were returned by [`Regions::next`], or are about to be.
    begun: bool,
    /// Its segments that are not on the secondary yet.
    left: u64,
    heat: u64,
}

/// Chooses the next segment by region, and reports the regions that are done.
#[derive(Debug)]
pub struct Regions<'a> {
    schedule: &'a Schedule,
    order: Order,
    /// Segments in a unit.
    unit_segments: u64,
    units: Vec<Unit>,
    /// Units in a region from now on.
    region_units: usize,
    /// Segments of the current region that are still to be returned.
    current: std::ops::Range<u64>,
    /// Units that come before all others, whatever the order.
    first: VecDeque<usize>,
    /// Regions being copied: their units, and the segments left.
    open: VecDeque<(std::ops::Range<usize>, u64)>,
    /// Regions that are done and not yet returned.
    done: VecDeque<Extent>,
}

impl<'a> Regions<'a> {
    /// For the segments of `schedule`, in units of `unit` bytes (see [`region_size_for`]). `is_placed` tells
    /// which segments are on the secondary already; these are skipped, and units without any other segment
    /// are done at once.
    pub fn new(
        schedule: &'a Schedule,
        unit: Bytes,
        order: Order,
        is_placed: &dyn Fn(SegmentIx) -> bool,
    ) -> Self {
        let unit_segments = (unit.get() / schedule.segment().bytes().get()).max(1);
        let count = Bytes(schedule.segment_count().div_ceil(unit_segments)).as_len();
        let mut units = vec![Unit { begun: false, left: 0, heat: 0 }; count];
        for work in schedule.works().filter(|work| !is_placed(work.ix)) {
            units[Bytes(work.ix.get() / unit_segments).as_len()].left += 1;
        }
        let mut this = Self {
            schedule,
            order,
            unit_segments,
            units,
            region_units: 1,
            current: 0..0,
            first: VecDeque::new(),
            open: VecDeque::new(),
            done: VecDeque::new(),
        };
        // Units without anything to copy are done from the start; a run of them is one region.
        let mut at = 0;
        while at < count {
            let end = (at..count).find(|ix| this.units[*ix].left > 0).unwrap_or(count);
            this.units[at..end].iter_mut().for_each(|unit| unit.begun = true);
            this.done.extend(this.extent_of(&(at..end)));
            at = end.max(at + 1);
            while at < count && this.units[at].left > 0 {
                at += 1;
            }
        }
        this
    }

    /// The regions that hold a part of `extents` come first, by offset.
    pub fn put_first(&mut self, extents: &[Extent]) {
        let Some(last) = self.units.len().checked_sub(1) else { return };
        let unit_bytes = self.schedule.segment().bytes() * self.unit_segments;
        let unit = |offset: Bytes| Bytes(offset.get() / unit_bytes.get()).as_len();
        let units: BTreeSet<usize> = extents
            .iter()
            .flat_map(|it| unit(it.start())..=unit(Bytes(it.end().get() - 1)).min(last))
            .collect();
        self.first.extend(units);
    }

    /// Doubles the number of units in each region that is not begun yet, up to one [`REGION_SHARE`]th of the
    /// origin: a region that is released late is preserved long.
    pub fn enlarge(&mut self) {
        self.region_units = (self.region_units * 2).min((self.units.len() / REGION_SHARE).max(1));
    }

    /// Records where new exceptions appeared since the last call. Has no effect on [`Order::Physical`].
    pub fn heat(&mut self, offsets: &[Bytes]) {
        for unit in &mut self.units {
            unit.heat /= HEAT_KEPT;
        }
        let unit_bytes = self.schedule.segment().bytes() * self.unit_segments;
        for offset in offsets {
            let index = Bytes(offset.get() / unit_bytes.get()).as_len();
            // Weighted so that one new exception counts more than none after the halving.
            match self.units.get(index) {
                Some(unit) if unit.begun => self.warm_following(index, HEAT_KEPT / 2),
                Some(_) => self.warm(index, HEAT_KEPT),
                None => {}
            }
        }
    }

    fn warm(&mut self, unit: usize, heat: u64) {
        self.units[unit].heat = self.units[unit].heat.saturating_add(heat);
    }

    /// Heats the next unit after `unit` that is not begun, if one is close.
    fn warm_following(&mut self, unit: usize, heat: u64) {
        let end = (unit + 1 + FOLLOWING_MAX).min(self.units.len());
        if let Some(next) = (unit + 1..end).find(|ix| !self.units[*ix].begun) {
            self.warm(next, heat);
        }
    }

    /// True if the next segment is the first of another region: the time to update the heat.
    #[must_use]
    pub fn is_at_boundary(&self) -> bool {
        self.current.is_empty()
    }

    /// The order.
    #[must_use]
    pub fn order(&self) -> Order {
        self.order
    }

    /// The next segment to be copied; skips segments for which `is_placed` is true.
    pub fn next(&mut self, is_placed: &dyn Fn(SegmentIx) -> bool) -> Option<Work> {
        loop {
            for index in self.current.by_ref() {
                let work = self.schedule.work(SegmentIx(index)).filter(|work| !is_placed(work.ix));
                if work.is_some() {
                    return work;
                }
            }
            let first = self.next_unit()?;
            let end = (first + 1..(first + self.region_units).min(self.units.len()))
                .find(|ix| self.units[*ix].begun)
                .unwrap_or((first + self.region_units).min(self.units.len()));
            self.begin(first..end);
        }
    }

    fn next_unit(&mut self) -> Option<usize> {
        while let Some(unit) = self.first.pop_front() {
            if !self.units[unit].begun {
                return Some(unit);
            }
        }
        let waiting = self.units.iter().enumerate().filter(|(_, unit)| !unit.begun);
        match self.order {
            Order::Physical => waiting.map(|(ix, _)| ix).next(),
            // The first of equally hot units.
            Order::Hot => waiting
                .max_by(|one, other| one.1.heat.cmp(&other.1.heat).then(other.0.cmp(&one.0)))
                .map(|(ix, _)| ix),
        }
    }

    fn begin(&mut self, units: std::ops::Range<usize>) {
        let (mut left, mut heat) = (0, 0u64);
        for unit in &mut self.units[units.clone()] {
            unit.begun = true;
            left += unit.left;
            heat = heat.saturating_add(unit.heat);
        }
        self.warm_following(units.end - 1, heat / 2);
        let segment = |unit: usize| Bytes::from_len(unit).get() * self.unit_segments;
        self.current = segment(units.start)..segment(units.end).min(self.schedule.segment_count());
        self.open.push_back((units, left));
    }

    /// Records that a segment is on the secondary.
    ///
    /// # Panics
    /// For a segment that was not returned before, or that was reported before: a broken invariant.
    pub fn placed(&mut self, ix: SegmentIx) {
        let unit = Bytes(ix.get() / self.unit_segments).as_len();
        let at = self
            .open
            .iter()
            .position(|(units, _)| units.contains(&unit))
            .expect("a segment that is placed was handed out with its region");
        self.open[at].1 -= 1;
        if self.open[at].1 == 0 {
            let (units, _) = self.open.remove(at).expect("it was found there");
            self.done.extend(self.extent_of(&units));
        }
    }

    /// A region that is done: nothing will read it from the origin again.
    pub fn take_done(&mut self) -> Option<Extent> {
        self.done.pop_front()
    }

    fn extent_of(&self, units: &std::ops::Range<usize>) -> Option<Extent> {
        let unit_bytes = self.schedule.segment().bytes() * self.unit_segments;
        let offset = |unit: usize| (unit_bytes * Bytes::from_len(unit).get()).min(self.schedule.size());
        Extent::new(offset(units.start), offset(units.end))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::copy::chaos::Rng;

    fn segment() -> SegmentSize {
        SegmentSize::new(Bytes::kib(64)).unwrap()
    }

    #[test]
    fn sizes_follow_the_origin_and_the_request() {
        let size = |origin, requested| region_size_for(origin, segment(), requested);
        assert_eq!(size(Bytes::mib(96), None).unwrap(), Bytes::mib(4));
        assert_eq!(size(Bytes::gib(64), None).unwrap(), Bytes::mib(512));
        assert_eq!(size(Bytes::gib(1000), None).unwrap(), Bytes::gib(1));
        assert_eq!(size(Bytes::gib(2048), None).unwrap(), Bytes::gib(2));
        assert_eq!(size(Bytes::mib(48), Some(Bytes(1))).unwrap(), segment().bytes());
        let error = size(Bytes::gib(1), Some(Bytes::kib(64))).unwrap_err();
        assert_eq!(error.next_step(), Some("use --region 1024KiB or omit --region"));
    }

    #[test]
    fn the_hottest_unit_comes_first_and_heat_fades() {
        let schedule =
            Schedule::new(vec![Extent::new(Bytes(0), Bytes::mib(1)).unwrap()], Bytes::mib(1), segment())
                .unwrap();
        let never = |_| false;
        let mut regions = Regions::new(&schedule, Bytes::kib(128), Order::Hot, &never);
        let unit = |work: Work| work.ix.get() / 2;
        assert_eq!(unit(regions.next(&never).unwrap()), 0);
        assert_eq!(unit(regions.next(&never).unwrap()), 0);
        regions.heat(&[Bytes::kib(900), Bytes::kib(300), Bytes::kib(910)]);
        assert_eq!(unit(regions.next(&never).unwrap()), 7);
        assert_eq!(unit(regions.next(&never).unwrap()), 7);
        // A new exception counts more than an old one that has faded, and the first of equals wins.
        regions.heat(&[Bytes::kib(700), Bytes::kib(800)]);
        assert_eq!(unit(regions.next(&never).unwrap()), 5);
    }

    #[test]
    fn units_put_first_precede_any_order() {
        let whole = Extent::new(Bytes(0), segment().bytes() * 8).unwrap();
        let schedule = Schedule::new(vec![whole], whole.length(), segment()).unwrap();
        for order in [Order::Physical, Order::Hot] {
            let mut regions = Regions::new(&schedule, segment().bytes(), order, &|_| false);
            let part =
                |from: u64, to: u64| Extent::new(segment().bytes() * from, segment().bytes() * to).unwrap();
            regions.put_first(&[part(6, 7), part(3, 5), part(4, 5), part(20, 30)]);
            regions.heat(&[segment().bytes() * 5, segment().bytes() * 4]);
            let mut next = || regions.next(&|_| false).unwrap().ix.get();
            assert_eq!([next(), next(), next()], [3, 4, 6]);
            assert_eq!(next(), if order == Order::Hot { 5 } else { 0 }, "{order:?}");
        }
    }

    #[test]
    fn heat_moves_ahead_of_the_writers() {
        let whole = Extent::new(Bytes(0), segment().bytes() * 8).unwrap();
        let schedule = Schedule::new(vec![whole], whole.length(), segment()).unwrap();
        let mut regions = Regions::new(&schedule, segment().bytes(), Order::Hot, &|_| false);
        let mut next = |heat: &[u64]| {
            regions.heat(&heat.iter().map(|unit| segment().bytes() * *unit).collect::<Vec<_>>());
            regions.next(&|_| false).unwrap().ix.get()
        };
        assert_eq!(next(&[3, 3, 3, 3, 6]), 3);
        // Nothing is new: the following unit is hotter than one that was written some time ago.
        assert_eq!(next(&[]), 4);
        // The applications write to the region that is being copied.
        assert_eq!(next(&[4, 4, 4, 4]), 5);
    }

    #[test]
    fn a_region_is_never_more_than_a_share_of_the_origin() {
        let whole = Extent::new(Bytes(0), segment().bytes() * 64).unwrap();
        let schedule = Schedule::new(vec![whole], whole.length(), segment()).unwrap();
        let mut regions = Regions::new(&schedule, segment().bytes(), Order::Physical, &|_| false);
        for _ in 0..10 {
            regions.enlarge();
        }
        assert_eq!((regions.unit_segments, regions.region_units), (1, 4));
    }

    proptest! {
        /// Any order, heat, growth of regions and order of completion: each needed byte is copied once, and a
        /// region is done only when all of it is placed.
        #[test]
        fn every_order_copies_each_needed_byte_exactly_once(
            pages in prop::collection::vec(any::<bool>(), 1..1500),
            unit in 1u64..4,
            hot in any::<bool>(),
            placed in prop::collection::btree_set(0u64..94, 0..60),
            first in prop::collection::vec((0u64..1600, 1u64..400), 0..4),
            seed in any::<u64>(),
        ) {
            let size = Bytes::from_len(pages.len()) * 4096;
            let listed: Vec<Extent> = pages
                .iter()
                .enumerate()
                .filter(|(_, listed)| **listed)
                .map(|(page, _)| Extent::with_length(Bytes::from_len(page) * 4096, Bytes(4096)).unwrap())
                .collect();
            let schedule = Schedule::new(listed, size, segment()).unwrap();
            let order = if hot { Order::Hot } else { Order::Physical };
            let is_placed = |ix: SegmentIx| placed.contains(&ix.get());
            let mut regions = Regions::new(&schedule, segment().bytes() * unit, order, &is_placed);
            let first: Vec<Extent> = first
                .iter()
                .map(|(page, count)| Extent::with_length(Bytes(page * 4096), Bytes(count * 4096)).unwrap())
                .collect();
            regions.put_first(&first);
            let mut rng = Rng(seed);
            let mut flying: Vec<Work> = Vec::new();
            let mut landed: BTreeSet<u64> = placed.clone();
            let mut seen = vec![0u32; pages.len()];
            let mut released = vec![0u32; pages.len()];
            let mut more = true;
            while more || !flying.is_empty() {
                if rng.chance(10) {
                    regions.enlarge();
                }
                if rng.chance(30) {
                    let heat: Vec<Bytes> = (0..rng.below(20)).map(|_| Bytes(rng.below(size.get()))).collect();
                    regions.heat(&heat);
                }
                if more && rng.chance(60) {
                    match regions.next(&is_placed) {
                        Some(work) => {
                            for part in &work.valid {
                                for page in part.start().get() / 4096..part.end().get() / 4096 {
                                    seen[Bytes(page).as_len()] += 1;
                                }
                            }
                            flying.push(work);
                        }
                        None => more = false,
                    }
                } else if !flying.is_empty() {
                    let work = flying.swap_remove(rng.index(flying.len()));
                    landed.insert(work.ix.get());
                    regions.placed(work.ix);
                }
                while let Some(region) = regions.take_done() {
                    for page in region.start().get() / 4096..region.end().get() / 4096 {
                        released[Bytes(page).as_len()] += 1;
                        let ok = !pages[Bytes(page).as_len()] || landed.contains(&(page / 16));
                        prop_assert!(ok, "page {} is released and not placed", page);
                    }
                }
            }
            for (page, listed) in pages.iter().enumerate() {
                let resumed = placed.contains(&(Bytes::from_len(page).get() / 16));
                prop_assert_eq!(seen[page], u32::from(*listed && !resumed), "page {}", page);
                prop_assert_eq!(released[page], 1, "page {}", page);
            }
        }
    }
}
