//! Is this what the copy was made to? What a copy goes to is noted by the facts that stay with it ([`TargetRecord`]),
//! and a process that goes on with it compares them before it writes.
//!
//! Two questions are answered, and "I do not know" is no to both:
//! - is it the same device or file? Otherwise nothing may be written to it;
//! - is it the same *instance* of it, there without a break since the copy began? Otherwise what had not reached the
//!   medium may be lost, and what is to be trusted has to be read back.
//!
//! Must not open or write what it judges.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::time::UNIX_EPOCH;

use nix::sys::statvfs::fstatvfs;

use crate::base::{DeviceNumber, Error, Result, ResultExt as _};
use crate::format::state::{DeviceRecord, FileRecord, TargetRecord};
use crate::sys::block::generation;
use crate::topology::{Ground, Topology};

/// A target that is the one that was noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Known {
    /// It may have been away meanwhile.
    Again,
    /// It was there all the time.
    Throughout,
}

/// The facts of what `file`, at `path`, stands for: a block device, or a regular file.
///
/// # Errors
/// I/O errors.
pub fn identify(file: &File, path: &Path) -> Result<TargetRecord> {
    let topology = Topology::default();
    let boot = topology.boot();
    let metadata = file.metadata().io_context(|| format!("look at {}", path.display()))?;
    if metadata.file_type().is_block_device() {
        let devices = topology.identities(DeviceNumber::from_dev(metadata.rdev()));
        return Ok(TargetRecord { boot, file: None, devices });
    }
    let device = DeviceNumber::from_dev(metadata.dev());
    let mut devices: Vec<DeviceRecord> = match topology.ground(device, path) {
        Ground::Devices(devices) => devices.iter().flat_map(|device| topology.identities(*device)).collect(),
        Ground::Elsewhere | Ground::Unknown(_) => Vec::new(),
    };
    devices.sort_by_key(|device| device.number);
    devices.dedup_by_key(|device| device.number);
    let what = || format!("look at the filesystem of {}", path.display());
    let filesystem = fstatvfs(file).io_context(what)?.filesystem_id();
    let born = metadata.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    let file = FileRecord {
        device,
        mount: mount_of(file).unwrap_or(0),
        filesystem,
        inode: metadata.ino(),
        generation: generation(file),
        born_utc_ns: born.and_then(|born| u64::try_from(born.as_nanos()).ok()),
    };
    Ok(TargetRecord { boot, file: Some(file), devices })
}

/// The kernel's id of the mount that `file` was opened through.
fn mount_of(file: &File) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:")).and_then(|id| id.trim().parse().ok())
}

/// Compares what is at `path` now with what was `noted`.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) where it is another, or where nothing tells.
pub fn recognize(noted: Option<&TargetRecord>, now: &TargetRecord, path: &Path) -> Result<Known> {
    let refused = |what: String| {
        Error::refused(what).state("nothing was written").next(
            "connect what the copy was made to, under the same name, and try again; or run 'tidemark recover', and \
             copy again",
        )
    };
    let shown = path.display();
    let noted = noted.ok_or_else(|| {
        refused(format!("nothing tells whether {shown} is what the copy was made to: it was not noted"))
    })?;
    let is_same_boot = !noted.boot.is_empty() && noted.boot == now.boot;
    let devices = all_known(&noted.devices, &now.devices, is_same_boot);
    match (&noted.file, &now.file) {
        (None, None) if now.devices.is_empty() => Err(refused(format!("{shown} is no device any more"))),
        (None, None) => {
            devices.map_err(|why| refused(format!("{shown} is not what the copy was made to: {why}")))
        }
        (Some(noted), Some(now)) => {
            same_file(noted, now).map_err(|why| {
                refused(format!("{shown} is not the file that the copy was made to: {why}"))
            })?;
            let is_same_mount =
                is_same_boot && noted.mount != 0 && (noted.mount, noted.device) == (now.mount, now.device);
            // The file's own facts say that it is the same; another disk beneath it may be a copy of the first.
            Ok(if is_same_mount { devices.unwrap_or(Known::Again) } else { Known::Again })
        }
        _ => Err(refused(format!(
            "{shown} is not what the copy was made to: one is a device, the other a file"
        ))),
    }
}

fn same_file(noted: &FileRecord, now: &FileRecord) -> Result<(), String> {
    if noted.filesystem != now.filesystem {
        return Err("it is in another filesystem".to_owned());
    }
    // Zero: a filesystem without an id, which then has to be the same mount's.
    if noted.filesystem == 0 && (noted.device, noted.mount) != (now.device, now.mount) {
        return Err("its filesystem was mounted anew, and has no id".to_owned());
    }
    let fact = |what: &str, noted: Option<u64>, now: Option<u64>| match noted == now {
        true => Ok(()),
        false => Err(format!("its {what} is another")),
    };
    fact("inode", Some(noted.inode), Some(now.inode))?;
    fact("inode's generation", noted.generation.map(u64::from), now.generation.map(u64::from))?;
    fact("time of birth", noted.born_utc_ns, now.born_utc_ns)
}

/// Each device that was noted is there, and no other.
fn all_known(noted: &[DeviceRecord], now: &[DeviceRecord], is_same_boot: bool) -> Result<Known, String> {
    let mut left: Vec<&DeviceRecord> = now.iter().collect();
    let mut known = Known::Throughout;
    for device in noted {
        // The one of the same number first: what it lacks is the best reason.
        left.sort_by_key(|other| other.number != device.number);
        let mut why = None;
        let found =
            left.iter().enumerate().find_map(|(at, other)| match same_device(device, other, is_same_boot) {
                Ok(found) => Some((at, found)),
                Err(reason) => {
                    why.get_or_insert(reason);
                    None
                }
            });
        let Some((at, found)) = found else {
            return Err(why.unwrap_or_else(|| format!("what was block device {} is gone", device.number)));
        };
        left.remove(at);
        known = known.min(found);
    }
    match left.first() {
        None => Ok(known),
        Some(other) => Err(format!("block device {} beneath it was not there", other.number)),
    }
}

fn same_device(noted: &DeviceRecord, now: &DeviceRecord, is_same_boot: bool) -> Result<Known, String> {
    let number = now.number;
    if noted.size_bytes != now.size_bytes {
        return Err(format!("block device {number} has {} bytes, not {}", now.size_bytes, noted.size_bytes));
    }
    let part = |device: &DeviceRecord| (device.partition_start_bytes, device.partition_uuid.clone());
    if part(noted) != part(now) {
        return Err(format!("block device {number} is another partition"));
    }
    let facts = [
        ("UUID", &noted.uuid, &now.uuid),
        ("world-wide name", &noted.wwid, &now.wwid),
        ("serial number", &noted.serial, &now.serial),
        ("backing file", &noted.backing, &now.backing),
    ];
    if let Some((what, ..)) = facts.iter().find(|(_, noted, now)| noted != now) {
        return Err(format!("block device {number} has another {what}"));
    }
    if is_same_boot && noted.number == number && noted.sequence.is_some() && noted.sequence == now.sequence {
        return Ok(Known::Throughout);
    }
    match facts.iter().any(|(_, noted, _)| noted.is_some()) {
        true => Ok(Known::Again),
        false => Err(format!(
            "block device {number} has come since, and has neither UUID nor serial number by which to know it"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ErrorKind;

    fn dev(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    fn disk(minor: u32, sequence: u64, serial: Option<&str>) -> DeviceRecord {
        DeviceRecord {
            number: dev(8, minor),
            size_bytes: 1 << 30,
            sequence: Some(sequence),
            uuid: None,
            wwid: None,
            serial: serial.map(str::to_owned),
            backing: None,
            partition_start_bytes: None,
            partition_uuid: None,
        }
    }

    fn target(devices: &[DeviceRecord]) -> TargetRecord {
        TargetRecord { boot: "b".to_owned(), file: None, devices: devices.to_vec() }
    }

    fn known(noted: &TargetRecord, now: &TargetRecord) -> Option<Known> {
        match recognize(Some(noted), now, Path::new("/dev/sdb")) {
            Ok(known) => Some(known),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Refused);
                assert!(error.next_step().is_some() && error.state_left().is_some());
                None
            }
        }
    }

    #[test]
    fn a_disk_is_told_from_another_of_its_name() {
        let noted = target(&[disk(16, 5, Some("A"))]);
        assert_eq!(known(&noted, &noted), Some(Known::Throughout));
        assert_eq!(known(&noted, &target(&[disk(16, 6, Some("A"))])), Some(Known::Again));
        assert_eq!(known(&noted, &target(&[disk(32, 6, Some("A"))])), Some(Known::Again));
        assert_eq!(known(&noted, &target(&[disk(16, 6, Some("B"))])), None);
        assert_eq!(known(&noted, &target(&[disk(16, 6, None)])), None);
        assert_eq!(known(&noted, &target(&[disk(16, 5, Some("B"))])), None, "nothing may differ");
        assert_eq!(known(&noted, &target(&[])), None);
        let smaller = DeviceRecord { size_bytes: 1 << 29, ..disk(16, 5, Some("A")) };
        assert_eq!(known(&noted, &target(&[smaller])), None);
        let rebooted = TargetRecord { boot: "c".to_owned(), ..noted.clone() };
        assert_eq!(known(&noted, &rebooted), Some(Known::Again));
        let error = recognize(None, &noted, Path::new("/dev/sdb")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
    }

    #[test]
    fn what_nothing_tells_is_another() {
        let noted = target(&[disk(16, 5, None)]);
        assert_eq!(known(&noted, &noted), Some(Known::Throughout));
        assert_eq!(known(&noted, &target(&[disk(16, 6, None)])), None);
        let untold = target(&[DeviceRecord { sequence: None, ..disk(16, 5, None) }]);
        assert_eq!(known(&untold, &untold), None, "a kernel that does not count its disks");
    }

    #[test]
    fn every_device_beneath_has_to_be_the_same() {
        let volume = DeviceRecord { uuid: Some("LVM-x".to_owned()), ..disk(99, 7, None) };
        let noted = target(&[disk(16, 5, Some("A")), disk(32, 6, Some("B")), volume.clone()]);
        assert_eq!(known(&noted, &noted), Some(Known::Throughout));
        let swapped = target(&[disk(16, 8, Some("B")), disk(32, 9, Some("A")), volume.clone()]);
        assert_eq!(known(&noted, &swapped), Some(Known::Again));
        let moved = target(&[disk(16, 5, Some("A")), disk(48, 6, Some("C")), volume.clone()]);
        assert_eq!(known(&noted, &moved), None);
        let more = target(&[disk(16, 5, Some("A")), disk(32, 6, Some("B")), disk(48, 1, Some("C")), volume]);
        assert_eq!(known(&noted, &more), None);
        assert_eq!(known(&more, &noted), None);
        let part = |start| DeviceRecord { partition_start_bytes: Some(start), ..disk(17, 5, Some("A")) };
        assert_eq!(known(&target(&[part(1 << 20)]), &target(&[part(1 << 20)])), Some(Known::Throughout));
        assert_eq!(known(&target(&[part(1 << 20)]), &target(&[part(2 << 20)])), None);
    }

    #[test]
    fn a_file_is_told_from_another_of_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let make = || File::create(&path).unwrap();
        let file = make();
        let noted = identify(&file, &path).unwrap();
        assert!(!noted.boot.is_empty() && noted.file.as_ref().is_some_and(|file| file.mount != 0));
        assert_eq!(
            recognize(Some(&noted), &identify(&file, &path).unwrap(), &path).unwrap(),
            Known::Throughout
        );
        std::fs::remove_file(&path).unwrap();
        // The first one is still open: its inode is not given out again.
        let error = recognize(Some(&noted), &identify(&make(), &path).unwrap(), &path).unwrap_err();
        assert!(error.to_string().contains("is not the file"), "{error}");
        let with = |change: &dyn Fn(&mut FileRecord)| {
            let mut now = noted.clone();
            change(now.file.as_mut().unwrap());
            recognize(Some(&noted), &now, &path).ok()
        };
        assert_eq!(with(&|_| ()), Some(Known::Throughout));
        assert_eq!(with(&|file| file.mount += 1), Some(Known::Again));
        assert_eq!(with(&|file| file.device = dev(1, 1)), Some(Known::Again));
        assert_eq!(with(&|file| file.filesystem ^= 1), None);
        assert_eq!(with(&|file| file.inode ^= 1), None);
        assert_eq!(with(&|file| file.generation = Some(file.generation.unwrap_or(0) ^ 1)), None);
        assert_eq!(with(&|file| file.born_utc_ns = Some(1)), None);
        let device = target(&[disk(16, 5, Some("A"))]);
        assert_eq!(known(&noted, &device), None);
        assert_eq!(known(&device, &noted), None);
    }
}
