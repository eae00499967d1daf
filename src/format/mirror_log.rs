//! The log of device-mapper's `mirror` target: one bit for each region, set if both legs hold the same there.
//!
//! Encoded before the target exists, so that only regions that differ are copied; from then on the kernel keeps it. All
//! numbers are little-endian.
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 4 | magic: `MiRr` as a number, 0x4d695272 |
//! | 4 | 4 | version: 2 |
//! | 8 | 8 | count of regions |
//! | 16 | 1008 | zero |
//! | 1024 | - | the bits, from the lowest bit of the first byte on; whole words of 32 bits |
//!
//! Source: Linux `drivers/md/dm-log.c` (`struct log_header_disk`, `create_log_context`, `disk_resume`).

use crate::base::{Bytes, Sectors};

const MAGIC: u32 = 0x4d69_5272;
const VERSION: u32 = 2;
const BITS_AT: usize = 1024;

/// The regions of a mirror.
#[derive(Debug)]
pub struct MirrorLog {
    /// Sectors of a region, a power of two.
    region: Sectors,
    count: u64,
    bits: Vec<u8>,
}

impl MirrorLog {
    /// For a device of `length`: all regions hold the same.
    #[must_use]
    pub fn in_sync(length: Sectors, region: Sectors) -> Self {
        let count = length.get().div_ceil(region.get());
        let mut bits = vec![0u8; Bytes(count.div_ceil(32) * 4).as_len()];
        for at in 0..count {
            bits[Bytes(at / 8).as_len()] |= 1 << (at % 8);
        }
        Self { region, count, bits }
    }

    /// Marks the regions that bytes `start` to `end` touch as different.
    pub fn differ(&mut self, start: Bytes, end: Bytes) {
        let region = self.region.bytes().get();
        let last = end.get().div_ceil(region).min(self.count);
        for at in start.get() / region..last {
            self.bits[Bytes(at / 8).as_len()] &= !(1 << (at % 8));
        }
    }

    /// The sectors of the regions that differ; the last region may reach past the device's end.
    #[must_use]
    pub fn differing(&self) -> Sectors {
        let same: u64 = self.bits.iter().map(|byte| u64::from(byte.count_ones())).sum();
        Sectors((self.count - same) * self.region.get())
    }

    /// The log, as the kernel reads it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut log = vec![0u8; BITS_AT];
        log[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        log[4..8].copy_from_slice(&VERSION.to_le_bytes());
        log[8..16].copy_from_slice(&self.count.to_le_bytes());
        log.extend_from_slice(&self.bits);
        log
    }
}

/// How far the kernel has got with a mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorStatus {
    /// Regions in which both legs hold the same.
    pub synced: u64,
    /// All regions.
    pub total: u64,
    /// False after a read or write of a leg, or of the log, has failed.
    pub is_healthy: bool,
}

impl MirrorStatus {
    /// Parses the text of the kernel: `2 LEG LEG SYNCED/TOTAL 1 HEALTH 3 disk LOG HEALTH` (`mirror_status` in Linux
    /// `drivers/md/dm-raid1.c`). None for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let ["2", _, _, regions, "1", legs, "3", "disk", _, log] = words[..] else { return None };
        let (synced, total) = regions.split_once('/')?;
        Some(Self {
            synced: synced.parse().ok()?,
            total: total.parse().ok()?,
            is_healthy: legs == "AA" && log == "A",
        })
    }

    /// True once nothing is left to be copied.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.is_healthy && self.synced == self.total
    }

    /// What has been copied, in per cent.
    #[must_use]
    pub fn percent(&self) -> u64 {
        (self.synced * 100).checked_div(self.total).unwrap_or(100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_marks_the_regions_that_differ() {
        let mut log = MirrorLog::in_sync(Sectors(4096 + 1), Sectors(1024));
        assert_eq!(log.encode().len(), 1024 + 4);
        assert_eq!(log.encode()[1024..], [0b1_1111, 0, 0, 0]);
        let differ = |log: &mut MirrorLog, start: Sectors, end: Sectors| {
            log.differ(start.bytes(), end.bytes());
        };
        differ(&mut log, Sectors(1023), Sectors(1025));
        assert_eq!(log.encode()[1024..], [0b1_1100, 0, 0, 0]);
        differ(&mut log, Sectors(4096), Sectors(4104));
        assert_eq!(log.encode()[1024..], [0b0_1100, 0, 0, 0]);
        assert_eq!(log.differing(), Sectors(3 * 1024));
        assert_eq!(&log.encode()[..16], b"rRiM\x02\0\0\0\x05\0\0\0\0\0\0\0");
    }

    #[test]
    fn the_status_of_a_mirror_is_parsed() {
        let parse = |text| MirrorStatus::parse(text).unwrap();
        let whole = parse("2 254:3 254:1 32/32 1 AA 3 disk 254:9 A");
        assert!(whole.is_complete());
        let part = parse("2 254:3 254:1 8/32 1 AA 3 disk 254:9 A");
        assert!(!part.is_complete() && part.is_healthy);
        assert_eq!(part.percent(), 25);
        for text in ["2 254:3 254:1 32/32 1 DA 3 disk 254:9 A", "2 254:3 254:1 32/32 1 AA 3 disk 254:9 D"] {
            assert!(!parse(text).is_complete(), "{text}");
        }
        for text in ["", "2 a b 1/2", "2 a b x/2 1 AA 3 disk c A", "3 a b c 1/2 1 AAA 3 disk c A"] {
            assert_eq!(MirrorStatus::parse(text), None, "{text}");
        }
    }
}
