//! Finds the devices that lead to the same disk. A disk of a storage network has one device for each path to it,
//! and a write through one of them changes all.
//!
//! Device-mapper's multipath target holds the paths that it uses, and native NVMe multipath hides them. If
//! neither is set up, only the disk's world-wide name shows that two devices are one disk. Only names that are
//! unique count: NAA, EUI-64, UUID, and the name that the kernel derives from an NVMe controller's serial
//! number. The others (`t10.`) are made of the maker's texts, which two disks may share, as those connected
//! through USB bridges do: they would make a free disk unusable as a target.

use super::Topology;
use crate::base::DeviceNumber;

/// The prefixes of world-wide names that are unique.
const UNIQUE: [&str; 4] = ["naa.", "eui.", "uuid.", "nvme."];

/// The prefix of the UUID that multipathd gives to a multipath device; the disk's world-wide name follows
/// (multipath-tools, `libmultipath/devmapper.c`).
const MULTIPATH_UUID: &str = "mpath-";

impl Topology {
    /// The other devices that lead to the bytes of `device`, which is a disk or a partition.
    #[must_use]
    pub fn other_paths(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        self.other_paths_of(&[device])
    }

    /// As [`Topology::other_paths`], of several devices: partitions of one disk, or the disk itself. Reads the names of
    /// all disks once.
    #[must_use]
    pub fn other_paths_of(&self, devices: &[DeviceNumber]) -> Vec<DeviceNumber> {
        let Some(first) = devices.first() else { return Vec::new() };
        let disk = self.disk_of(*first).unwrap_or(*first);
        let Some(name) = self.unique_name(disk) else { return Vec::new() };
        let is_path = |other: &DeviceNumber| {
            *other != disk
                && self.disk_of(*other).is_none()
                && self.unique_name(*other).as_ref() == Some(&name)
        };
        let disks: Vec<DeviceNumber> = self.all_devices().into_iter().filter(is_path).collect();
        let place = |part: DeviceNumber| {
            let identity = self.identity(part);
            (identity.partition_start_bytes, identity.size_bytes)
        };
        let others = |device: &DeviceNumber| -> Vec<DeviceNumber> {
            if *device == disk {
                return disks.clone();
            }
            let own = place(*device);
            disks.iter().flat_map(|disk| self.partitions(*disk)).filter(|part| place(*part) == own).collect()
        };
        devices.iter().flat_map(others).collect()
    }

    fn unique_name(&self, disk: DeviceNumber) -> Option<String> {
        let name = self.world_wide_name(disk)?;
        UNIQUE.iter().any(|kind| name.starts_with(kind)).then_some(name)
    }

    /// True for a multipath device whose UUID is its disk's world-wide name: the disk is the same whatever
    /// paths the device has.
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
        assert_eq!(topology.other_paths(dev(253, 0)), [], "a device without a name");
        // The maker's texts need not be unique.
        for device in [one, other] {
            name(&topology, device, "t10.DOCK    0001\n");
        }
        assert_eq!(topology.other_paths(one), []);
    }

    #[test]
    fn a_partition_has_the_same_place_on_every_path() {
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
