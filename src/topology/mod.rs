//! Which block devices are there, on top of what, and who uses them? Facts only, no judgement.
//!
//! Who waits for whom is the one judgement, in [`graph`], which is pure and fed by [`Observer`]; which drivers are known to
//! be a disk's is in [`driver`].
//!
//! Facts come from sysfs (`/sys/dev/block/M:m`: slaves, holders, partition, loop/backing_file),
//! `/proc/self/mountinfo` and `/proc/swaps`; how busy a device is, from its counters ([`stats`]); by what it is known
//! again ([`identity`]); who has it open, from `/proc/*/fd` and the kernel's loop devices ([`users`]). Must not open,
//! let alone write, what it looks at.

mod driver;
mod filesystem;
pub mod graph;
pub mod identity;
mod observe;
pub mod stats;
mod users;

use filesystem::LiesOn;
pub use observe::Observer;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::base::{Bytes, DeviceNumber, Error, Result, ResultExt as _};

pub use users::User;

/// Devices visited at most when a stack is walked: far above any real one, so that a loop in what
/// sysfs says ends.
const STACK_DEVICES_MAX: usize = 4096;

/// Devices on top of each other at most.
const STACK_HEIGHT_MAX: usize = 64;

/// What a filesystem lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ground {
    /// These block devices.
    Devices(Vec<DeviceNumber>),
    /// Memory, or another machine.
    Elsewhere,
    /// A filesystem of this kind that does not say (overlay, zfs, fuse).
    Unknown(String),
}

/// A view of the block devices; `root` is "/" except in tests.
#[derive(Clone, Debug)]
pub struct Topology {
    root: PathBuf,
}

impl Default for Topology {
    fn default() -> Self {
        Self { root: PathBuf::from("/") }
    }
}

/// The number of the block device at `path`, or None where it is something else.
///
/// # Errors
/// I/O errors of stat.
pub fn device_number(path: &Path) -> Result<Option<DeviceNumber>> {
    let metadata = fs::metadata(path).io_context(|| format!("look at {}", path.display()))?;
    Ok(metadata.file_type().is_block_device().then(|| DeviceNumber::from_dev(metadata.rdev())))
}

impl Topology {
    /// A view rooted elsewhere, for tests.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    pub(crate) fn node(&self, device: DeviceNumber) -> PathBuf {
        self.root.join(format!("sys/dev/block/{device}"))
    }

    /// The kernel's name of a device ("dm-0", "sda1"), or its number where it has none.
    #[must_use]
    pub fn name(&self, device: DeviceNumber) -> String {
        let named = fs::read_to_string(self.node(device).join("uevent")).ok().and_then(|text| {
            text.lines().find_map(|line| line.strip_prefix("DEVNAME=").map(|name| format!("/dev/{name}")))
        });
        named.unwrap_or_else(|| format!("block device {device}"))
    }

    /// True where the device is read-only.
    #[must_use]
    pub fn is_read_only(&self, device: DeviceNumber) -> bool {
        fs::read_to_string(self.node(device).join("ro")).is_ok_and(|text| text.trim() == "1")
    }

    /// Logical block size in bytes (512 where sysfs does not say).
    #[must_use]
    pub fn logical_block_bytes(&self, device: DeviceNumber) -> u64 {
        let node = self.node(device);
        ["queue", "../queue"]
            .iter()
            .find_map(|queue| fs::read_to_string(node.join(queue).join("logical_block_size")).ok())
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(512)
    }

    /// Every device beneath `device`, itself included: slaves, the disk of a partition, the device
    /// under the file of a loop device.
    #[must_use]
    pub fn stack(&self, device: DeviceNumber) -> BTreeSet<DeviceNumber> {
        let mut seen = BTreeSet::new();
        let mut open = vec![device];
        while let Some(at) = open.pop() {
            if seen.len() < STACK_DEVICES_MAX && seen.insert(at) {
                open.extend(self.directly_beneath(at));
            }
        }
        seen
    }

    fn directly_beneath(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let node = self.node(device);
        let mut beneath = self.numbers_in(&node.join("slaves"));
        if node.join("partition").exists()
            && let Some(disk) = number_file(&node.join("../dev"))
        {
            beneath.push(disk);
        }
        if let Ok(text) = fs::read_to_string(node.join("loop/backing_file")) {
            let path = text.trim_end_matches('\n');
            match fs::metadata(path) {
                Ok(file) if file.file_type().is_block_device() => {
                    beneath.push(DeviceNumber::from_dev(file.rdev()))
                }
                Ok(file) => {
                    if let Ground::Devices(devices) =
                        self.ground(DeviceNumber::from_dev(file.dev()), Path::new(path))
                    {
                        beneath.extend(devices);
                    }
                }
                Err(_) => {}
            }
        }
        beneath
    }

    fn numbers_in(&self, directory: &Path) -> Vec<DeviceNumber> {
        let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
        entries.flatten().filter_map(|entry| number_file(&entry.path().join("dev"))).collect()
    }

    /// Every block device there is.
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

    /// What the filesystem of `path`, whose `st_dev` is `st_dev`, lies on. Some (btrfs) show an
    /// anonymous number there; their mount's source names a device, and sysfs the others.
    #[must_use]
    pub fn ground(&self, st_dev: DeviceNumber, path: &Path) -> Ground {
        if self.node(st_dev).exists() {
            return Ground::Devices(vec![st_dev]);
        }
        let mut best: Option<Mount> = None;
        for mount in self.mounts().unwrap_or_default() {
            let deeper = best
                .as_ref()
                .is_none_or(|best| mount.point.components().count() >= best.point.components().count());
            if path.starts_with(&mount.point) && deeper {
                best = Some(mount);
            }
        }
        let Some(mount) = best else { return Ground::Unknown("unknown".to_owned()) };
        match device_number(&mount.source).ok().flatten() {
            Some(device) => {
                let mut devices = self.btrfs_beside(device);
                devices.push(device);
                Ground::Devices(devices)
            }
            None => match LiesOn::of(&mount.kind) {
                LiesOn::Memory | LiesOn::OtherMachines => Ground::Elsewhere,
                _ => Ground::Unknown(mount.kind),
            },
        }
    }

    /// The other devices of the mounted btrfs that `device` is a part of, itself included; none where
    /// it is no part of one.
    #[must_use]
    pub fn btrfs_beside(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let Ok(filesystems) = fs::read_dir(self.root.join("sys/fs/btrfs")) else { return Vec::new() };
        filesystems
            .flatten()
            .map(|entry| self.numbers_in(&entry.path().join("devices")))
            .find(|devices| devices.contains(&device))
            .unwrap_or_default()
    }

    /// True where programs may map `device` as memory (DAX), past the block layer.
    #[must_use]
    pub fn is_dax(&self, device: DeviceNumber) -> bool {
        self.queue_attribute(device, "dax").is_some_and(|text| text == "1")
    }

    /// True where the kernel says that a disk beneath `device` has heads to move.
    #[must_use]
    pub fn is_rotational(&self, device: DeviceNumber) -> bool {
        self.queue_attribute(device, "rotational").is_some_and(|text| text == "1")
    }

    /// What the kernel says of a device's queue; a partition has its disk's.
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

    /// The loop devices that show `device`, each with where it begins and, if it ends before the device
    /// does, its length. They are not among its holders. One that was set up through a node which is no
    /// longer there, or which another mount namespace has, is not found.
    #[must_use]
    pub fn loops_over(&self, device: DeviceNumber) -> Vec<(DeviceNumber, Bytes, Option<Bytes>)> {
        let Ok(entries) = fs::read_dir(self.root.join("sys/block")) else { return Vec::new() };
        let found = entries.flatten().filter_map(|entry| {
            let node = entry.path();
            let file = fs::read_to_string(node.join("loop/backing_file")).ok()?;
            let is_it =
                device_number(Path::new(file.trim_end_matches('\n'))).is_ok_and(|it| it == Some(device));
            let number = |name: &str| {
                let text = fs::read_to_string(node.join("loop").join(name)).ok()?;
                text.trim().parse().ok().map(Bytes)
            };
            let length = number("sizelimit").filter(|length| *length != Bytes::ZERO);
            is_it.then_some((number_file(&node.join("dev"))?, number("offset").unwrap_or_default(), length))
        });
        found.collect()
    }

    /// The loop devices over files of the filesystem whose `st_dev` is `device`.
    #[must_use]
    pub fn loops_in(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let Ok(entries) = fs::read_dir(self.root.join("sys/block")) else { return Vec::new() };
        let found = entries.flatten().filter_map(|entry| {
            let node = entry.path();
            let file = fs::read_to_string(node.join("loop/backing_file")).ok()?;
            let meta = fs::metadata(file.trim_end_matches('\n')).ok()?;
            let is_in = meta.is_file() && DeviceNumber::from_dev(meta.dev()) == device;
            if is_in { number_file(&node.join("dev")) } else { None }
        });
        found.collect()
    }

    /// Every device above `device`, itself included: its partitions, whoever holds them, loop devices over it or over
    /// files of a filesystem on it, and so on; each with how many are between, by the longest way.
    #[must_use]
    pub fn heights_above(&self, device: DeviceNumber) -> BTreeMap<DeviceNumber, usize> {
        let mut heights = BTreeMap::new();
        let mut open = vec![(device, 0)];
        while let Some((at, height)) = open.pop() {
            let is_known = heights.get(&at).is_some_and(|known| *known >= height);
            if is_known || height > STACK_HEIGHT_MAX || heights.len() >= STACK_DEVICES_MAX {
                continue;
            }
            heights.insert(at, height);
            let loops = self.loops_over(at).into_iter().map(|(over, ..)| over);
            let next = self.holders(at).into_iter().chain(self.partitions(at)).chain(loops);
            open.extend(next.chain(self.loops_in(at)).map(|above| (above, height + 1)));
        }
        heights
    }

    /// Every device above `device`, itself included. As [`Topology::heights_above`].
    #[must_use]
    pub fn above(&self, device: DeviceNumber) -> BTreeSet<DeviceNumber> {
        self.heights_above(device).into_keys().collect()
    }

    /// The mounts of our mount namespace, in the order in which they were made.
    ///
    /// # Errors
    /// I/O errors of reading mountinfo.
    pub fn mounts(&self) -> Result<Vec<Mount>> {
        Self::mounts_of(&self.root.join("proc/self"))
    }

    /// The mounts that a process sees, which has `node` in /proc.
    ///
    /// # Errors
    /// I/O errors of reading mountinfo.
    pub fn mounts_of(node: &Path) -> Result<Vec<Mount>> {
        let file = node.join("mountinfo");
        let bytes = fs::read(&file).io_context(|| format!("read {}", file.display()))?;
        Ok(escaped_text(&bytes).lines().filter_map(Mount::parse).collect())
    }

    /// True where `mount` is of a filesystem on `device`.
    #[must_use]
    pub fn is_mount_of(mount: &Mount, device: DeviceNumber) -> bool {
        mount.device == device
            || (mount.source.is_absolute() && device_number(&mount.source).is_ok_and(|it| it == Some(device)))
    }

    /// Swap areas: files and devices, as the kernel names them.
    ///
    /// # Errors
    /// I/O errors of reading /proc/swaps.
    pub fn swaps(&self) -> Result<Vec<PathBuf>> {
        let file = self.root.join("proc/swaps");
        match fs::read(&file) {
            Ok(bytes) => {
                let text = escaped_text(&bytes);
                let first = |line: &str| unescape(line.split_whitespace().next().unwrap_or_default());
                Ok(text.lines().skip(1).map(first).collect())
            }
            // A kernel without swap has no such file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::io(format!("read {}", file.display()), error)),
        }
    }
}

fn number_file(path: &Path) -> Option<DeviceNumber> {
    fs::read_to_string(path).ok()?.parse().ok()
}

/// One line of mountinfo, as far as needed (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount's own number, as in fdinfo.
    pub id: u64,
    /// `st_dev` of its files.
    pub device: DeviceNumber,
    /// Where in the filesystem it begins: "/" unless it is a bind mount of a part.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// "ext4".
    pub kind: String,
    /// What was mounted: a device's path for most.
    pub source: PathBuf,
    /// The superblock's options, as they stand there, escapes and all.
    pub options: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(' ');
        let id = fields.next()?.parse().ok()?;
        let device = fields.nth(1)?.parse().ok()?;
        let root = unescape(fields.next()?);
        let point = unescape(fields.next()?);
        let mut behind = line.split_once(" - ")?.1.split(' ');
        let kind = behind.next()?.to_owned();
        let source = unescape(behind.next()?);
        let options = behind.next().unwrap_or_default().to_owned();
        Some(Self { id, device, root, point, kind, source, options })
    }
}

/// What the kernel says of paths, which are bytes: one that is no UTF-8 becomes an octal escape as the kernel has others,
/// which [`unescape`] undoes.
fn escaped_text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|byte| format!("\\{byte:03o}")));
    }
    text
}

/// Undoes the octal escapes (`\040`) of mountinfo and swaps.
fn unescape(field: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn dev(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    /// A made-up machine: disk 8:0 with partitions 8:1 and 8:2, dm 253:0 on 8:1, disk 8:16 alone.
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
    fn what_is_above_is_found() {
        let (_keep, topology) = machine();
        assert_eq!(topology.above(dev(8, 0)), BTreeSet::from([dev(8, 0), dev(8, 1), dev(8, 2), dev(253, 0)]));
        assert_eq!(topology.mounts().unwrap()[0].kind, "ext4");
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape("/a\\040b\\134"), Path::new("/a b\\"));
        assert_eq!(unescape("/a\\9"), Path::new("/a\\9"));
    }

    #[test]
    fn a_mount_point_is_bytes() {
        use std::os::unix::ffi::OsStrExt as _;
        let (keep, topology) = machine();
        let file = keep.path().join("proc/self/mountinfo");
        let mut lines = fs::read(&file).unwrap();
        lines.extend(b"40 35 8:16 / /mnt/\xff\\040b rw - ext4 /dev/\xfe rw\n");
        fs::write(&file, lines).unwrap();
        let mounts = topology.mounts().unwrap();
        assert_eq!(mounts[0].point, Path::new("/mnt/my disk"));
        assert_eq!(mounts[1].point.as_os_str().as_bytes(), b"/mnt/\xff b");
        assert_eq!(mounts[1].source.as_os_str().as_bytes(), b"/dev/\xfe");
        fs::write(keep.path().join("proc/swaps"), b"Filename Type\n/swap\xff file 1\n").unwrap();
        assert_eq!(topology.swaps().unwrap()[0].as_os_str().as_bytes(), b"/swap\xff");
    }

    #[test]
    fn heads_that_move_are_told() {
        let (keep, topology) = machine();
        let queue = keep.path().join("sys/devices/sda/queue");
        assert!(!topology.is_rotational(dev(8, 0)), "a kernel that does not say has none");
        fs::create_dir(&queue).unwrap();
        for (text, rotational) in [("0\n", false), ("1\n", true)] {
            fs::write(queue.join("rotational"), text).unwrap();
            assert_eq!(topology.is_rotational(dev(8, 0)), rotational);
        }
    }

    #[test]
    fn memory_that_is_mapped_past_the_block_layer_is_told() {
        let (keep, topology) = machine();
        let queue = keep.path().join("sys/devices/sda/queue");
        assert!(!topology.is_dax(dev(8, 0)), "a kernel that does not say has none");
        fs::create_dir(&queue).unwrap();
        for (text, dax) in [("0\n", false), ("1\n", true)] {
            fs::write(queue.join("dax"), text).unwrap();
            assert_eq!(topology.is_dax(dev(8, 0)), dax);
        }
    }
}
