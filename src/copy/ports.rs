//! The interfaces that a copy needs: originals, a durable record of placed segments, the release of regions.
//!
//! The copier knows neither the store nor device-mapper; [`op`](crate::op) implements these traits.

use std::os::fd::OwnedFd;

use crate::base::{Bytes, Result};
use crate::extent::{Extent, Original};
use crate::secondary::PlacedSegment;

/// The source of originals: the COW store.
pub trait OriginalsProvider {
    /// Called after the last read of the origin has completed. A resumed copy for which originals had begun
    /// also calls it before that, since it reads nothing from the origin any more. Returns the COW store,
    /// open for direct reading, and its name. [`OriginalsProvider::next_batch`] starts again from the first
    /// original.
    ///
    /// # Errors
    /// I/O errors; [`ErrorKind::StoreInvalid`](crate::base::ErrorKind::StoreInvalid).
    fn open(&mut self) -> Result<(OwnedFd, String)>;
    /// At most `max` further originals, in any order; none at the end.
    ///
    /// # Errors
    /// I/O errors; a store that does not decode.
    fn next_batch(&mut self, max: usize) -> Result<Vec<Original>>;
    /// Called after all originals were read: checks that the snapshot was valid until now.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`](crate::base::ErrorKind::StoreInvalid) if it was not.
    fn check_valid(&mut self) -> Result<()>;
}

/// The durable record of placed segments, for a process that resumes the copy.
pub trait PlacementLog {
    /// Records that all of these segments were written and made durable.
    ///
    /// # Errors
    /// I/O errors; they end the copy.
    fn placed(&mut self, segments: &[PlacedSegment]) -> Result<()>;
    /// Records that these segments and no others are on the secondary; replaces all earlier records.
    ///
    /// # Errors
    /// I/O errors; they end the copy.
    fn rewrite(&mut self, segments: &[PlacedSegment]) -> Result<()>;
    /// Records that every segment is placed, and that originals change placed segments from now on.
    ///
    /// # Errors
    /// I/O errors; they end the copy.
    fn originals_begun(&mut self) -> Result<()>;
}

/// Releases the origin region by region; implemented in `op` with device-mapper.
pub trait Releases {
    /// Nothing will read `region` from the origin again: writes to it need not be preserved any more. Its
    /// originals stay in the store. Does not wait.
    ///
    /// # Errors
    /// The error of an earlier release that failed in a way that invalidates the copy.
    fn release(&mut self, region: Extent) -> Result<()>;
    /// Where on the origin exceptions have appeared since the last call. A hint; never fails.
    fn recent(&mut self) -> Vec<Bytes>;
    /// True if a release since the last call has held the origin for longer than intended.
    fn was_slow(&mut self) -> bool;
}

/// What an earlier process has done of the copy before it died.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResumePoint {
    /// Segments on the secondary; each once.
    pub placed: Vec<PlacedSegment>,
    /// The process had begun to apply originals to them.
    pub originals_begun: bool,
    /// Parts of the origin that are not preserved any more: their content at the instant is on the secondary,
    /// or lost.
    pub released: Vec<Extent>,
}
