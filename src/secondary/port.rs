//! What the copier asks of a secondary, and the values that pass between them.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::identity::Known;
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, ChunkSize, DeviceNumber, Error, Result, SegmentIx, SegmentSize};
use crate::extent::Extent;
use crate::format::archive::OriginalsMode;
use crate::format::segment_log::PlacedSegment;
use crate::format::state::TargetRecord;
use crate::io::{Engine, EngineConfig, FileIx, Piece};

/// Buffers at most: more than this many transfers in flight gain nothing on any device.
const BUFFER_COUNT_MAX: u64 = 128;

/// Buffers at least: one being read while another is being written.
const BUFFER_COUNT_MIN: u64 = 2;

/// Where a segment's payload begins in a buffer: behind the room for a control block.
pub const PAYLOAD_OFFSET: usize = 4096;

/// The form of a secondary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Byte for byte.
    Raw,
    /// Framed segments.
    Archive,
}

/// Where the secondary is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard output.
    Pipe,
    /// A block device or a file, told apart when it is opened.
    Path(PathBuf),
}

/// What is wanted of [`open`](super::open), as plain values.
#[derive(Clone, Debug)]
pub struct SecondaryRequest {
    /// Where.
    pub target: Target,
    /// In which form.
    pub form: Form,
    /// Where originals go; a cold copy has none.
    pub originals: OriginalsMode,
    /// A file in the way may be replaced, a device overwritten.
    pub replace: bool,
    /// The copy will be verified: the secondary must be readable.
    pub verify: bool,
    /// The devices that hold the origin's bytes at the origin's own level (the origin, its `real`,
    /// a volume's partition) and the store's: never to be written. What lies beneath them is found
    /// here. Not to be listed: a disk or physical volume that the origin shares with others, because
    /// everything that sits *on* a listed device is refused as well.
    pub forbidden: Vec<DeviceNumber>,
    /// The origin, for superblocks.
    pub origin: OriginIdentity,
    /// Unit of copying and framing.
    pub segment: SegmentSize,
    /// Unit of copy-on-write, for superblocks.
    pub chunk: ChunkSize,
    /// Parts of the origin that are copied; sorted, disjoint.
    pub block_list: Vec<Extent>,
}

/// What superblocks say about the origin.
#[derive(Clone, Debug)]
pub struct OriginIdentity {
    /// The name by which the user calls it.
    pub name: String,
    /// Its path.
    pub path: String,
    /// Size in bytes.
    pub size: Bytes,
}

/// A segment on its way.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Its index.
    pub ix: SegmentIx,
    /// Its extent on the origin: a whole segment, or less at the origin's end.
    pub extent: Extent,
    /// The parts of it that are copied; sorted, disjoint, within `extent`. What is between them is
    /// zero in the buffer and means nothing.
    pub valid: &'a [Extent],
    /// CRC-32C of the payload (`extent.length()` bytes), where checksums are kept.
    pub crc: Option<u32>,
    /// The payload is known to be all zero.
    pub zero: bool,
}

/// What a copy that was killed has left, as far as [`reopen`](super::reopen) needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resumed {
    /// The instant: UTC, nanoseconds since 1970.
    pub instant_ns: u64,
    /// The archive's identity; None for a raw secondary.
    pub archive: Option<Uuid>,
    /// Where the partial file is; None for a device.
    pub partial: Option<PathBuf>,
    /// By what the device or the file is known again.
    pub target: Option<TargetRecord>,
    /// The segments on the secondary, each once.
    pub placed: Vec<PlacedSegment>,
    /// Originals may have been laid over them.
    pub originals_begun: bool,
}

/// What the engine shall do for one buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Parts of the buffer to be written.
    pub pieces: Vec<Piece>,
    /// Ranges of the secondary to be made zero.
    pub zeros: Vec<Extent>,
}

/// A place for a copy. The calls come in this order: `begin`, `restrict`, `attach`, `opening` until None,
/// `place` for each segment, `overlay` or `append` for each group of originals, `closing` until None,
/// (the engine syncs), re-reading, `seal`, (the engine syncs), `finish`; or `abandon` at any time.
pub trait Secondary: Send {
    /// The secondary's name in messages.
    fn description(&self) -> &str;
    /// True where segments are placed in the order in which they were handed out, whatever order that
    /// is. No form needs it for being right, because a frame says which segment it holds; an archive that
    /// is written so reads back along the origin as it was copied.
    fn is_ordered(&self) -> bool {
        false
    }
    /// True where writes must be submitted one at a time and nothing can be read back.
    fn is_stream(&self) -> bool {
        false
    }
    /// True where originals are packed behind the data instead of being laid over it.
    fn appends(&self) -> bool {
        false
    }
    /// True where a changed segment has to be read, checked and written as a whole, because it
    /// carries its own checksum.
    fn is_framed(&self) -> bool {
        false
    }
    /// The instant, known after the secondary was opened. UTC, nanoseconds since 1970.
    fn begin(&mut self, instant_ns: u64);
    /// What is copied turned out to be less than was asked for: `block_list`, as in
    /// [`SecondaryRequest::block_list`]. Before anything is written.
    fn restrict(&mut self, block_list: &[Extent]) {
        let _ = block_list;
    }
    /// Gives the engine the file.
    ///
    /// # Errors
    /// The engine's.
    fn attach(&mut self, engine: &mut dyn Engine) -> Result<FileIx>;
    /// The next block that comes before all segments, made at the front of `memory`.
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
    /// The sequence of a segment's data frame, once it was placed; None where it has none.
    fn frame_number(&self, ix: SegmentIx) -> Option<u64> {
        let _ = ix;
        None
    }
    /// Where the bytes are until the copy is complete: a partial file. None for a device or a pipe.
    fn partial_path(&self) -> Option<&Path> {
        None
    }
    /// The archive's identity; None for a raw secondary.
    fn archive_id(&self) -> Option<Uuid> {
        None
    }
    /// Whether what was opened to be gone on with was there all the time since the copy began.
    fn known(&self) -> Known {
        Known::Throughout
    }
    /// The segment turned out not to be there any more; it is placed again.
    fn forget(&mut self, segment: &Segment<'_>) {
        let _ = segment;
    }
    /// By what the device or the file is known again; None for a pipe.
    fn target(&self) -> Option<&TargetRecord> {
        None
    }
    /// Ranges of the origin that are not copied, and must read as zeros on the secondary: what is to be
    /// made zero for that. Sorted, disjoint.
    fn absent(&mut self, extents: &[Extent]) -> Placement {
        let _ = extents;
        Placement::default()
    }
    /// What to read, and to where in a buffer, to have the segment back; None where nothing was
    /// stored because it is zero.
    fn stored(&self, segment: &Segment<'_>) -> Option<Vec<Piece>>;
    /// Checks what was read back: the frame's own evidence. The payload's CRC is the copier's to
    /// compare.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData).
    fn check_stored(&self, segment: &Segment<'_>, memory: &[u8]) -> Result<()> {
        let _ = (segment, memory);
        Ok(())
    }
    /// Places a segment over which originals were laid; `changed` are the originals' extents, sorted
    /// and merged. The whole payload is in `memory` for a framed secondary or where `segment.crc` is
    /// given, otherwise the changed extents alone.
    ///
    /// # Errors
    /// What the format cannot express.
    fn overlay(&mut self, segment: &Segment<'_>, changed: &[Extent], memory: &mut [u8]) -> Result<Placement>;
    /// Extents that one frame of originals can name; 0 where `appends` is false.
    fn append_extents_max(&self) -> usize {
        0
    }
    /// Places a frame of originals, packed one behind the other from [`PAYLOAD_OFFSET`].
    ///
    /// # Errors
    /// What the format cannot express.
    fn append(&mut self, originals: &[Extent], memory: &mut [u8]) -> Result<Placement> {
        let _ = (originals, memory);
        Err(Error::usage(format!("{} cannot hold originals behind the data", self.description())))
    }
    /// The next block that comes behind everything, made at the front of `memory`.
    ///
    /// # Errors
    /// What the format cannot express.
    fn closing(&mut self, memory: &mut [u8]) -> Result<Option<Placement>> {
        let _ = memory;
        Ok(None)
    }
    /// What to re-read beside the segments, for the verifier: unit 0, 1, ... until None.
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
    /// Drops what the page cache holds of a synced file, so that re-reading reaches the medium where
    /// direct I/O is not to be had.
    fn forget_cache(&self) {}
    /// Gives the file its exact length; before the last sync.
    ///
    /// # Errors
    /// I/O errors.
    fn seal(&mut self) -> Result<()>;
    /// Gives a synced file its name; the copy is complete.
    ///
    /// # Errors
    /// I/O errors, or a refusal where the name was taken meanwhile.
    fn finish(&mut self) -> Result<()>;
    /// Leaves a partial file as it is, for a later attempt: nothing was written to it since it was reopened.
    fn leave(&mut self) {}
    /// Gives up: removes a partial file. Answers the state that is left, for an error's text.
    ///
    /// # Errors
    /// Where the partial file could not be removed.
    fn abandon(&mut self) -> Result<String>;
}

/// Zeroes what lies between `payload_end` and the next [`DIRECT_IO_ALIGN`] of `memory`.
pub fn zero_padding(memory: &mut [u8], payload_end: usize) {
    let padded = Bytes::from_len(payload_end).align_up(DIRECT_IO_ALIGN).as_len();
    memory[payload_end..padded].fill(0);
}

/// True where every byte of `data` is zero; stops at the first 256 bytes that are not.
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

/// The engine that a transfer of segments of this size wants: a segment and a control block on each side in
/// every buffer, within `bytes_max` but for two buffers at least.
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
