//! Measures how long the reads and writes of a device take, from the kernel's counters.
//!
//! `/sys/dev/block/M:m/stat` (Documentation/block/stat.rst) counts I/Os, sectors, and the time that each kind
//! of I/O has waited, since the device was created. The difference of two samples gives the mean latency
//! between them. Reading the counters costs the device nothing. Counts are 64 bits wide on supported hosts;
//! milliseconds have 32 bits ("%u") and wrap, so they are subtracted modulo 2^32.
//!
//! The source has two limits. With `queue/iostats` at 0 the counters stand still: [`Topology::keeps_stats`]
//! distinguishes that from an idle device. And for a device without a queue of its own (all of
//! device-mapper), time is counted in scheduler ticks of 1 to 10 ms each: accurate on average over many I/Os,
//! coarse for a few.

use std::fs;
use std::time::Duration;

use super::Topology;
use crate::base::{DeviceNumber, Sectors};

/// The counters of a device at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskStat {
    /// Reads completed.
    pub reads: u64,
    /// Sum of the time that they waited, in milliseconds; wraps.
    pub read_ticks_ms: u32,
    /// Writes completed.
    pub writes: u64,
    /// Sectors written.
    pub sectors_written: Sectors,
    /// Sum of the time that they waited, in milliseconds; wraps.
    pub write_ticks_ms: u32,
    /// I/Os issued and not completed.
    pub in_flight: u64,
}

/// The activity of a device between two samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interval {
    /// Reads completed.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Sum of the time that these reads and writes waited.
    pub waited: Duration,
    /// I/Os issued and not completed at the second sample.
    pub in_flight: u64,
}

impl Interval {}

impl DiskStat {
    /// Parses a `stat` file; None if the text is not one. Kernels before 4.18 and 5.5 have fewer fields at
    /// the end, later ones may have more.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut fields = [0u64; 9];
        let mut words = text.split_ascii_whitespace();
        for field in &mut fields {
            *field = words.next()?.parse().ok()?;
        }
        let [reads, _, _, read_ticks, writes, _, sectors_written, write_ticks, in_flight] = fields;
        Some(Self {
            reads,
            read_ticks_ms: u32::try_from(read_ticks).ok()?,
            writes,
            sectors_written: Sectors(sectors_written),
            write_ticks_ms: u32::try_from(write_ticks).ok()?,
            in_flight,
        })
    }

    /// Mean time of the writes since `earlier`; None if there were none, or if the counts decreased, which
    /// means another device.
    #[must_use]
    pub fn mean_write_since(&self, earlier: &Self) -> Option<Duration> {
        let count = self.writes.checked_sub(earlier.writes)?;
        let waited = u64::from(self.write_ticks_ms.wrapping_sub(earlier.write_ticks_ms));
        waited.saturating_mul(1_000_000).checked_div(count).map(Duration::from_nanos)
    }

    /// The activity since `earlier`; None if the counts decreased: another device has the number now.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Option<Interval> {
        let ms = |now: u32, then: u32| u64::from(now.wrapping_sub(then));
        let waited =
            ms(self.read_ticks_ms, earlier.read_ticks_ms) + ms(self.write_ticks_ms, earlier.write_ticks_ms);
        Some(Interval {
            reads: self.reads.checked_sub(earlier.reads)?,
            writes: self.writes.checked_sub(earlier.writes)?,
            waited: Duration::from_millis(waited),
            in_flight: self.in_flight,
        })
    }
}

impl Topology {
    /// The counters of `device`; None if the kernel has none.
    #[must_use]
    pub fn disk_stat(&self, device: DeviceNumber) -> Option<DiskStat> {
        DiskStat::parse(&fs::read_to_string(self.node(device).join("stat")).ok()?)
    }

    /// False if the kernel was told to keep no statistics of `device`. (Device-mapper obeys since 6.0;
    /// before, it counts anyway, and this is too pessimistic.)
    #[must_use]
    pub fn keeps_stats(&self, device: DeviceNumber) -> bool {
        self.queue_attribute(device, "iostats").is_none_or(|text| text != "0")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::topology::tests::{dev, machine};

    /// As a 6.12 kernel prints it.
    const STAT: &str = "  122146    54419 163813748   352915   119108    49274 150922129   554402        \
                        3    98636   917116     9158       41 135950576     9733     1749       65\n";

    #[test]
    fn the_fields_are_where_the_kernel_puts_them() {
        let expected = DiskStat {
            reads: 122_146,
            read_ticks_ms: 352_915,
            writes: 119_108,
            sectors_written: Sectors(150_922_129),
            write_ticks_ms: 554_402,
            in_flight: 3,
        };
        assert_eq!(DiskStat::parse(STAT), Some(expected));
        let oldest: Vec<&str> = STAT.split_whitespace().take(11).collect();
        assert_eq!(DiskStat::parse(&oldest.join(" ")), Some(expected));
        for bad in ["", "1 2 3", "a b c d e f g h i", "1 2 3 4 5 6 7 8 -9", "1 2 3 4294967296 5 6 7 8 9"] {
            assert_eq!(DiskStat::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_mean_needs_an_io() {
        let stat = DiskStat::parse(STAT).unwrap();
        assert_eq!(stat.mean_write_since(&stat), None);
        let later = DiskStat {
            reads: stat.reads + 3,
            writes: stat.writes + 1,
            read_ticks_ms: stat.read_ticks_ms + 2,
            write_ticks_ms: stat.write_ticks_ms + 8,
            ..stat
        };
        let interval = later.since(&stat).unwrap();
        assert_eq!(interval.in_flight, 3);
        assert_eq!(later.mean_write_since(&stat), Some(Duration::from_millis(8)));
        assert_eq!(stat.since(&later), None, "another device");
    }

    #[test]
    fn a_device_without_statistics_is_distinguished_from_an_idle_one() {
        let (keep, topology) = machine();
        let disk = keep.path().join("sys/devices/sda");
        assert!(topology.keeps_stats(dev(8, 0)), "true without the attribute");
        assert_eq!(topology.disk_stat(dev(8, 0)), None);
        fs::write(disk.join("stat"), STAT).unwrap();
        assert_eq!(topology.disk_stat(dev(8, 0)), DiskStat::parse(STAT));
        fs::create_dir(disk.join("queue")).unwrap();
        for (text, keeps) in [("1\n", true), ("0\n", false)] {
            fs::write(disk.join("queue/iostats"), text).unwrap();
            assert_eq!(topology.keeps_stats(dev(8, 0)), keeps);
            assert_eq!(topology.keeps_stats(dev(8, 1)), keeps, "a partition has its disk's queue");
        }
    }

    proptest! {
        /// The oracle computes with wide numbers: every difference is right, even if the milliseconds
        /// wrap.
        #[test]
        fn differences_survive_the_wrap(
            start: u32, other: u32, ios in 0u64..1 << 40, read_ms in 0u32..1 << 31, write_ms in 0u32..1 << 31,
        ) {
            let then = DiskStat { read_ticks_ms: start, write_ticks_ms: other, ..DiskStat::default() };
            let wrap = |from: u32, by: u32| {
                u32::try_from((u64::from(from) + u64::from(by)) % (1 << 32)).unwrap()
            };
            let now = DiskStat {
                reads: ios,
                read_ticks_ms: wrap(start, read_ms),
                write_ticks_ms: wrap(other, write_ms),
                ..then
            };
            let waited = Duration::from_millis(u64::from(read_ms) + u64::from(write_ms));
            prop_assert_eq!(now.since(&then).unwrap().waited, waited);
        }

        #[test]
        fn any_text_is_read_or_refused(text in any::<String>()) {
            let _ = DiskStat::parse(&text);
        }
    }
}
