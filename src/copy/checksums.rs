//! The CRC-32C of every segment's payload as it was handed to the secondary: four bytes for each,
//! kept where the copy is verified.

use crate::base::checksum::crc32c;
use crate::base::{Bytes, SegmentIx};

/// See the module's head.
#[derive(Debug)]
pub struct Checksums {
    kept: Option<Vec<u32>>,
    /// The checksum of a whole segment of zeros, and that segment's length.
    zero: (Bytes, u32),
}

impl Checksums {
    /// For `count` segments; `kept` false remembers none of them.
    pub(super) fn new(count: u64, segment: Bytes, kept: bool) -> Self {
        let count = usize::try_from(count).expect("segments are counted within SEGMENT_COUNT_MAX");
        Self { kept: kept.then(|| vec![0; count]), zero: (segment, zero_crc(segment)) }
    }

    pub(super) fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// The checksum of a payload that is known to be zero, or not.
    pub(super) fn of(&self, payload: &[u8], zero: bool) -> u32 {
        if zero && Bytes::from_len(payload.len()) == self.zero.0 { self.zero.1 } else { crc32c(payload) }
    }

    pub(super) fn set(&mut self, ix: SegmentIx, crc: u32) {
        if let Some(kept) = &mut self.kept {
            kept[Bytes(ix.get()).as_len()] = crc;
        }
    }

    /// What was set, where anything is kept.
    pub(super) fn get(&self, ix: SegmentIx) -> Option<u32> {
        self.kept.as_ref().map(|kept| kept[Bytes(ix.get()).as_len()])
    }
}

fn zero_crc(length: Bytes) -> u32 {
    crc32c(&vec![0u8; length.as_len()])
}
