//! Which devices lead to the same disk? A disk of a storage network has a device for each path to it, and what is written
//! through one of them is on all.
//!
//! Multipath (device-mapper's) holds the paths that it uses, and native NVMe multipath hides them. Where neither runs, the
//! disk's world-wide name alone tells. Only names that are given once are taken: NAA, EUI-64 and UUIDs, and the one that
//! the kernel makes of an NVMe controller's serial number. Others are made of texts of the maker's (`t10.`), which two disks
//! can share, as those behind USB bridges do: they would keep a free disk from being written to.

use super::Topology;
use crate::base::DeviceNumber;

/// How names begin that are given once.
const UNIQUE: [&str; 4] = ["naa.", "eui.", "uuid.", "nvme."];

/// How the UUID of a multipath device begins, which is made of its disk's world-wide name (multipath-tools,
/// `libmultipath/devmapper.c`).
const MULTIPATH_UUID: &str = "mpath-";

impl Topology {
    /// The other devices that lead to the bytes of `device`, a disk or a partition.
    #[must_use]
    pub fn other_paths(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let whole = self.disk_of(device);
        let disk = whole.unwrap_or(device);
        let Some(name) = self.unique_name(disk) else { return Vec::new() };
        let is_path = |other: &DeviceNumber| {
            *other != disk
                && self.disk_of(*other).is_none()
                && self.unique_name(*other).as_ref() == Some(&name)
        };
        let disks = self.all_devices().into_iter().filter(is_path);
        if whole.is_none() {
            return disks.collect();
        }
        let place = |part: DeviceNumber| {
            let identity = self.identity(part);
            (identity.partition_start_bytes, identity.size_bytes)
        };
        let own = place(device);
        disks.flat_map(|disk| self.partitions(disk)).filter(|part| place(*part) == own).collect()
    }

    fn unique_name(&self, disk: DeviceNumber) -> Option<String> {
        let name = self.world_wide_name(disk)?;
        UNIQUE.iter().any(|kind| name.starts_with(kind)).then_some(name)
    }

    /// A multipath device that is named by its disk's world-wide name: whichever paths it has, the disk is the same.
    pub(super) fn is_named_multipath(&self, device: DeviceNumber) -> bool {
        self.device_mapper_uuid(device).is_some_and(|uuid| uuid.starts_with(MULTIPATH_UUID))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::{dev, machine};
    use super::*;

    fn name(topology: &Topology, device: DeviceNumber, name: &str) {
        let path = topology.node(device).join("device/wwid");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }

    #[test]
    fn a_disk_with_two_paths_has_two_devices() {
        let (_keep, topology) = machine();
        let (one, other) = (dev(8, 0), dev(8, 16));
        name(&topology, one, "naa.600a0b80\n");
        assert_eq!(topology.other_paths(one), []);
        name(&topology, other, "naa.600a0b81\n");
        assert_eq!(topology.other_paths(one), [], "another disk");
        name(&topology, other, "naa.600a0b80\n");
        assert_eq!(topology.other_paths(one), [other]);
        assert_eq!(topology.other_paths(other), [one]);
        assert_eq!(topology.other_paths(dev(253, 0)), [], "what has no name");
        // A text of the maker's may be that of many disks.
        for device in [one, other] {
            name(&topology, device, "t10.DOCK    0001\n");
        }
        assert_eq!(topology.other_paths(one), []);
    }

    #[test]
    fn a_partition_is_the_same_place_by_the_other_path() {
        let (keep, topology) = machine();
        for device in [dev(8, 0), dev(8, 16)] {
            name(&topology, device, "eui.0025385b71b0\n");
        }
        let part = |number: DeviceNumber, start: &str| {
            fs::write(topology.node(number).join("start"), start).unwrap();
            fs::write(topology.node(number).join("size"), "100\n").unwrap();
        };
        part(dev(8, 1), "34\n");
        part(dev(8, 2), "134\n");
        for (path, number) in [("sdb/sdb1", "8:17"), ("sdb/sdb2", "8:18")] {
            let node = keep.path().join("sys/devices").join(path);
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("dev"), number).unwrap();
            fs::write(node.join("partition"), "1").unwrap();
            std::os::unix::fs::symlink(&node, keep.path().join("sys/dev/block").join(number)).unwrap();
        }
        part(dev(8, 17), "34\n");
        part(dev(8, 18), "134\n");
        assert_eq!(topology.other_paths(dev(8, 1)), [dev(8, 17)]);
        assert_eq!(topology.other_paths(dev(8, 18)), [dev(8, 2)]);
        assert_eq!(topology.other_paths(dev(8, 0)), [dev(8, 16)]);
    }
}
