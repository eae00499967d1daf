//! What can be wrong with the bytes of an archive.

use std::fmt;

use thiserror::Error;

use super::{FrameKind, Side};
use crate::base::{Bytes, Error as BaseError};

/// A block of an archive, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// The first 4 KiB.
    HeadSuperblock,
    /// The last 4 KiB.
    TailSuperblock,
    /// A frame, by its sequence.
    Frame(u64),
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HeadSuperblock => f.write_str("the head superblock"),
            Self::TailSuperblock => f.write_str("the tail superblock"),
            Self::Frame(sequence) => write!(f, "frame {sequence}"),
        }
    }
}

/// One fault; [`ArchiveError::at`] adds where it is.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say what the fields are
pub enum ArchiveError {
    /// A block of the wrong length was handed in, or the archive ends in the middle of one.
    #[error("{found} bytes where {expected} are needed: the archive is cut off")]
    Truncated { found: usize, expected: usize },
    /// Not the block that belongs here.
    #[error("{what} has no magic number: this is no Tidemark archive, or it is damaged here")]
    Magic { what: &'static str },
    /// The block's own checksum.
    #[error("{what} has CRC-32C {found:08x}, computed {computed:08x}")]
    BlockChecksum { what: &'static str, found: u32, computed: u32 },
    /// A format of the future.
    #[error("format version {found}, this program reads version 1")]
    Version { found: u32 },
    /// A field outside its bounds.
    #[error("{field} is {value}, which cannot be")]
    Field { field: &'static str, value: u64 },
    /// A text that is not UTF-8 or too long.
    #[error("{field} is no UTF-8 text")]
    Text { field: &'static str },
    /// Reserved bytes or padding that are not zero.
    #[error("{what} holds bytes other than zero")]
    Padding { what: &'static str },
    /// The frame of another archive.
    #[error("the block belongs to archive {found}")]
    Foreign { found: uuid::Uuid },
    /// A frame in the place of another.
    #[error("the frame says that it is number {found}: it is misplaced, or one is missing or doubled")]
    Sequence { found: u64 },
    /// Head and tail control block disagree.
    #[error("head and tail control block disagree: the frame is torn")]
    Torn,
    /// The payload's checksum.
    #[error(
        "the {kind} payload for origin offset {origin_offset} has CRC-32C {computed:08x}, its control block says {expected:08x}"
    )]
    PayloadChecksum { kind: FrameKind, origin_offset: u64, computed: u32, expected: u32 },
    /// An extent that is empty, out of order, or outside.
    #[error("extent {index} is empty, out of order or out of bounds")]
    Extent { index: usize },
    /// More extents than a control block holds.
    #[error("{count} extents do not fit one control block")]
    ExtentCount { count: usize },
    /// A map entry that does not continue the one before, or is outside.
    #[error("map entry {start}..{end} does not continue the map at {expected} of {size}")]
    MapOrder { start: u64, end: u64, expected: u64, size: u64 },
    /// The map ends early.
    #[error("the map ends at {end} of {size}")]
    MapEnd { end: u64, size: u64 },
    /// The map disagrees with the frames.
    #[error("the map calls the segment at {origin_offset} {map}, the frames say otherwise")]
    MapMismatch { origin_offset: u64, map: &'static str },
    /// A kind of frame behind a later kind.
    #[error("a {found} frame behind a {before} frame")]
    KindOrder { found: FrameKind, before: FrameKind },
    /// A second data frame for one segment.
    #[error("a second data frame for the segment at {origin_offset}")]
    Duplicate { origin_offset: u64 },
    /// The tail superblock disagrees with the head or the frames.
    #[error("{field} is {tail} in the tail superblock, {seen} was seen")]
    Totals { field: &'static str, tail: u64, seen: u64 },
    /// The tail superblock repeats the head's facts differently.
    #[error("head and tail superblock disagree")]
    Superblocks,
    /// A file length that no whole archive has.
    #[error(
        "a length of {length} bytes is not that of whole frames of {frame_bytes}: the archive is cut off, or something follows it"
    )]
    Length { length: u64, frame_bytes: u64 },
    /// Bytes behind the tail superblock.
    #[error("bytes follow the tail superblock")]
    Trailing,
}

impl ArchiveError {
    /// As the crate's error, with the place: kind [`BadData`](crate::base::ErrorKind::BadData).
    #[must_use]
    pub fn at(self, block: Block, offset: Bytes, archive: &str) -> BaseError {
        BaseError::bad_data(format!("{archive}: {block} at offset {} is bad", offset.get()))
            .with_source(self)
            .next("do not rely on this archive: take it again from where it came, or make a new copy")
    }

    pub(super) fn control(side: Side) -> &'static str {
        match side {
            Side::Head => "the head control block",
            Side::Tail => "the tail control block",
        }
    }
}

impl From<ArchiveError> for BaseError {
    /// Without a place: for what concerns an archive as a whole.
    fn from(error: ArchiveError) -> Self {
        Self::bad_data("the archive is bad").with_source(error)
    }
}
