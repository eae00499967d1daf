//! Offsets and lengths of everything in an archive.

use uuid::Uuid;

use super::ArchiveError;
use crate::base::{Bytes, SegmentSize};
use crate::format::bytes::BLOCK_BYTES;

/// The version written, and the only one read.
pub const VERSION: u32 = 1;

/// Bytes of a superblock, and of a control block.
pub const BLOCK: Bytes = Bytes::kib(4);

/// Offset of the payload in a frame.
pub const PAYLOAD_OFFSET: usize = BLOCK_BYTES;

/// The facts that determine all offsets in one archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The archive's identity, repeated in each control block.
    pub archive: Uuid,
    /// Size of the origin.
    pub origin_size: Bytes,
    /// Bytes of a frame's payload.
    pub segment: SegmentSize,
}

impl Layout {
    /// Bytes of a whole frame: head control block, payload, tail control block.
    #[must_use]
    pub fn frame_bytes(&self) -> Bytes {
        frame_bytes(self.segment)
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
