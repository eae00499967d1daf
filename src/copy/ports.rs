//! What a copy needs of others: originals, a durable record of placed segments, the release of regions.
//!
//! The copier knows no store and no device-mapper; [`op`](crate::op) implements these.

use std::os::fd::OwnedFd;

use crate::base::{Bytes, Result};
use crate::extent::{Extent, Original};
use crate::secondary::PlacedSegment;

/// Where originals come from: the COW store, as `op` shows it to a copy.
pub trait OriginalsProvider {
    /// Called after the last read of the origin has completed; by a copy that goes on where originals had begun also
    /// before, as there is no such read any more. Answers the COW store, open for direct reading, and its name.
    /// [`OriginalsProvider::next_batch`] begins anew.
    ///
    /// # Errors
    /// I/O errors; [`ErrorKind::StoreInvalid`](crate::base::ErrorKind::StoreInvalid).
    fn open(&mut self) -> Result<(OwnedFd, String)>;
    /// At most `max` further originals, in any order; none at the end.
    ///
    /// # Errors
    /// I/O errors, a store that does not decode.
    fn next_batch(&mut self, max: usize) -> Result<Vec<Original>>;
    /// Called after all originals were read: was the snapshot valid until now?
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`](crate::base::ErrorKind::StoreInvalid) where it was not.
    fn check_valid(&mut self) -> Result<()>;
}

/// Durable record of placed segments, for a process that resumes the copy.
pub trait PlacementLog {
    /// All of these segments were written and made durable.
    ///
    /// # Errors
    /// I/O errors; they end the copy.
    fn placed(&mut self, segments: &[PlacedSegment]) -> Result<()>;
    /// These segments and no others are on the secondary, whatever was said before.
    ///
    /// # Errors
    /// I/O errors; they end the copy.
    fn restate(&mut self, segments: &[PlacedSegment]) -> Result<()>;
    /// Every segment is placed; originals come now, and change segments that are placed.
    ///
    /// # Errors
    /// I/O errors; they end the copy.
    fn originals_begun(&mut self) -> Result<()>;
}

/// Who gives the origin back, region by region: what `op` does with device-mapper.
pub trait Releases {
    /// Nothing will read `region` from the origin again: its writes need not be preserved any more. What
    /// of it was preserved stays in the store. Does not wait.
    ///
    /// # Errors
    /// Of an earlier release that failed in a way that voids the copy.
    fn release(&mut self, region: Extent) -> Result<()>;
    /// Where on the origin exceptions have appeared since the last call: a hint, never an error.
    fn recent(&mut self) -> Vec<Bytes>;
    /// True where a release since the last call has held the origin for longer than it should.
    fn was_slow(&mut self) -> bool;
}

/// What an earlier process, which died, has done of the copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResumePoint {
    /// Segments on the secondary; none of them twice.
    pub placed: Vec<PlacedSegment>,
    /// It had begun to lay originals over them.
    pub originals_begun: bool,
    /// Parts of the origin that are not preserved any more: what they held at the instant is on the secondary, or lost.
    pub released: Vec<Extent>,
}
