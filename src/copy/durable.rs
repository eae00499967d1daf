//! Syncs the secondary while a copy writes to it. A segment counts as placed only after a sync that began
//! after its write had completed: until then a disk that is unplugged, or a server that loses power, may lose
//! it.
//!
//! Syncs run beside the writes, one at a time, each for all segments that landed since the last one began.
//! Between two syncs there is a pause of several times the duration of the last one, so that they cost a
//! small share of the secondary's time. The pause is at most [`PAUSE_MAX`], because the release of a region
//! waits for the sync.
//!
//! This module records nothing itself.

use std::time::Duration;

use crate::base::Result;
use crate::io::Driver;
use crate::io::FileIx;
use crate::secondary::PlacedSegment;

/// The pause between two syncs, as a multiple of the last one's duration.
const PAUSE_FACTOR: u32 = 8;

/// Shortest pause: even a sync without work costs a call.
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// Longest pause: writes to the landed segments are preserved until then.
const PAUSE_MAX: Duration = Duration::from_secs(2);

struct Sync {
    token: u64,
    begun: Duration,
    covers: Vec<PlacedSegment>,
}

/// Begins the syncs, and tracks which segments they make durable.
pub(super) struct Syncer {
    file: FileIx,
    /// Segments that have landed and are not covered by a sync yet.
    landed: Vec<PlacedSegment>,
    sync: Option<Sync>,
    /// The earliest begin of the next sync, as time since the copy began.
    next: Duration,
}

impl Syncer {
    /// Syncs for writes to `file`.
    pub(super) fn new(file: FileIx) -> Self {
        Self { file, landed: Vec::new(), sync: None, next: Duration::ZERO }
    }

    /// `segment` has landed.
    pub(super) fn landed(&mut self, segment: PlacedSegment) {
        self.landed.push(segment);
    }

    /// Begins a sync if there are segments to make durable, none is running, and the pause is over. `at_once`
    /// skips the pause.
    pub(super) fn advance(&mut self, driver: &mut Driver<'_>, at_once: bool) -> Result<()> {
        let begun = driver.now();
        if self.landed.is_empty() || self.sync.is_some() || (begun < self.next && !at_once) {
            return Ok(());
        }
        let token = driver.begin_sync(self.file)?;
        self.sync = Some(Sync { token, begun, covers: std::mem::take(&mut self.landed) });
        Ok(())
    }

    /// The sync of `token` has succeeded: returns the segments that it made durable. None if the token is
    /// not of a sync begun here.
    pub(super) fn synced(&mut self, token: u64, now: Duration) -> Option<Vec<PlacedSegment>> {
        let sync = self.sync.take_if(|sync| sync.token == token)?;
        let took = now.saturating_sub(sync.begun);
        self.next = now + took.saturating_mul(PAUSE_FACTOR).clamp(PAUSE_MIN, PAUSE_MAX);
        Some(sync.covers)
    }
}
