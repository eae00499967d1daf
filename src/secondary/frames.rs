//! Assigns data frames of an archive to segments.
//!
//! Invariants:
//! - a frame holds one segment, and a segment has at most one frame;
//! - numbers are assigned without gaps, the lowest first. A killed copy leaves gaps: numbers of segments
//!   whose writes had not completed. These numbers are assigned first when the copy is resumed.
//!
//! Why every gap is filled before the data ends: the number of a gap had been assigned to a segment that is
//! not placed, and no two gaps to the same segment. So at least as many segments are still to be placed as
//! there are gaps. That fills all gaps if each of these segments takes a number, even one that has become all
//! zero; [`Frames::must_fill_gap`] tells the caller to do so. A later kill does not change this: the segments
//! that it leaves unplaced have numbers of their own. The same holds for a segment that the secondary has
//! lost: it is placed again.
//!
//! Memory: four bytes for each segment, and eight for each gap. Pure.

use std::collections::BTreeSet;

use super::PlacedSegment;
use crate::base::{Bytes, Error, Result, SegmentIx};

/// The data frames of an archive, by segment.
#[derive(Clone, Debug)]
pub(super) struct Frames {
    /// For each segment its frame's number plus one, or 0 for none.
    by_segment: Vec<u32>,
    /// Numbers below `end` that hold no segment.
    gaps: BTreeSet<u64>,
    /// One past the highest number assigned.
    end: u64,
}

impl Frames {
    /// For `count` segments (at most `SEGMENT_COUNT_MAX`), none of which has a frame.
    pub(super) fn new(count: u64) -> Self {
        Self { by_segment: vec![0; Bytes(count).as_len()], gaps: BTreeSet::new(), end: 0 }
    }

    /// The assignment that a killed copy has left.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) if `placed` is impossible: a segment or
    /// frame out of range, or one frame for two segments.
    pub(super) fn rebuilt(count: u64, placed: &[PlacedSegment]) -> Result<Self> {
        let bad = |what: String| {
            Error::bad_data(format!("the segment log does not fit an archive: {what}"))
                .state("nothing was written")
                .next("run 'tidemark recover', and copy again")
        };
        let mut frames = Self::new(count);
        let mut taken = vec![false; Bytes(count).as_len()];
        for segment in placed {
            let ix = segment.ix.get();
            if ix >= count || segment.frame.is_some_and(|frame| frame >= count) {
                return Err(bad(format!("segment {ix} of {count} in frame {:?}", segment.frame)));
            }
            let Some(frame) = segment.frame else {
                if segment.zero {
                    continue;
                }
                return Err(bad(format!("segment {ix} is not zero and has no frame")));
            };
            if std::mem::replace(&mut taken[Bytes(frame).as_len()], true) || frames.get(segment.ix).is_some()
            {
                return Err(bad(format!("frame {frame} or segment {ix} appears twice")));
            }
            frames.set(segment.ix, frame);
            frames.end = frames.end.max(frame + 1);
        }
        let free = (0..frames.end).filter(|frame| !taken[Bytes(*frame).as_len()]);
        frames.gaps = free.collect();
        Ok(frames)
    }

    fn set(&mut self, ix: SegmentIx, frame: u64) {
        self.by_segment[Bytes(ix.get()).as_len()] = u32::try_from(frame + 1)
            .expect("there are at most SEGMENT_COUNT_MAX data frames, one for each segment");
    }

    /// Segments of the origin.
    pub(super) fn segment_count(&self) -> u64 {
        Bytes::from_len(self.by_segment.len()).get()
    }

    /// The segment's frame.
    pub(super) fn get(&self, ix: SegmentIx) -> Option<u64> {
        u64::from(self.by_segment[Bytes(ix.get()).as_len()]).checked_sub(1)
    }

    /// True if the next segment must take a frame, even if it is all zero.
    pub(super) fn must_fill_gap(&self) -> bool {
        !self.gaps.is_empty()
    }

    /// The number that [`Frames::assign`] assigns next.
    pub(super) fn next_number(&self) -> u64 {
        self.gaps.first().copied().unwrap_or(self.end)
    }

    /// Assigns the next number to a segment that has no frame.
    pub(super) fn assign(&mut self, ix: SegmentIx) {
        debug_assert!(self.get(ix).is_none());
        match self.gaps.pop_first() {
            Some(gap) => self.set(ix, gap),
            None => {
                self.set(ix, self.end);
                self.end += 1;
            }
        }
    }

    /// Makes the number of a segment's frame free for the next segment; false if it has none.
    pub(super) fn unassign(&mut self, ix: SegmentIx) -> bool {
        let Some(frame) = self.get(ix) else { return false };
        self.by_segment[Bytes(ix.get()).as_len()] = 0;
        self.gaps.insert(frame)
    }

    /// One past the last data frame; includes gaps.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Numbers that hold no segment.
    pub(super) fn gap_count(&self) -> usize {
        self.gaps.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::ErrorKind;

    fn placed(ix: u64, frame: Option<u64>, zero: bool) -> PlacedSegment {
        PlacedSegment { ix: SegmentIx(ix), frame, checksum: None, zero }
    }

    #[test]
    fn an_inconsistent_journal_is_refused() {
        for wrong in [
            vec![placed(4, Some(0), false)],
            vec![placed(0, Some(4), false)],
            vec![placed(0, None, false)],
            vec![placed(0, Some(1), false), placed(1, Some(1), false)],
            vec![placed(0, Some(1), false), placed(0, Some(2), false)],
        ] {
            let error = Frames::rebuilt(4, &wrong).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadData, "{wrong:?}");
        }
        let frames = Frames::rebuilt(4, &[placed(3, Some(2), false), placed(1, None, true)]).unwrap();
        assert_eq!((frames.next_number(), frames.end(), frames.gap_count()), (0, 3, 2));
    }

    proptest! {
        /// Copies that are killed again and again, each with writes that did not complete and with segments
        /// that are zero in one run and not in the next: no number is skipped or assigned twice.
        #[test]
        fn every_gap_is_filled_before_the_data_ends(
            count in 1u64..40,
            runs in prop::collection::vec(prop::collection::vec((any::<bool>(), any::<bool>()), 0..40), 0..6),
            zeros in prop::collection::vec(any::<bool>(), 40),
        ) {
            let mut journal: Vec<PlacedSegment> = Vec::new();
            let unplaced = |journal: &[PlacedSegment]| -> Vec<u64> {
                (0..count).filter(|ix| !journal.iter().any(|placed| placed.ix.get() == *ix)).collect()
            };
            let assign = |frames: &mut Frames, ix: u64, zero: bool| {
                if !zero || frames.must_fill_gap() {
                    frames.assign(SegmentIx(ix));
                }
                placed(ix, frames.get(SegmentIx(ix)), zero)
            };
            for run in runs {
                let mut frames = Frames::rebuilt(count, &journal).unwrap();
                let todo = unplaced(&journal);
                for (ix, (zero, completed)) in todo.into_iter().rev().zip(run) {
                    let segment = assign(&mut frames, ix, zero);
                    if completed {
                        journal.push(segment);
                    }
                }
            }
            let mut frames = Frames::rebuilt(count, &journal).unwrap();
            for (ix, zero) in unplaced(&journal).into_iter().zip(zeros) {
                journal.push(assign(&mut frames, ix, zero));
            }
            prop_assert_eq!(frames.gap_count(), 0);
            let mut numbers: Vec<u64> = journal.iter().filter_map(|placed| placed.frame).collect();
            numbers.sort_unstable();
            prop_assert_eq!(numbers, (0..frames.end()).collect::<Vec<_>>());
        }
    }
}
