//! When does what was written count? Behind a sync of the secondary that began after the write had ended: until then a
//! disk that is unplugged, or a server that loses its power, may have lost it.
//!
//! Syncs go beside the writes, one at a time, each for all that has landed since the last one began. Between two there
//! is a pause of several times what the last one took, so that they cost a small share of the secondary's time; but no
//! longer one than [`PAUSE_MAX`], because a region waits for its release until then.
//!
//! Must not note anything itself.

use std::time::Duration;

use crate::base::Result;
use crate::io::Driver;
use crate::io::FileIx;
use crate::secondary::PlacedSegment;

/// The pause between two syncs, in times of what the last one took.
const PAUSE_FACTOR: u32 = 8;

/// The shortest pause: a sync that costs nothing still costs a call.
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// The longest: what has landed is preserved until then.
const PAUSE_MAX: Duration = Duration::from_secs(2);

struct Sync {
    token: u64,
    begun: Duration,
    covers: Vec<PlacedSegment>,
}

/// See the module's head.
pub(super) struct Durable {
    file: FileIx,
    /// Written, and not covered by a sync yet.
    landed: Vec<PlacedSegment>,
    sync: Option<Sync>,
    /// No sync begins before; since the copy's begin.
    next: Duration,
}

impl Durable {
    /// For what is written to `file`.
    pub(super) fn new(file: FileIx) -> Self {
        Self { file, landed: Vec::new(), sync: None, next: Duration::ZERO }
    }

    /// All of `segment` has been written.
    pub(super) fn landed(&mut self, segment: PlacedSegment) {
        self.landed.push(segment);
    }

    /// Begins a sync where there is something to make durable and it is time to, or none may be waited for: `at_once`.
    pub(super) fn advance(&mut self, driver: &mut Driver<'_>, at_once: bool) -> Result<()> {
        let begun = driver.now();
        if self.landed.is_empty() || self.sync.is_some() || (begun < self.next && !at_once) {
            return Ok(());
        }
        let token = driver.begin_sync(self.file)?;
        self.sync = Some(Sync { token, begun, covers: std::mem::take(&mut self.landed) });
        Ok(())
    }

    /// The sync of `token` has ended well: what it has made durable. None where it is not the token of ours.
    pub(super) fn take(&mut self, token: u64, now: Duration) -> Option<Vec<PlacedSegment>> {
        let sync = self.sync.take_if(|sync| sync.token == token)?;
        let took = now.saturating_sub(sync.begun);
        self.next = now + took.saturating_mul(PAUSE_FACTOR).clamp(PAUSE_MIN, PAUSE_MAX);
        Some(sync.covers)
    }
}
