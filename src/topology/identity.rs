//! The facts that identify a block device, even if another one has its name and number by now. Facts only; the
//! caller judges whether two devices are the same.
//!
//! Names and numbers are reused. A disk keeps what its maker gave it (world-wide name, serial number); a
//! device that the kernel builds from disks keeps its UUID, its partition or its file. The kernel's sequence
//! number (`diskseq`) distinguishes one appearance of a disk from the next. A maker's id is not always
//! unique: the bridge of a USB dock shows the same serial number for any disk in it.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::Topology;
use crate::base::DeviceNumber;
use crate::base::units::SECTOR_BYTES;
use crate::format::state::DeviceRecord;

/// Longest attribute that is read.
const ATTRIBUTE_BYTES_MAX: u64 = 4096;

/// Where sysfs has a disk's world-wide name: of NVMe, of SCSI.
const WORLD_WIDE_NAMES: [&str; 2] = ["wwid", "device/wwid"];

/// How many parent directories of a disk are searched for its serial number: a USB disk has it at the USB
/// device.
const ANCESTORS_MAX: usize = 12;

impl Topology {
    /// The facts of `device` and of every device below it, ordered by number. The devices below a multipath device
    /// change with its paths, so that it is identified by its own UUID alone.
    #[must_use]
    pub fn identities(&self, device: DeviceNumber) -> Vec<DeviceRecord> {
        let devices = self.stack_to(device, &|at| self.is_named_multipath(at));
        devices.into_iter().map(|device| self.identity(device)).collect()
    }

    /// What the maker of a disk has named it by, for all the world.
    pub(super) fn world_wide_name(&self, disk: DeviceNumber) -> Option<String> {
        first_attribute(&self.node(disk), &WORLD_WIDE_NAMES)
    }

    /// None for a device without one.
    pub(super) fn device_mapper_uuid(&self, device: DeviceNumber) -> Option<String> {
        attribute(&self.node(device).join("dm/uuid"))
    }

    /// The facts of `device` alone.
    #[must_use]
    pub fn identity(&self, device: DeviceNumber) -> DeviceRecord {
        let node = self.node(device);
        let is_partition = node.join("partition").exists();
        let disk = if is_partition { node.join("..") } else { node.clone() };
        let sectors = |name: &str| {
            let count: Option<u64> = attribute(&node.join(name)).and_then(|text| text.parse().ok());
            count.and_then(|count| count.checked_mul(SECTOR_BYTES))
        };
        let (wwid, serial) = maker_ids(&disk);
        DeviceRecord {
            number: device,
            size_bytes: sectors("size").unwrap_or(0),
            sequence: attribute(&disk.join("diskseq")).and_then(|text| text.parse().ok()),
            uuid: if is_partition { None } else { first_attribute(&disk, &["dm/uuid", "md/uuid"]) },
            doubtful: (usb(&disk).is_some() || self.shares_maker_id(&disk, wwid.as_ref(), serial.as_ref()))
                && (wwid.is_some() || serial.is_some()),
            wwid,
            serial,
            backing: self.backing(device),
            partition_start_bytes: if is_partition { sectors("start") } else { None },
            partition_uuid: uevent(&node, "PARTUUID"),
        }
    }

    /// The file below a loop device; None for another device, and if the file's file system does not answer.
    fn backing(&self, device: DeviceNumber) -> Option<String> {
        let shown = self.attached_loop(device)?;
        let status = shown.status()?;
        let filesystem = DeviceNumber::from_dev(status.backing_dev);
        Some(format!("{filesystem} {} {}", status.backing_inode, status.offset.get()))
    }

    /// True if another disk has the same id from its maker.
    fn shares_maker_id(&self, disk: &Path, wwid: Option<&String>, serial: Option<&String>) -> bool {
        if wwid.is_none() && serial.is_none() {
            return false;
        }
        let number = super::number_file(&disk.join("dev"));
        let nodes = self.all_devices().into_iter().filter(|other| Some(*other) != number);
        nodes.map(|other| self.node(other)).filter(|node| !node.join("partition").exists()).any(|other| {
            let (other_wwid, other_serial) = maker_ids(&other);
            match wwid {
                Some(_) => other_wwid.as_ref() == wwid,
                None => other_serial.as_ref() == serial,
            }
        })
    }

    /// The kernel's id of this boot; empty if it is not available.
    #[must_use]
    pub fn boot(&self) -> String {
        attribute(&self.root.join("proc/sys/kernel/random/boot_id")).unwrap_or_default()
    }
}

/// An attribute, without spaces around it and without the binary header of a SCSI page. None if it is empty.
fn attribute(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(ATTRIBUTE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let text: String =
        bytes.iter().map(|byte| char::from(*byte)).filter(|c| c.is_ascii_graphic() || *c == ' ').collect();
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn uevent(node: &Path, key: &str) -> Option<String> {
    let text = fs::read_to_string(node.join("uevent")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned))
}

/// The first of the files `names` that is not empty.
fn first_attribute(disk: &Path, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| attribute(&disk.join(name)))
}

/// The world-wide name and the serial number that the maker gave to a disk.
fn maker_ids(disk: &Path) -> (Option<String>, Option<String>) {
    let serial = first_attribute(disk, &["serial", "device/serial", "device/vpd_pg80"]);
    (first_attribute(disk, &WORLD_WIDE_NAMES), serial.or_else(|| attribute(&usb(disk)?.join("serial"))))
}

/// The USB device that a disk is connected through.
fn usb(disk: &Path) -> Option<PathBuf> {
    let device = fs::canonicalize(disk.join("device")).ok()?;
    device.ancestors().take(ANCESTORS_MAX).find(|path| path.join("idVendor").exists()).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{dev, machine};
    use super::*;

    fn put(topology: &Topology, device: DeviceNumber, name: &str, content: &[u8]) {
        let path = topology.node(device).join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    #[test]
    fn the_attributes_in_sysfs_are_read() {
        let (_keep, topology) = machine();
        put(&topology, dev(8, 0), "size", b"2048\n");
        put(&topology, dev(8, 0), "diskseq", b"7\n");
        put(&topology, dev(8, 0), "device/wwid", b"naa.5000c500a1b2c3d4\n");
        put(&topology, dev(8, 0), "device/vpd_pg80", b"\0\x80\0\x0c    WD-1234 \0");
        put(&topology, dev(8, 1), "size", b"100\n");
        put(&topology, dev(8, 1), "start", b"34\n");
        put(&topology, dev(253, 0), "dm/uuid", b"LVM-abc\n");
        let nothing = DeviceRecord {
            number: dev(8, 16),
            size_bytes: 0,
            sequence: None,
            uuid: None,
            wwid: None,
            serial: None,
            backing: None,
            partition_start_bytes: None,
            partition_uuid: None,
            doubtful: false,
        };
        assert_eq!(topology.identity(dev(8, 16)), nothing);
        let disk = DeviceRecord {
            number: dev(8, 0),
            size_bytes: 2048 * 512,
            sequence: Some(7),
            wwid: Some("naa.5000c500a1b2c3d4".to_owned()),
            serial: Some("WD-1234".to_owned()),
            ..nothing.clone()
        };
        let partition = DeviceRecord {
            number: dev(8, 1),
            size_bytes: 51_200,
            partition_start_bytes: Some(17_408),
            ..disk.clone()
        };
        let volume = DeviceRecord { number: dev(253, 0), uuid: Some("LVM-abc".to_owned()), ..nothing };
        assert_eq!(topology.identities(dev(253, 0)), [disk, partition, volume]);
    }

    #[test]
    fn a_multipath_device_is_identified_whatever_paths_it_has() {
        let (_keep, topology) = machine();
        let numbers = |device| -> Vec<DeviceNumber> {
            topology.identities(device).into_iter().map(|record| record.number).collect()
        };
        put(&topology, dev(253, 0), "dm/uuid", b"LVM-abc\n");
        assert_eq!(numbers(dev(253, 0)), [dev(8, 0), dev(8, 1), dev(253, 0)]);
        put(&topology, dev(253, 0), "dm/uuid", b"mpath-3600a0b80\n");
        assert_eq!(numbers(dev(253, 0)), [dev(253, 0)]);
    }

    #[test]
    fn an_id_shared_by_two_disks_is_doubtful() {
        let (keep, topology) = machine();
        put(&topology, dev(8, 0), "device/vpd_pg80", b"DOCK-1");
        assert!(!topology.identity(dev(8, 0)).doubtful);
        assert!(!topology.identity(dev(8, 1)).doubtful, "its own disk does not count");
        put(&topology, dev(8, 16), "device/vpd_pg80", b"DOCK-1");
        for device in [dev(8, 0), dev(8, 1), dev(8, 16)] {
            assert!(topology.identity(device).doubtful, "{device}");
        }
        put(&topology, dev(8, 16), "device/wwid", b"naa.1");
        assert!(!topology.identity(dev(8, 16)).doubtful);
        // Connected by USB, whatever it shows.
        fs::write(keep.path().join("idVendor"), "1234").unwrap();
        assert!(topology.identity(dev(8, 16)).doubtful);
        assert!(!topology.identity(dev(253, 0)).doubtful, "a device without such an id");
    }
}
