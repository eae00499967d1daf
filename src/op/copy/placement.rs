//! Records what another process needs to resume a copy: the job's record of the copy, and the segment log, which is the
//! copier's record of placed segments. The job's record of a copy outlives the segment log.

use std::time::Duration;

use uuid::Uuid;

use super::live::Live;
use super::plan::CopyPlan;
use crate::base::{Error, Result};
use crate::copy::PlacementLog;
use crate::extent::Extent;
use crate::format::segment_log::Header;
use crate::format::state::CopyRecord;
use crate::job::segment_log::SegmentLog;
use crate::secondary::{PlacedSegment, Secondary};

/// Records what another process needs to resume the copy. Returns None if it cannot be resumed, because the secondary
/// is a pipe, or the copy is an increment, or the origin is one of several.
///
/// # Errors
/// I/O errors.
pub(super) fn note_copy(
    plan: &CopyPlan,
    live: &Live,
    secondary: &dyn Secondary,
) -> Result<Option<SegmentLog>> {
    // What an increment has packed is not known by segment, and one onto a raw secondary is run again instead. A copy of
    // several origins is not continued.
    if secondary.is_stream() || secondary.is_packed() || plan.is_update() || live.is_one_of_several() {
        return Ok(None);
    }
    let times = live.stack().times();
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let request = serde_json::to_string(&plan.request)
        .map_err(|source| Error::bad_data("the request cannot be recorded").with_source(source))?;
    let range = |extent: &Extent| (extent.start().get(), extent.end().get());
    let mut job = live.job();
    let header = Header {
        job: Uuid::parse_str(job.id())
            .map_err(|source| Error::bad_data("the job's id").with_source(source))?,
        form: plan.request.format,
        archive: secondary.archive_id(),
        origin_size: plan.origin.size,
        segment: plan.segment,
        instant_ns: times.instant_utc_ns,
    };
    // The log is created first: a job with a record of a copy always has a log.
    let log = SegmentLog::create(&job.segments_path(), &header)?;
    job.set_copy(CopyRecord {
        request,
        origin_path: plan.origin.path.display().to_string(),
        segment_bytes: plan.segment.bytes().get(),
        region_bytes: plan.region.get(),
        instant_utc_ns: times.instant_utc_ns,
        held_ns: [nanos(times.synced), nanos(times.frozen), nanos(times.suspended)],
        archive: secondary.archive_id().map(|id| id.to_string()),
        partial: secondary.partial_path().map(|path| path.display().to_string()),
        skipped: live.stack().skipped().extents.iter().map(range).collect(),
        hook_after_done: false,
        target: secondary.target().cloned(),
    })?;
    Ok(Some(log))
}

impl PlacementLog for SegmentLog {
    fn placed(&mut self, segments: &[PlacedSegment]) -> Result<()> {
        self.note_or_drop(|log| log.append(segments))
    }

    fn rewrite(&mut self, segments: &[PlacedSegment]) -> Result<()> {
        self.note_or_drop(|log| Self::rewrite(log, segments))
    }

    fn originals_begun(&mut self) -> Result<()> {
        self.note_or_drop(Self::originals_begun)
    }
}
