//! The interface between the copier and a secondary, and the values that pass between them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::identity::Recognition;
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, ChunkSize, DeviceNumber, Error, Result, SegmentIx, SegmentSize};
use crate::extent::Extent;
use crate::format::SecondaryForm;
use crate::format::archive::OriginalsMode;
use crate::format::segment_log::PlacedSegment;
use crate::format::state::TargetRecord;
use crate::io::{Engine, EngineConfig, FileIx, Piece};

/// Most buffers: more transfers in flight do not raise the throughput of any device.
const BUFFER_COUNT_MAX: u64 = 128;

/// Fewest buffers: one for reading, one for writing.
const BUFFER_COUNT_MIN: u64 = 2;

/// Offset of a segment's payload in a buffer: it follows the room for a control block.
pub const PAYLOAD_OFFSET: usize = 4096;

/// Where the secondary is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecondaryTarget {
    /// Standard output.
    Pipe,
    /// A block device or a file, distinguished when it is opened.
    Path(PathBuf),
}

/// The arguments of [`open`](super::open), as plain values.
#[derive(Clone, Debug)]
pub struct SecondaryRequest {
    /// The target.
    pub target: SecondaryTarget,
    /// Its form.
    pub form: SecondaryForm,
    /// How originals get into the copy; a cold copy has none.
    pub originals: OriginalsMode,
    /// An existing file may be replaced, a device overwritten.
    pub replace: bool,
    /// The copy will be verified: the secondary must be readable.
    pub verify: bool,
    /// Devices that must never be written: those that hold the origin's bytes at the origin's own level (the
    /// origin, its `real`, a volume's partition) and those of the store. Devices below them are found here.
    /// Do not list a disk or physical volume that the origin shares with others, because everything *on* a
    /// listed device is refused as well.
    pub forbidden: Vec<DeviceNumber>,
    /// The origin, for superblocks.
    pub origin: OriginIdentity,
    /// Unit of copying and framing.
    pub segment: SegmentSize,
    /// Unit of copy-on-write, for superblocks.
    pub chunk: ChunkSize,
    /// Parts of the origin that are copied; sorted, disjoint.
    pub block_list: Vec<Extent>,
    /// What the copy shows and continues.
    pub lineage: Lineage,
    /// A raw secondary that holds a copy is updated: what is not written stays.
    pub in_place: bool,
}

/// The kept snapshots and the archive that a copy is related to. Ids are nil if there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// The kept snapshot that the copy shows.
    pub snapshot: Uuid,
    /// The kept snapshot since which changes are copied.
    pub base: Uuid,
    /// The archive of that snapshot.
    pub parent: Uuid,
}

/// The facts about the origin that superblocks hold.
#[derive(Clone, Debug)]
pub struct OriginIdentity {
    /// The origin's name, as the user gave it.
    pub name: String,
    /// Its path.
    pub path: String,
    /// Size in bytes.
    pub size: Bytes,
}

/// A segment to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Its index.
    pub ix: SegmentIx,
    /// Its extent on the origin: a whole segment, or less at the origin's end.
    pub extent: Extent,
    /// The parts of it that are copied; sorted, disjoint, within `extent`. The bytes between them are zero in
    /// the buffer and have no meaning.
    pub valid: &'a [Extent],
    /// XXH3-64 of the payload (`extent.length()` bytes), if checksums are kept.
    pub checksum: Option<u64>,
    /// The payload is known to be all zero.
    pub zero: bool,
}

/// What a killed copy has left, as far as [`reopen`](super::reopen) needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resumed {
    /// The instant: UTC, nanoseconds since 1970.
    pub instant_ns: u64,
    /// The archive's identity; None for a raw secondary.
    pub archive: Option<Uuid>,
    /// Path of the partial file; None for a device.
    pub partial: Option<PathBuf>,
    /// The facts that identify the device or file.
    pub target: Option<TargetRecord>,
    /// The segments on the secondary, each once.
    pub placed: Vec<PlacedSegment>,
    /// Originals may have been applied to them.
    pub originals_begun: bool,
}

/// What the engine has to do for one buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Parts of the buffer to be written.
    pub pieces: Vec<Piece>,
    /// Ranges of the secondary to be made zero.
    pub zeros: Vec<Extent>,
}

/// A place for a copy. The calls come in this order: `set_instant`, `restrict`, `attach`, `opening` until
/// None, `place` for each segment, `overlay` or `append` for each group of originals, `closing` until None,
/// (the engine syncs), re-reading, `seal`, (the engine syncs), `finish`; or `abandon` at any time.
pub trait Secondary: Send {
    /// The secondary's name in messages.
    fn description(&self) -> &str;
    /// True if segments are placed in the order in which the copier reads them, whatever that order is. No
    /// form needs it for correctness, because a frame names its segment; but an archive that is written in
    /// order is also read in the order in which the origin was copied.
    fn is_ordered(&self) -> bool {
        false
    }
    /// True if writes must be submitted one at a time and nothing can be read back.
    fn is_stream(&self) -> bool {
        false
    }
    /// True if originals are packed after the data instead of being applied to it.
    fn appends(&self) -> bool {
        false
    }
    /// True if a changed segment has to be read, checked and written as a whole, because it
    /// carries its own checksum.
    fn is_framed(&self) -> bool {
        false
    }
    /// Sets the instant, which is not known yet when the secondary is opened. UTC, nanoseconds since 1970.
    fn set_instant(&mut self, instant_ns: u64);
    /// Reduces what is copied to `block_list`, as in [`SecondaryRequest::block_list`]. Called before anything
    /// is written.
    fn restrict(&mut self, block_list: &[Extent]) {
        let _ = block_list;
    }
    /// Ranges of the origin, outside the block list, that stay as the secondary, or the parent of an increment, has
    /// them; sorted, disjoint. Called before anything is written.
    fn inherit(&mut self, inherited: &[Extent]) {
        let _ = inherited;
    }
    /// True if data is packed into frames in ascending order: [`Secondary::place_packed`] is called instead of
    /// [`Secondary::place`].
    fn is_packed(&self) -> bool {
        false
    }
    /// Places a frame of data, whose extents are packed one after the other from [`PAYLOAD_OFFSET`].
    ///
    /// # Errors
    /// What the format cannot express.
    fn place_packed(&mut self, extents: &[Extent], memory: &mut [u8]) -> Result<Placement> {
        let _ = (extents, memory);
        Err(Error::usage(format!("{} holds whole segments", self.description())))
    }
    /// Registers the file with the engine.
    ///
    /// # Errors
    /// The engine's.
    fn attach(&mut self, engine: &mut dyn Engine) -> Result<FileIx>;
    /// The next block that comes before all segments, laid out at the front of `memory`.
    ///
    /// # Errors
    /// What the format cannot express.
    fn opening(&mut self, memory: &mut [u8]) -> Result<Option<Placement>> {
        let _ = memory;
        Ok(None)
    }
    /// Places a segment for the first time.
    ///
    /// # Errors
    /// What the format cannot express.
    fn place(&mut self, segment: &Segment<'_>, memory: &mut [u8]) -> Result<Placement>;
    /// The sequence of a segment's data frame once it was placed; None if it has none.
    fn frame_number(&self, ix: SegmentIx) -> Option<u64> {
        let _ = ix;
        None
    }
    /// The partial file that holds the bytes until the copy is complete. None for a device or a pipe.
    fn partial_path(&self) -> Option<&Path> {
        None
    }
    /// The archive's identity; None for a raw secondary.
    fn archive_id(&self) -> Option<Uuid> {
        None
    }
    /// How a reopened target compares with the recorded one.
    fn recognition(&self) -> Recognition {
        Recognition::Uninterrupted
    }
    /// The segment was lost by the secondary; it will be placed again.
    fn forget(&mut self, segment: &Segment<'_>) {
        let _ = segment;
    }
    /// The facts that identify the device or file; None for a pipe.
    fn target(&self) -> Option<&TargetRecord> {
        None
    }
    /// Ranges of the origin that are not copied and must read as zeros on the secondary; returns what must be
    /// zeroed for that. Sorted, disjoint.
    fn absent(&mut self, extents: &[Extent]) -> Placement {
        let _ = extents;
        Placement::default()
    }
    /// The pieces to read the segment back into a buffer; None if nothing was stored because the segment is
    /// zero.
    fn stored(&self, segment: &Segment<'_>) -> Option<Vec<Piece>>;
    /// Checks what was read back by the frame's own checksums. The copier compares the payload's CRC.
    /// `may_be_torn`: an earlier process may have died while it applied originals to this segment.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData).
    fn check_stored(&self, segment: &Segment<'_>, memory: &[u8], may_be_torn: bool) -> Result<()> {
        let _ = (segment, memory, may_be_torn);
        Ok(())
    }
    /// Places a segment to which originals were applied; `changed` are the originals' extents, sorted and
    /// merged. For a framed secondary, or if `segment.checksum` is given, `memory` holds the whole payload;
    /// otherwise only the changed extents.
    ///
    /// # Errors
    /// What the format cannot express.
    fn overlay(&mut self, segment: &Segment<'_>, changed: &[Extent], memory: &mut [u8]) -> Result<Placement>;
    /// Most extents that one frame of originals can name; 0 if `appends` is false.
    fn append_extents_max(&self) -> usize {
        0
    }
    /// Places a frame of originals, packed one after the other from [`PAYLOAD_OFFSET`].
    ///
    /// # Errors
    /// What the format cannot express.
    fn append(&mut self, originals: &[Extent], memory: &mut [u8]) -> Result<Placement> {
        let _ = (originals, memory);
        Err(Error::usage(format!("{} cannot hold originals after the data", self.description())))
    }
    /// The next block that comes after everything else, laid out at the front of `memory`.
    ///
    /// # Errors
    /// What the format cannot express.
    fn closing(&mut self, memory: &mut [u8]) -> Result<Option<Placement>> {
        let _ = memory;
        Ok(None)
    }
    /// What the verifier re-reads besides the segments: unit 0, 1, ... until None.
    fn extra(&self, unit: u64) -> Option<Vec<Piece>> {
        let _ = unit;
        None
    }
    /// Checks what was read for [`Secondary::extra`].
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData).
    fn check_extra(&self, unit: u64, memory: &[u8]) -> Result<()> {
        let _ = (unit, memory);
        Ok(())
    }
    /// Drops the pages of a synced file from the page cache, so that re-reading reaches the medium if direct
    /// I/O is not supported.
    fn forget_cache(&self) {}
    /// Sets the file's exact length; before the last sync.
    ///
    /// # Errors
    /// I/O errors.
    fn seal(&mut self) -> Result<()>;
    /// Gives a synced file its name; the copy is then complete.
    ///
    /// # Errors
    /// I/O errors, or a refusal if the name was taken meanwhile.
    fn finish(&mut self) -> Result<()>;
    /// Keeps a partial file as it is, for a later attempt: nothing was written to it since it was reopened.
    fn leave(&mut self) {}
    /// Gives up: removes a partial file. Returns the state that is left, for the text of an error.
    ///
    /// # Errors
    /// If the partial file could not be removed.
    fn abandon(&mut self) -> Result<String>;
}

/// Zeroes `memory` from `payload_end` to the next multiple of [`DIRECT_IO_ALIGN`].
pub fn zero_padding(memory: &mut [u8], payload_end: usize) {
    let padded = Bytes::from_len(payload_end).align_up(DIRECT_IO_ALIGN).as_len();
    memory[payload_end..padded].fill(0);
}

/// True if every byte of `data` is zero; stops at the first 256 bytes that are not.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    let mut blocks = data.chunks_exact(256);
    for block in &mut blocks {
        let mut any = 0u64;
        for word in block.chunks_exact(8) {
            any |= u64::from_ne_bytes(word.try_into().expect("chunks_exact gives 8 bytes"));
        }
        if any != 0 {
            return false;
        }
    }
    blocks.remainder().iter().all(|byte| *byte == 0)
}

/// The engine configuration for a transfer of segments of this size: every buffer holds a segment and a
/// control block on each side; the buffers stay within `bytes_max`, but there are at least two.
#[must_use]
pub fn engine_config(segment: SegmentSize, bytes_max: Bytes) -> EngineConfig {
    let buffer_bytes = segment.bytes() + DIRECT_IO_ALIGN * 2;
    let count = bytes_max.get() / buffer_bytes.get();
    EngineConfig {
        buffer_count: u16::try_from(count.clamp(BUFFER_COUNT_MIN, BUFFER_COUNT_MAX))
            .expect("the count is clamped"),
        buffer_bytes,
    }
}
