//! Offsets and lengths of everything in an archive.

use serde::{Serialize, Serializer};
use uuid::Uuid;

use super::{ArchiveError, FrameKind};
use crate::base::checksum::{crc32c, xxh3_64};
use crate::base::{Bytes, SegmentSize};
use crate::format::bytes::BLOCK_BYTES;

/// A version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Payloads have a CRC-32C. It misses a change that is within a block which ends with its own CRC-32C, such as
    /// ext4's superblock. Read, never written.
    V1,
    /// Payloads have an XXH3-64.
    V2,
    /// As version 2; the archive names the kept snapshot that it shows, or the archive that it continues, or both.
    V3,
}

impl Version {
    /// The version of an archive that names neither a snapshot nor a parent: older programs read it.
    pub const CURRENT: Self = Self::V2;
    /// The version of an archive that names one of them.
    pub const NAMING: Self = Self::V3;

    /// The number in a superblock.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }

    pub(super) fn from_number(number: u32) -> Option<Self> {
        [Self::V1, Self::V2, Self::V3].into_iter().find(|version| version.number() == number)
    }

    /// The checksum of a payload: CRC-32C in the lower 32 bits, or XXH3-64.
    #[must_use]
    pub fn payload_checksum(self, payload: &[u8]) -> u64 {
        match self {
            Self::V1 => u64::from(crc32c(payload)),
            Self::V2 | Self::V3 => xxh3_64(payload),
        }
    }

    /// The checksum's name.
    pub(super) fn checksum_name(self) -> &'static str {
        match self {
            Self::V1 => "CRC-32C",
            Self::V2 | Self::V3 => "XXH3-64",
        }
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.number())
    }
}

/// Bytes of a superblock, and of a control block.
pub const BLOCK: Bytes = Bytes::kib(4);

/// Offset of the payload in a frame.
pub const PAYLOAD_OFFSET: usize = BLOCK_BYTES;

/// The facts that determine all offsets in one archive, and how its frames are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The format's version.
    pub version: Version,
    /// The archive's identity, repeated in each control block.
    pub archive: Uuid,
    /// Size of the origin.
    pub origin_size: Bytes,
    /// Bytes of a frame's payload; of an increment the most.
    pub segment: SegmentSize,
    /// The archive continues another one: its frames are as long as their payloads need.
    pub is_increment: bool,
}

impl Layout {
    /// Bytes of a whole frame: head control block, payload, tail control block. Of an increment the most.
    #[must_use]
    pub fn frame_bytes(&self) -> Bytes {
        frame_bytes(self.segment)
    }

    /// Bytes that a payload takes in the archive, with the zeros after it.
    #[must_use]
    pub fn stored_payload(&self, payload_length: Bytes) -> Bytes {
        if self.is_increment { payload_length.align_up(BLOCK) } else { self.segment.bytes() }
    }

    /// Bytes of the frame of a payload.
    #[must_use]
    pub fn stored_frame(&self, payload_length: Bytes) -> Bytes {
        BLOCK + self.stored_payload(payload_length) + BLOCK
    }

    /// True if the payload of this kind of frame consists of its extents, one after the other.
    #[must_use]
    pub fn is_packed(&self, kind: FrameKind) -> bool {
        kind == FrameKind::Originals || (kind == FrameKind::Data && self.is_increment)
    }

    /// Frames in a complete archive of `length` bytes.
    ///
    /// # Errors
    /// [`ArchiveError::Length`] if no number of whole frames gives that length.
    pub fn frame_count(&self, length: Bytes) -> Result<u64, ArchiveError> {
        let bad = ArchiveError::Length { length: length.get(), frame_bytes: self.frame_bytes().get() };
        match length.checked_sub(BLOCK + BLOCK) {
            Some(frames) if frames.is_aligned(self.frame_bytes()) => {
                Ok(frames.get() / self.frame_bytes().get())
            }
            _ => Err(bad),
        }
    }

    /// Where the tail superblock of an increment of `length` bytes begins.
    ///
    /// # Errors
    /// [`ArchiveError::Length`] if no frames give that length.
    pub fn tail_offset(&self, length: Bytes) -> Result<Bytes, ArchiveError> {
        let tail = length.checked_sub(BLOCK).filter(|tail| *tail >= BLOCK && tail.is_aligned(BLOCK));
        tail.ok_or(ArchiveError::Length { length: length.get(), frame_bytes: BLOCK.get() })
    }
}

/// Bytes of a whole frame with payloads of `segment`.
#[must_use]
pub fn frame_bytes(segment: SegmentSize) -> Bytes {
    BLOCK + segment.bytes() + BLOCK
}

/// Where frame `sequence` begins. For the sequence after the last frame this is the offset of the tail
/// superblock. None if it does not fit 64 bits.
#[must_use]
pub fn frame_offset(sequence: u64, segment: SegmentSize) -> Option<Bytes> {
    frame_bytes(segment).get().checked_mul(sequence)?.checked_add(BLOCK.get()).map(Bytes)
}
