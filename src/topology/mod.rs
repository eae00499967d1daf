//! Finds which block devices exist, how they are stacked, and what uses them. Facts only, no judgement.
//!
//! The one judgement is in [`graph`]: what waits for what. It is pure, and its input comes from [`Observer`].
//! [`driver`] lists the drivers that are known to be a disk's.
//!
//! Facts come from sysfs (`/sys/dev/block/M:m`: slaves, holders, partition), the loop devices ([`loops`]),
//! mounts and swap areas ([`mount`]). [`stats`] reads how busy a device is, from its counters; [`identity`]
//! reads what identifies a device; [`paths`] finds the other paths to its disk; [`users`] finds the processes that
//! have it open, in `/proc/*/fd`. Must not open a device or file that it examines, and never write to one.
//!
//! Nothing here waits for a file system whose server is gone: see [`crate::sys::child_probe`].

mod backing;
mod driver;
mod filesystem;
pub mod graph;
pub mod identity;
mod loops;
mod mount;
mod observe;
mod paths;
mod stacking;
pub mod stats;
mod users;

pub use backing::FilesystemBacking;
pub use loops::{LoopOver, Loops};
pub use mount::{Mount, MountTable, View};
pub use observe::Observer;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::base::{DeviceNumber, Error, Result, ResultExt as _};
use crate::sys::path_stat::Found;

pub use users::User;

/// The block devices of a machine; `root` is "/" except in tests.
#[derive(Clone, Debug)]
pub struct Topology {
    root: PathBuf,
}

impl Default for Topology {
    fn default() -> Self {
        Self { root: PathBuf::from("/") }
    }
}

/// The number of the block device at `path`, or None if it is something else.
///
/// # Errors
/// I/O errors of stat.
pub fn device_number(path: &Path) -> Result<Option<DeviceNumber>> {
    let metadata = fs::metadata(path).io_context(|| format!("examining {}", path.display()))?;
    Ok(metadata.file_type().is_block_device().then(|| DeviceNumber::from_dev(metadata.rdev())))
}

/// Refuses a `path` from the user if its file system does not answer. Other errors are left to the operation
/// that uses the path.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused).
pub fn check_answers(path: &Path) -> Result<()> {
    match Found::refreshed(path) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Err(Error::refused(format!("{} does not answer", path.display()))
                .state("nothing was changed")
                .next("check the server of its filesystem, or choose another path"))
        }
        _ => Ok(()),
    }
}

impl Topology {
    /// The view of another root directory, for tests.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    pub(crate) fn node(&self, device: DeviceNumber) -> PathBuf {
        self.root.join(format!("sys/dev/block/{device}"))
    }

    /// The path of a device by the kernel's name ("/dev/dm-0", "/dev/sda1"), or its number if it has none.
    #[must_use]
    pub fn name(&self, device: DeviceNumber) -> String {
        let named = fs::read_to_string(self.node(device).join("uevent")).ok().and_then(|text| {
            text.lines().find_map(|line| line.strip_prefix("DEVNAME=").map(|name| format!("/dev/{name}")))
        });
        named.unwrap_or_else(|| format!("block device {device}"))
    }

    /// True if the device is read-only.
    #[must_use]
    pub fn is_read_only(&self, device: DeviceNumber) -> bool {
        fs::read_to_string(self.node(device).join("ro")).is_ok_and(|text| text.trim() == "1")
    }

    /// Logical block size in bytes; 512 if sysfs does not have it.
    #[must_use]
    pub fn logical_block_bytes(&self, device: DeviceNumber) -> u64 {
        let node = self.node(device);
        ["queue", "../queue"]
            .iter()
            .find_map(|queue| fs::read_to_string(node.join(queue).join("logical_block_size")).ok())
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(512)
    }

    /// The disk that a partition is on.
    fn disk_of(&self, device: DeviceNumber) -> Option<DeviceNumber> {
        let node = self.node(device);
        node.join("partition").exists().then(|| number_file(&node.join("../dev"))).flatten()
    }

    fn numbers_in(&self, directory: &Path) -> Vec<DeviceNumber> {
        let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
        entries.flatten().filter_map(|entry| number_file(&entry.path().join("dev"))).collect()
    }

    /// Every block device.
    fn all_devices(&self) -> Vec<DeviceNumber> {
        let Ok(entries) = fs::read_dir(self.root.join("sys/dev/block")) else { return Vec::new() };
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// The device's partitions.
    #[must_use]
    pub fn partitions(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let Ok(entries) = fs::read_dir(self.node(device)) else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter(|entry| entry.path().join("partition").exists())
            .filter_map(|entry| number_file(&entry.path().join("dev")))
            .collect()
    }

    /// True if programs may map `device` as memory (DAX), which bypasses the block layer.
    #[must_use]
    pub fn is_dax(&self, device: DeviceNumber) -> bool {
        self.queue_attribute(device, "dax").is_some_and(|text| text == "1")
    }

    /// Largest write to `device` that is atomic (`RWF_ATOMIC`; Linux 6.11, for device-mapper volumes later
    /// kernels); zero if none is.
    #[must_use]
    pub fn atomic_write_bytes(&self, device: DeviceNumber) -> u64 {
        let text = self.queue_attribute(device, "atomic_write_max_bytes");
        text.and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// True if the kernel reports a rotating disk below `device`.
    #[must_use]
    pub fn is_rotational(&self, device: DeviceNumber) -> bool {
        self.queue_attribute(device, "rotational").is_some_and(|text| text == "1")
    }

    /// An attribute of a device's queue; a partition uses the queue of its disk.
    fn queue_attribute(&self, device: DeviceNumber, name: &str) -> Option<String> {
        let node = self.node(device);
        let read = |queue| fs::read_to_string(node.join(queue).join(name)).ok();
        ["queue", "../queue"].into_iter().find_map(read).map(|text| text.trim().to_owned())
    }

    /// The devices that hold `device` directly: device-mapper, md, and the like.
    #[must_use]
    pub fn holders(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        self.numbers_in(&self.node(device).join("holders"))
    }
}

fn number_file(path: &Path) -> Option<DeviceNumber> {
    fs::read_to_string(path).ok()?.parse().ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use super::*;

    pub fn dev(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    /// A fake machine: disk 8:0 with partitions 8:1 and 8:2, dm 253:0 on 8:1, disk 8:16 unused.
    pub fn machine() -> (tempfile::TempDir, Topology) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let devices = root.join("sys/devices");
        for (path, number) in
            [("sda", "8:0"), ("sda/sda1", "8:1"), ("sda/sda2", "8:2"), ("sdb", "8:16"), ("dm-0", "253:0")]
        {
            let node = devices.join(path);
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("dev"), number).unwrap();
            let name = Path::new(path).file_name().unwrap().to_str().unwrap();
            fs::write(node.join("uevent"), format!("MAJOR=1\nDEVNAME={name}\n")).unwrap();
            if path.contains('/') {
                fs::write(node.join("partition"), "1").unwrap();
            }
            fs::create_dir_all(root.join("sys/dev/block")).unwrap();
            std::os::unix::fs::symlink(&node, root.join("sys/dev/block").join(number)).unwrap();
        }
        let (holder, slave) = (devices.join("dm-0"), devices.join("sda/sda1"));
        fs::create_dir_all(holder.join("slaves")).unwrap();
        fs::create_dir_all(slave.join("holders")).unwrap();
        std::os::unix::fs::symlink(&slave, holder.join("slaves/sda1")).unwrap();
        std::os::unix::fs::symlink(&holder, slave.join("holders/dm-0")).unwrap();
        fs::create_dir_all(root.join("proc/self")).unwrap();
        let drivers = "Character devices:\n 10 misc\n\nBlock devices:\n  7 loop\n  8 sd\n253 device-mapper\n259 blkext\n";
        fs::write(root.join("proc/devices"), drivers).unwrap();
        fs::write(
            root.join("proc/self/mountinfo"),
            "36 35 8:2 / /mnt/my\\040disk rw,noatime master:1 - ext4 /dev/nowhere rw\n",
        )
        .unwrap();
        let topology = Topology::at(root);
        (directory, topology)
    }

    #[test]
    fn stacks_are_walked_down_to_the_disk() {
        let (_keep, topology) = machine();
        assert_eq!(topology.stack(dev(253, 0)), BTreeSet::from([dev(253, 0), dev(8, 1), dev(8, 0)]));
        assert_eq!(topology.name(dev(8, 1)), "/dev/sda1");
    }

    #[test]
    fn devices_above_are_found() {
        let (_keep, topology) = machine();
        assert_eq!(topology.above(dev(8, 0)), BTreeSet::from([dev(8, 0), dev(8, 1), dev(8, 2), dev(253, 0)]));
        assert_eq!(topology.mounts().unwrap()[0].kind, "ext4");
    }

    #[test]
    fn rotational_disks_are_recognized() {
        let (keep, topology) = machine();
        let queue = keep.path().join("sys/devices/sda/queue");
        assert!(!topology.is_rotational(dev(8, 0)), "false without the attribute");
        fs::create_dir(&queue).unwrap();
        for (text, rotational) in [("0\n", false), ("1\n", true)] {
            fs::write(queue.join("rotational"), text).unwrap();
            assert_eq!(topology.is_rotational(dev(8, 0)), rotational);
        }
    }

    #[test]
    fn rotating_disks_are_found_beneath_devices() {
        let (keep, topology) = machine();
        let queue = keep.path().join("sys/devices/sda/queue");
        fs::create_dir(&queue).unwrap();
        fs::write(queue.join("rotational"), "1").unwrap();
        for device in [dev(253, 0), dev(8, 1), dev(8, 2), dev(8, 0)] {
            assert_eq!(topology.rotating_disks(device), BTreeSet::from([dev(8, 0)]), "{device}");
        }
        assert_eq!(topology.rotating_disks(dev(8, 16)), BTreeSet::new());
        fs::write(queue.join("rotational"), "0").unwrap();
        assert_eq!(topology.rotating_disks(dev(253, 0)), BTreeSet::new());
    }

    #[test]
    fn atomic_write_limits_are_read() {
        let (keep, topology) = machine();
        let queue = keep.path().join("sys/devices/sda/queue");
        assert_eq!(topology.atomic_write_bytes(dev(8, 0)), 0, "zero without the attribute");
        fs::create_dir(&queue).unwrap();
        fs::write(queue.join("atomic_write_max_bytes"), "16384\n").unwrap();
        assert_eq!(topology.atomic_write_bytes(dev(8, 1)), 16_384, "a partition has its disk's limit");
    }

    #[test]
    fn dax_is_recognized() {
        let (keep, topology) = machine();
        let queue = keep.path().join("sys/devices/sda/queue");
        assert!(!topology.is_dax(dev(8, 0)), "false without the attribute");
        fs::create_dir(&queue).unwrap();
        for (text, dax) in [("0\n", false), ("1\n", true)] {
            fs::write(queue.join("dax"), text).unwrap();
            assert_eq!(topology.is_dax(dev(8, 0)), dax);
        }
    }
}
