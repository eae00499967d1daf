//! The CRC-32C of every segment's payload as it was handed to the secondary: four bytes for each,
//! kept where the copy is verified.

use super::ports::ResumePoint;
use crate::base::checksum::crc32c;
use crate::base::{Bytes, SegmentIx};

/// See the module's head.
#[derive(Debug)]
pub struct Checksums {
    kept: Option<Vec<u32>>,
    /// The checksum of a whole segment of zeros, and that segment's length.
    zero: (Bytes, u32),
    /// Segments that may hold more than their checksum knows, because a process died while it laid
    /// originals over them: true until this process has written them again.
    doubtful: Vec<bool>,
}

impl Checksums {
    /// For `count` segments; `kept` false remembers none of them.
    pub(super) fn new(count: u64, segment: Bytes, kept: bool) -> Self {
        let count = usize::try_from(count).expect("segments are counted within SEGMENT_COUNT_MAX");
        Self { kept: kept.then(|| vec![0; count]), zero: (segment, zero_crc(segment)), doubtful: Vec::new() }
    }

    /// Takes over what an earlier process has noted.
    pub(super) fn resume(&mut self, point: &ResumePoint) {
        let Some(kept) = &mut self.kept else { return };
        if point.originals_begun {
            self.doubtful = vec![true; kept.len()];
        }
        for segment in &point.placed {
            if let (Some(entry), Some(crc)) = (kept.get_mut(Bytes(segment.ix.get()).as_len()), segment.crc) {
                *entry = crc;
            }
        }
    }

    /// What a segment must have that is read back before originals are laid over it; None also where it
    /// may hold some of them already, by a process that died: all of them are laid over it again.
    pub(super) fn before_overlay(&self, ix: SegmentIx) -> Option<u32> {
        let doubtful = self.doubtful.get(Bytes(ix.get()).as_len()).copied().unwrap_or(false);
        self.get(ix).filter(|_| !doubtful)
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
        if let Some(doubtful) = self.doubtful.get_mut(Bytes(ix.get()).as_len()) {
            *doubtful = false;
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
