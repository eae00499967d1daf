//! The job's log of segments, as the copier's record of placed segments. A copy outlives its log.

use crate::base::Result;
use crate::copy::PlacementLog;
use crate::job::segment_log::SegmentLog;
use crate::secondary::PlacedSegment;

impl PlacementLog for SegmentLog {
    fn placed(&mut self, segments: &[PlacedSegment]) -> Result<()> {
        self.note_or_drop(|log| log.append(segments))
    }

    fn restate(&mut self, segments: &[PlacedSegment]) -> Result<()> {
        self.note_or_drop(|log| Self::restate(log, segments))
    }

    fn originals_begun(&mut self) -> Result<()> {
        self.note_or_drop(Self::originals_begun)
    }
}
