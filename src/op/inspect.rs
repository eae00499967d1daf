//! `tidemark inspect`: describes an archive. Reads both superblocks and the map, no data.

use std::path::PathBuf;

use serde::Serialize;

use super::request::InspectRequest;
use crate::base::clock::utc_text;
use crate::base::{Bytes, ErrorKind, Result};
use crate::format::archive::{MapEntry, MapState, Superblock, Totals};
use crate::progress::{Event, Observer, Phase};
use crate::restore::chain;
use crate::restore::map::read_map;
use crate::secondary::archive_read::ArchiveFile;

/// Totals of the map. Sizes in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MapSummary {
    /// Entries of the map.
    pub entries: u64,
    /// Bytes of the origin in data frames.
    pub present_bytes: Bytes,
    /// Bytes that were copied and are all zero.
    pub zero_bytes: Bytes,
    /// Bytes that were not copied.
    pub absent_bytes: Bytes,
    /// Bytes that are as in the parent.
    pub inherited_bytes: Bytes,
}

impl MapSummary {
    fn add(&mut self, entry: MapEntry) {
        self.entries += 1;
        let sum = match entry.state {
            MapState::Present => &mut self.present_bytes,
            MapState::Zero => &mut self.zero_bytes,
            MapState::Absent => &mut self.absent_bytes,
            MapState::Inherited => &mut self.inherited_bytes,
        };
        *sum += entry.extent.length();
    }
}

/// The description of an archive.
#[derive(Clone, Debug, Serialize)]
pub struct InspectReport {
    /// The archive's name.
    pub archive: String,
    /// Its length in bytes.
    pub archive_bytes: Bytes,
    /// The format's version.
    pub version: u32,
    /// Identity, origin, sizes.
    pub superblock: Superblock,
    /// The instant in RFC 3339; None if it is out of the calendar's range.
    pub instant: Option<String>,
    /// The archive that an increment continues, if it is beside it.
    pub parent: Option<PathBuf>,
    /// Segments of the origin.
    pub segments: u64,
    /// Frames by kind.
    pub totals: Totals,
    /// The map.
    pub map: MapSummary,
}

/// Reads the superblocks and the map. The data is not read, so a damaged payload is not found (see `verify`).
///
/// # Errors
/// [`ErrorKind::BadData`] if the file is not an archive, is truncated, or has a
/// damaged map; I/O errors; any error that the interrupt returns.
pub fn run(
    request: &InspectRequest,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<InspectReport> {
    observer.event(&Event::Phase { phase: Phase::Prepare, total: None });
    let archive = ArchiveFile::open(&request.archive)?;
    let superblock = archive.superblock().clone();
    let totals = *archive.totals();
    let mut map = MapSummary::default();
    read_map(&archive, interrupt, &mut |entry| {
        map.add(entry);
        Ok(())
    })?;
    let parent = match superblock.is_increment() {
        // That its directory cannot be read says nothing about the archive.
        true => match chain::parent_of(archive.path(), &superblock, interrupt) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            found => found.ok().flatten(),
        },
        false => None,
    };
    Ok(InspectReport {
        archive: archive.path().display().to_string(),
        archive_bytes: archive.length(),
        version: superblock.version.number(),
        instant: utc_text(superblock.instant_utc_ns),
        parent,
        segments: superblock.segment.count_for(superblock.origin_size),
        totals,
        map,
        superblock,
    })
}
