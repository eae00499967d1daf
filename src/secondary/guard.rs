//! May these bytes be written there? The refusals that keep a copy from changing its own origin, its
//! store, or something else that is in use.
//!
//! Facts come from sysfs (`/sys/dev/block/M:m`: slaves, holders, partition, loop/backing_file),
//! `/proc/self/mountinfo` and `/proc/swaps`. The exclusive open is the last word on "in use"; the
//! checks here come first because they can say by whom.
//!
//! Must not open, let alone write, what it judges.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::base::{DeviceNumber, Error, ErrorKind, Result, ResultExt as _};

/// Devices visited at most when a stack is walked: far above any real one, so that a loop in what
/// sysfs says ends.
const STACK_DEVICES_MAX: usize = 4096;

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

    fn node(&self, device: DeviceNumber) -> PathBuf {
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
                Ok(file) => beneath
                    .extend(self.filesystem_device(DeviceNumber::from_dev(file.dev()), Path::new(path))),
                Err(_) => {}
            }
        }
        beneath
    }

    fn numbers_in(&self, directory: &Path) -> Vec<DeviceNumber> {
        let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
        entries.flatten().filter_map(|entry| number_file(&entry.path().join("dev"))).collect()
    }

    /// The device's partitions.
    fn partitions(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let Ok(entries) = fs::read_dir(self.node(device)) else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| entry.path().join("partition").exists())
            .filter_map(|entry| number_file(&entry.path().join("dev")))
            .collect()
    }

    /// The block device beneath the filesystem of `path`, whose `st_dev` is `st_dev`. Filesystems
    /// such as btrfs show an anonymous number there; their mount's source names the device.
    #[must_use]
    pub fn filesystem_device(&self, st_dev: DeviceNumber, path: &Path) -> Option<DeviceNumber> {
        if self.node(st_dev).exists() {
            return Some(st_dev);
        }
        let text = fs::read_to_string(self.root.join("proc/self/mountinfo")).ok()?;
        let mut best: Option<Mount> = None;
        for mount in text.lines().filter_map(Mount::parse) {
            let deeper = best
                .as_ref()
                .is_none_or(|best| mount.point.components().count() >= best.point.components().count());
            if path.starts_with(&mount.point) && deeper {
                best = Some(mount);
            }
        }
        device_number(&best?.source).ok().flatten()
    }

    /// Refuses a device that is mounted, swapped to, held by another device, read-only, or part of
    /// the stack of one of the `forbidden` ones.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) with the reason and what to do.
    pub fn check_device(&self, device: DeviceNumber, path: &Path, forbidden: &[DeviceNumber]) -> Result<()> {
        let shown = path.display();
        let mut parts = self.partitions(device);
        parts.push(device);
        self.check_not_beneath(&parts, path, forbidden)?;
        self.check_not_above(&self.stack(device), &format!("{shown}"), forbidden)?;
        if self.is_read_only(device) {
            return Err(Error::refused(format!("{shown} is read-only"))
                .state("it was not touched")
                .next("make it writable (blockdev --setrw) or choose another secondary"));
        }
        self.check_not_mounted(&parts, path)?;
        self.check_not_swap(&parts, path)?;
        for &part in &parts {
            if let Some(holder) = self.numbers_in(&self.node(part).join("holders")).first() {
                return Err(Error::refused(format!(
                    "{shown} is in use: {} holds {}",
                    self.name(*holder),
                    self.name(part)
                ))
                .state("it was not touched")
                .next("take it out of use first (lsblk shows by what), or choose another secondary"));
            }
        }
        Ok(())
    }

    /// Refuses a file whose filesystem lies on one of the `forbidden` devices; `directory` is where
    /// the file will be.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused), or stat's I/O error.
    pub fn check_file(&self, directory: &Path, forbidden: &[DeviceNumber]) -> Result<()> {
        let metadata = fs::metadata(directory).map_err(|error| {
            let missing = error.kind() == io::ErrorKind::NotFound;
            let error = Error::io(format!("look at the directory {}", directory.display()), error);
            if missing {
                error.with_kind(ErrorKind::Refused).next("create the directory first")
            } else {
                error
            }
        })?;
        let Some(device) = self.filesystem_device(DeviceNumber::from_dev(metadata.dev()), directory) else {
            return Ok(());
        };
        self.check_filesystem(device, &format!("the filesystem of {}", directory.display()), forbidden)
    }

    /// Refuses what lies on the filesystem of `device`, named `what`, if that belongs to a
    /// `forbidden` one.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused).
    pub fn check_filesystem(
        &self,
        device: DeviceNumber,
        what: &str,
        forbidden: &[DeviceNumber],
    ) -> Result<()> {
        self.check_not_above(&self.stack(device), what, forbidden)
    }

    /// `forbidden` has something in `stack`: writing would change the origin or its store.
    fn check_not_above(
        &self,
        stack: &BTreeSet<DeviceNumber>,
        what: &str,
        forbidden: &[DeviceNumber],
    ) -> Result<()> {
        match forbidden.iter().find(|device| stack.contains(device)) {
            None => Ok(()),
            Some(device) => Err(Error::refused(format!(
                "{what} lies on {}, which belongs to the origin or its store: writing the copy there \
                 would change what is being copied",
                self.name(*device)
            ))
            .state("nothing was written")
            .next("choose a secondary on another disk or filesystem, or - to send the copy elsewhere")),
        }
    }

    /// One of `devices` lies beneath a forbidden one.
    fn check_not_beneath(
        &self,
        devices: &[DeviceNumber],
        path: &Path,
        forbidden: &[DeviceNumber],
    ) -> Result<()> {
        for &upper in forbidden {
            let beneath = self.stack(upper);
            if let Some(device) = devices.iter().find(|device| beneath.contains(device)) {
                return Err(Error::refused(format!(
                    "{} holds a part of the origin's stack ({} lies beneath {})",
                    path.display(),
                    self.name(*device),
                    self.name(upper)
                ))
                .state("nothing was written")
                .next("choose a secondary that shares no device with the origin"));
            }
        }
        Ok(())
    }

    fn check_not_mounted(&self, devices: &[DeviceNumber], path: &Path) -> Result<()> {
        let file = self.root.join("proc/self/mountinfo");
        let text = fs::read_to_string(&file).io_context(|| format!("read {}", file.display()))?;
        let mounts: Vec<Mount> = text.lines().filter_map(Mount::parse).collect();
        let found = mounts.iter().find(|mount| {
            devices.contains(&mount.device)
                || (mount.source.is_absolute()
                    && device_number(&mount.source)
                        .is_ok_and(|source| source.is_some_and(|source| devices.contains(&source))))
        });
        match found {
            None => Ok(()),
            Some(mount) => {
                Err(Error::refused(format!("{} is mounted (at {})", path.display(), mount.point.display()))
                    .state("it was not touched")
                    .next(format!("umount {} first, or choose another secondary", mount.point.display())))
            }
        }
    }

    fn check_not_swap(&self, devices: &[DeviceNumber], path: &Path) -> Result<()> {
        let file = self.root.join("proc/swaps");
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            // A kernel without swap has no such file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io(format!("read {}", file.display()), error)),
        };
        for line in text.lines().skip(1) {
            let swap = unescape(line.split_whitespace().next().unwrap_or_default());
            if let Ok(Some(device)) = device_number(&swap)
                && devices.contains(&device)
            {
                return Err(Error::refused(format!("{} is swap space", path.display()))
                    .state("it was not touched")
                    .next(format!("swapoff {} first, or choose another secondary", swap.display())));
            }
        }
        Ok(())
    }
}

fn number_file(path: &Path) -> Option<DeviceNumber> {
    fs::read_to_string(path).ok()?.parse().ok()
}

/// One line of mountinfo, as far as needed (proc_pid_mountinfo(5)).
struct Mount {
    device: DeviceNumber,
    point: PathBuf,
    source: PathBuf,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?.parse().ok()?;
        let point = unescape(fields.nth(1)?);
        let source = unescape(line.split_once(" - ")?.1.split(' ').nth(1)?);
        Some(Self { device, point, source })
    }
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
mod tests {
    use super::*;

    fn dev(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    /// A made-up machine: disk 8:0 with partitions 8:1 and 8:2, dm 253:0 on 8:1, disk 8:16 alone.
    fn machine() -> (tempfile::TempDir, Topology) {
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
    fn refusals() {
        let (_keep, topology) = machine();
        let refused = |device, forbidden: &[DeviceNumber]| {
            let error = topology.check_device(device, Path::new("/dev/x"), forbidden).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.next_step().is_some());
            error.to_string()
        };
        assert!(refused(dev(8, 2), &[]).contains("mounted (at /mnt/my disk)"));
        assert!(refused(dev(8, 0), &[]).contains("mounted"), "a disk with a mounted partition");
        assert!(refused(dev(8, 1), &[]).contains("/dev/dm-0 holds /dev/sda1"));
        assert!(refused(dev(8, 1), &[dev(253, 0)]).contains("beneath"));
        assert!(refused(dev(8, 0), &[dev(253, 0)]).contains("beneath"));
        assert!(refused(dev(253, 0), &[dev(253, 0)]).contains("origin"));
        assert!(refused(dev(253, 0), &[dev(8, 1)]).contains("lies on"));
        assert!(refused(dev(8, 16), &[dev(8, 16)]).contains("origin"));
        topology.check_device(dev(8, 16), Path::new("/dev/sdb"), &[dev(253, 0)]).unwrap();
        topology.check_device(dev(253, 0), Path::new("/dev/dm-0"), &[dev(8, 16)]).unwrap();
        fs::write(topology.node(dev(8, 16)).join("ro"), "1\n").unwrap();
        assert!(refused(dev(8, 16), &[]).contains("read-only"));
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape("/a\\040b\\134"), Path::new("/a b\\"));
        assert_eq!(unescape("/a\\9"), Path::new("/a\\9"));
    }
}
