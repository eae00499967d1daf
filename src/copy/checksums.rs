//! The XXH3-64 of every segment's payload as the secondary received it: eight bytes for each, kept if the copy
//! is verified.

use super::ports::ResumePoint;
use super::schedule::Schedule;
use crate::base::checksum::xxh3_64;
use crate::base::{Bytes, SegmentIx};

/// The checksums of a copy's segments.
#[derive(Debug)]
pub struct Checksums {
    kept: Option<Vec<u64>>,
    /// The length of a whole segment, and the checksum of its zeros.
    zero: (Bytes, u64),
    /// Segments that may hold originals which their checksum does not cover, because a process died while it
    /// applied originals to them: true until this process has written them again.
    may_hold_originals: Vec<bool>,
}

impl Checksums {
    /// For `count` segments; with `kept` false none is stored.
    pub(super) fn new(count: u64, segment: Bytes, kept: bool) -> Self {
        let count = usize::try_from(count).expect("segments are counted within SEGMENT_COUNT_MAX");
        Self {
            kept: kept.then(|| vec![0; count]),
            zero: (segment, zero_checksum(segment)),
            may_hold_originals: Vec::new(),
        }
    }

    /// Takes over the checksums that an earlier process recorded.
    pub(super) fn resume(&mut self, point: &ResumePoint) {
        let Some(kept) = &mut self.kept else { return };
        if point.originals_begun {
            self.may_hold_originals = vec![true; kept.len()];
        }
        for segment in &point.placed {
            if let (Some(entry), Some(checksum)) =
                (kept.get_mut(Bytes(segment.ix.get()).as_len()), segment.checksum)
            {
                *entry = checksum;
            }
        }
    }

    /// The checksum that a segment must have when it is read back before originals are applied to it. None
    /// also if a process died while it applied originals: the segment may hold some of them already, and
    /// all of them are applied to it again.
    pub(super) fn before_overlay(&self, ix: SegmentIx) -> Option<u64> {
        let may_hold_originals =
            self.may_hold_originals.get(Bytes(ix.get()).as_len()).copied().unwrap_or(false);
        self.get(ix).filter(|_| !may_hold_originals)
    }

    pub(super) fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// The checksum of a payload; `zero`: it is known to be all zero.
    pub(super) fn of(&self, payload: &[u8], zero: bool) -> u64 {
        if zero && Bytes::from_len(payload.len()) == self.zero.0 { self.zero.1 } else { xxh3_64(payload) }
    }

    pub(super) fn set(&mut self, ix: SegmentIx, checksum: u64) {
        if let Some(kept) = &mut self.kept {
            kept[Bytes(ix.get()).as_len()] = checksum;
        }
        if let Some(may_hold_originals) = self.may_hold_originals.get_mut(Bytes(ix.get()).as_len()) {
            *may_hold_originals = false;
        }
    }

    /// The checksum of every segment of the origin: of zeros if no part of it is in the schedule. None if none is kept.
    pub(super) fn of_all(&self, schedule: &Schedule) -> Option<Vec<u64>> {
        let mut all = self.kept.clone()?;
        let mut is_copied = vec![false; all.len()];
        schedule.works().for_each(|work| is_copied[Bytes(work.ix.get()).as_len()] = true);
        let size = schedule.size();
        for ((ix, entry), _) in
            (0..).map(SegmentIx).zip(&mut all).zip(is_copied).filter(|(_, copied)| !copied)
        {
            let start = schedule.segment().offset_of(ix).unwrap_or(size);
            let length = self.zero.0.min(size - start);
            *entry = if length == self.zero.0 { self.zero.1 } else { zero_checksum(length) };
        }
        Some(all)
    }

    /// The checksum that was set, if checksums are kept.
    pub(super) fn get(&self, ix: SegmentIx) -> Option<u64> {
        self.kept.as_ref().map(|kept| kept[Bytes(ix.get()).as_len()])
    }
}

fn zero_checksum(length: Bytes) -> u64 {
    xxh3_64(&vec![0u8; length.as_len()])
}
