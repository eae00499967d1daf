//! The frames of an increment, whose lengths differ: where each is, and what it must hold.

use crate::base::Bytes;
use crate::extent::Extent;
use crate::format::archive::BLOCK;

/// One frame that was laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PackedFrame {
    /// Where it begins.
    pub(super) offset: Bytes,
    /// Its length.
    pub(super) length: Bytes,
    /// The checksum of its payload.
    pub(super) checksum: u64,
}

/// The frames of an increment. Memory: 24 bytes for each.
#[derive(Debug, Default)]
pub(super) struct PackedFrames {
    frames: Vec<PackedFrame>,
    /// The number of those that hold data: the first ones.
    pub(super) data: u64,
    /// Parts of the origin that are as in the parent; sorted, disjoint.
    pub(super) inherited: Vec<Extent>,
}

impl PackedFrames {
    /// Where frame `sequence` begins: one that was added, or the next one.
    pub(super) fn offset_of(&self, sequence: u64) -> Bytes {
        match self.get(sequence) {
            Some(frame) => frame.offset,
            None => self.frames.last().map_or(BLOCK, |last| last.offset + last.length),
        }
    }

    pub(super) fn get(&self, sequence: u64) -> Option<PackedFrame> {
        self.frames.get(Bytes(sequence).as_len()).copied()
    }

    /// Adds the next frame, which is `length` long.
    pub(super) fn add(&mut self, length: Bytes, checksum: u64) {
        let offset = self.offset_of(u64::MAX);
        self.frames.push(PackedFrame { offset, length, checksum });
    }
}
