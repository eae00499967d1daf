//! Measures the latency of the applications' reads and writes of the origin, for `--impact`.
//!
//! Reads the counters of the origin's own device, which stays the same while its table is replaced. The copier reads
//! the device below it, so the copier's reads are not counted. This module does not interpret the measurements; the
//! copier does.

use std::time::Duration;

use crate::base::DeviceNumber;
use crate::copy::{LatencyProbe, LatencySample, impact};
use crate::topology::Topology;
use crate::topology::stats::DiskStat;

/// Samples the mean latency of the origin's requests.
#[derive(Clone, Debug)]
pub struct OriginProbe {
    topology: Topology,
    device: DeviceNumber,
    last: Option<DiskStat>,
}

impl OriginProbe {
    /// Samples `device`. The first sample covers the requests from now on. None if the kernel keeps no statistics of
    /// the device.
    #[must_use]
    pub fn new(device: DeviceNumber) -> Option<Self> {
        Self::at(Topology::default(), device)
    }

    fn at(topology: Topology, device: DeviceNumber) -> Option<Self> {
        let last = topology.disk_stat(device).filter(|_| topology.keeps_stats(device))?;
        Some(Self { topology, device, last: Some(last) })
    }

    /// The mean latency since the last sample; None if there were too few requests.
    #[must_use]
    pub fn mean(&mut self) -> Option<Duration> {
        let sample = self.sample().filter(|sample| sample.ios >= impact::IOS_MIN)?;
        let nanos = sample.waited.as_nanos().checked_div(u128::from(sample.ios))?;
        u64::try_from(nanos).ok().map(Duration::from_nanos)
    }
}

impl LatencyProbe for OriginProbe {
    fn sample(&mut self) -> Option<LatencySample> {
        let stat = self.topology.disk_stat(self.device)?;
        let interval = stat.since(&self.last.replace(stat)?)?;
        Some(LatencySample {
            ios: interval.reads + interval.writes,
            waited: interval.waited,
            in_flight: interval.in_flight,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn samples_are_what_was_done_since_the_last_one() {
        let dir = tempfile::tempdir().unwrap();
        let device = DeviceNumber { major: 253, minor: 7 };
        let node = dir.path().join("sys/dev/block/253:7");
        fs::create_dir_all(node.join("queue")).unwrap();
        let write = |reads: u64, read_ms: u64, writes: u64, write_ms: u64, in_flight: u64| {
            let text = format!("{reads} 0 8 {read_ms} {writes} 0 8 {write_ms} {in_flight} 0 0");
            fs::write(node.join("stat"), text).unwrap();
        };
        let new = || OriginProbe::at(Topology::at(dir.path()), device);
        assert!(new().is_none(), "no such device");
        write(1000, 4000, 2000, 9000, 1);
        let mut probe = new().unwrap();
        let sample =
            |ios, ms, in_flight| Some(LatencySample { ios, waited: Duration::from_millis(ms), in_flight });
        assert_eq!(probe.sample(), sample(0, 0, 1));
        write(1010, 4020, 2030, 9060, 2);
        assert_eq!(probe.sample(), sample(40, 80, 2));
        write(1050, 4080, 2070, 9060, 0);
        assert_eq!(probe.mean(), Some(Duration::from_micros(750)));
        write(1051, 4081, 2070, 9060, 0);
        assert_eq!(probe.mean(), None, "one I/O is no mean");

        // The counters fell, so this is another device with the same number: its first sample is dropped.
        write(1, 1, 1, 1, 0);
        assert_eq!(probe.sample(), None);
        write(2, 3, 1, 1, 0);
        assert_eq!(probe.sample(), sample(1, 2, 0));
        fs::write(node.join("queue/iostats"), "0\n").unwrap();
        assert!(new().is_none(), "switched off");
    }
}
