//! What can be wrong with the bytes of an archive.

use std::fmt;

use thiserror::Error;

use super::{FrameKind, Side};
use crate::base::{Bytes, Error as BaseError};

/// A block of an archive, named in messages.
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

/// One fault; [`ArchiveError::at`] adds its place.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages explain the fields
pub enum ArchiveError {
    /// A block of the wrong length was passed in, or the archive ends in the middle of one.
    #[error("{found} bytes where {expected} are needed: the archive is truncated")]
    Truncated { found: usize, expected: usize },
    /// The block has the wrong magic number.
    #[error("{what} has no magic number: this is not a Tidemark archive, or it is damaged here")]
    Magic { what: &'static str },
    /// The block's own checksum is wrong.
    #[error("{what} has CRC-32C {found:08x}, computed {computed:08x}")]
    BlockChecksum { what: &'static str, found: u32, computed: u32 },
    /// The archive has a later format version.
    #[error("the format version is {found}; this program reads versions 1 to 3")]
    Version { found: u32 },
    /// A field is out of its bounds.
    #[error("{field} is {value}, which is invalid")]
    Field { field: &'static str, value: u64 },
    /// A text is not UTF-8, or is too long.
    #[error("{field} is not UTF-8 text")]
    Text { field: &'static str },
    /// Reserved bytes or padding are not zero.
    #[error("{what} holds bytes other than zero")]
    Padding { what: &'static str },
    /// The frame belongs to another archive.
    #[error("the block belongs to archive {found}")]
    Foreign { found: uuid::Uuid },
    /// The frame belongs in another place.
    #[error("the frame has sequence number {found}: it is misplaced, or a frame is missing or duplicated")]
    Sequence { found: u64 },
    /// Head and tail control block disagree.
    #[error("head and tail control block disagree: the frame is torn")]
    Torn,
    /// The payload's checksum is wrong.
    #[error(
        "the {kind} payload for origin offset {origin_offset} has {algorithm} {computed:x}, its control block says {expected:x}"
    )]
    PayloadChecksum {
        algorithm: &'static str,
        kind: FrameKind,
        origin_offset: u64,
        computed: u64,
        expected: u64,
    },
    /// An extent is empty, out of order, or out of bounds.
    #[error("extent {index} is empty, out of order or out of bounds")]
    Extent { index: usize },
    /// There are more extents than a control block holds.
    #[error("{count} extents do not fit one control block")]
    ExtentCount { count: usize },
    /// A map entry does not continue the one before it, or is out of bounds.
    #[error("map entry {start}..{end} does not continue the map at {expected} of {size}")]
    MapOrder { start: u64, end: u64, expected: u64, size: u64 },
    /// The map ends early.
    #[error("the map ends at {end} of {size}")]
    MapEnd { end: u64, size: u64 },
    /// The map disagrees with the data frames.
    #[error("the map marks the segment at {origin_offset} as {map}, but the data frames disagree")]
    MapMismatch { origin_offset: u64, map: &'static str },
    /// A frame follows one of a later kind.
    #[error("a {found} frame follows a {before} frame")]
    KindOrder { found: FrameKind, before: FrameKind },
    /// A segment has a second data frame.
    #[error("a second data frame for the segment at {origin_offset}")]
    Duplicate { origin_offset: u64 },
    /// The tail superblock disagrees with the head or with the frames.
    #[error("{field} is {tail} in the tail superblock, but {seen} was read")]
    Totals { field: &'static str, tail: u64, seen: u64 },
    /// The facts in the tail superblock differ from those in the head.
    #[error("head and tail superblock disagree")]
    Superblocks,
    /// A complete archive cannot have this length.
    #[error(
        "a length of {length} bytes does not fit whole frames of {frame_bytes}: the archive is truncated, or more bytes follow it"
    )]
    Length { length: u64, frame_bytes: u64 },
    /// Bytes follow the tail superblock.
    #[error("bytes follow the tail superblock")]
    Trailing,
}

impl ArchiveError {
    /// As the crate's error, with the place: kind [`BadData`](crate::base::ErrorKind::BadData).
    #[must_use]
    pub fn at(self, block: Block, offset: Bytes, archive: &str) -> BaseError {
        BaseError::bad_data(format!("{archive}: {block} at offset {} is bad", offset.get()))
            .with_source(self)
            .next("do not rely on this archive: fetch it from its source again, or make a new copy")
    }

    pub(super) fn control(side: Side) -> &'static str {
        match side {
            Side::Head => "the head control block",
            Side::Tail => "the tail control block",
        }
    }
}

impl From<ArchiveError> for BaseError {
    /// Without a place: for faults of the archive as a whole.
    fn from(error: ArchiveError) -> Self {
        Self::bad_data("the archive is bad").with_source(error)
    }
}
