//! Recognizes the target of a copy. The facts that stay with a target are recorded ([`TargetRecord`]), and a
//! process that resumes the copy compares them before it writes.
//!
//! Two facts are determined:
//! - Whether it is the same device or file. If a permanent fact differs, it must not be written to. If none
//!   differs but none proves it either ([`Recognition::Unproven`]), what was written has to be read back from
//!   it before it is written to.
//! - Whether it is the same *instance*, attached without interruption since the copy began. If not, data that
//!   had not reached the medium may be lost, and everything that is to be trusted has to be read back.
//!
//! This module never opens or writes a target.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::time::UNIX_EPOCH;

use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, MSDOS_SUPER_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;

use crate::base::{DeviceNumber, Error, Result, ResultExt as _};
use crate::format::filesystem_id;
use crate::format::state::{DeviceRecord, FileRecord, TargetRecord};
use crate::sys::block::{self, generation};
use crate::sys::process::mount_of;
use crate::topology::{FilesystemBacking, Topology};

/// Tolerance for the time of birth on FAT and exFAT, which store it with less precision.
const BIRTH_TOLERANCE_NS: u64 = 2_000_000_000;

/// Linux `include/uapi/linux/magic.h`.
const EXFAT_SUPER_MAGIC: FsType = FsType(0x2011_bab0);

/// Filesystems that assign inode numbers anew at each mount.
const INODES_REASSIGNED: [FsType; 3] = [MSDOS_SUPER_MAGIC, EXFAT_SUPER_MAGIC, FUSE_SUPER_MAGIC];

/// How the current target compares with the recorded one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recognition {
    /// No fact differs, but every fact that matches could be another target's as well.
    Unproven,
    /// It is the same target, but it may have been detached meanwhile.
    Same,
    /// It is the same target, attached all the time.
    Uninterrupted,
}

/// The facts of `file`, opened from `path`: a block device or a regular file.
///
/// # Errors
/// I/O errors.
pub fn identify(file: &File, path: &Path) -> Result<TargetRecord> {
    let topology = Topology::default();
    let boot = topology.boot();
    let metadata = file.metadata().io_context(|| format!("stat of {}", path.display()))?;
    if metadata.file_type().is_block_device() {
        let devices = topology.identities(DeviceNumber::from_dev(metadata.rdev()));
        return Ok(TargetRecord { boot, file: None, devices });
    }
    let device = DeviceNumber::from_dev(metadata.dev());
    let mut devices: Vec<DeviceRecord> = match topology.filesystem_backing(device, path) {
        FilesystemBacking::Devices(devices) => {
            devices.iter().flat_map(|device| topology.identities(*device)).collect()
        }
        FilesystemBacking::Elsewhere | FilesystemBacking::Unknown(_) => Vec::new(),
    };
    devices.sort_by_key(|device| device.number);
    devices.dedup_by_key(|device| device.number);
    let what = || format!("statfs of the filesystem of {}", path.display());
    let filesystem = fstatvfs(file).io_context(what)?.filesystem_id();
    let kind = fstatfs(file).map_err(io::Error::from).io_context(what)?.filesystem_type();
    let born = metadata.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    let file = FileRecord {
        device,
        mount: mount_of(file).unwrap_or(0),
        filesystem,
        inode: metadata.ino(),
        generation: generation(file),
        born_utc_ns: born.and_then(|born| u64::try_from(born.as_nanos()).ok()),
        filesystem_uuid: filesystem_uuid(file, &topology, device),
        inode_passes: INODES_REASSIGNED.contains(&kind),
    };
    Ok(TargetRecord { boot, file: Some(file), devices })
}

/// From the kernel, which reports it from 6.9 on for some filesystems; else from the device itself.
fn filesystem_uuid(file: &File, topology: &Topology, device: DeviceNumber) -> Option<String> {
    let reported = block::filesystem_uuid(file).and_then(|uuid| filesystem_id::text(&uuid));
    reported.or_else(|| {
        let mut head = Vec::new();
        let length = u64::try_from(filesystem_id::HEAD_BYTES).expect("4096 fits u64");
        let beneath = topology.node(device).exists().then(|| topology.name(device))?;
        File::open(beneath).ok()?.take(length).read_to_end(&mut head).ok()?;
        filesystem_id::find(&head)
    })
}

/// Compares the target at `path` now with the `recorded` one.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it is another target, or if no fact
/// identifies it.
pub fn recognize(recorded: Option<&TargetRecord>, now: &TargetRecord, path: &Path) -> Result<Recognition> {
    let refused = |what: String| {
        Error::refused(what).state("nothing was written").next(
            "connect the copy's target under the same name, and try again; or run 'tidemark recover', and \
             copy again",
        )
    };
    let shown = path.display();
    let recorded = recorded.ok_or_else(|| {
        refused(format!("whether {shown} is the copy's target is unknown: its identity was not recorded"))
    })?;
    let is_same_boot = !recorded.boot.is_empty() && recorded.boot == now.boot;
    let devices = compare_devices(&recorded.devices, &now.devices, is_same_boot);
    match (&recorded.file, &now.file) {
        (None, None) if now.devices.is_empty() => Err(refused(format!("{shown} is no longer a device"))),
        (None, None) => devices.map_err(|why| refused(format!("{shown} is not the copy's target: {why}"))),
        (Some(recorded), Some(now)) => {
            let is_same_mount = is_same_boot
                && recorded.mount != 0
                && (recorded.mount, recorded.device) == (now.mount, now.device);
            let known = same_file(recorded, now, is_same_mount)
                .map_err(|why| refused(format!("{shown} is not the copy's target file: {why}")))?;
            // The file's own facts prove that it is the same; but the disk below may have been replaced by a
            // copy of it.
            Ok(if is_same_mount { devices.unwrap_or(Recognition::Same) } else { known })
        }
        _ => Err(refused(format!("{shown} is not the copy's target: one is a device, the other a file"))),
    }
}

fn same_file(recorded: &FileRecord, now: &FileRecord, is_same_mount: bool) -> Result<Recognition, String> {
    let is_proven = same_filesystem(recorded, now, is_same_mount)?;
    let fact = |what: &str, is_same: bool| if is_same { Ok(()) } else { Err(format!("its {what} differs")) };
    let is_reassigned = !is_same_mount && (recorded.inode_passes || now.inode_passes);
    if !is_reassigned {
        fact("inode", recorded.inode == now.inode)?;
        fact("inode's generation", recorded.generation == now.generation)?;
    }
    let is_born_then = match (recorded.born_utc_ns, now.born_utc_ns) {
        // These filesystems store it with less precision than they keep in memory.
        (Some(recorded), Some(now)) if is_reassigned => recorded.abs_diff(now) <= BIRTH_TOLERANCE_NS,
        (recorded, now) => recorded == now,
    };
    fact("time of birth", is_born_then)?;
    Ok(if is_proven && !is_reassigned { Recognition::Same } else { Recognition::Unproven })
}

/// True if the filesystem is proven to be the same; an error if it is another.
fn same_filesystem(recorded: &FileRecord, now: &FileRecord, is_same_mount: bool) -> Result<bool, String> {
    let compared = match (&recorded.filesystem_uuid, &now.filesystem_uuid) {
        (Some(recorded), Some(now)) => Some(recorded == now),
        _ if is_same_mount || (is_derived_from_uuid(recorded) && is_derived_from_uuid(now)) => {
            Some(recorded.filesystem == now.filesystem)
        }
        _ => None,
    };
    match compared {
        Some(false) => Err("it is on another filesystem".to_owned()),
        compared => Ok(is_same_mount || compared.is_some()),
    }
}

/// True if the filesystem's id is neither zero nor the number of its device.
fn is_derived_from_uuid(file: &FileRecord) -> bool {
    file.filesystem != 0 && file.filesystem != file.device.to_dev()
}

/// Every recorded device is present, and no other.
fn compare_devices(
    recorded: &[DeviceRecord],
    now: &[DeviceRecord],
    is_same_boot: bool,
) -> Result<Recognition, String> {
    let mut left: Vec<&DeviceRecord> = now.iter().collect();
    let mut known = Recognition::Uninterrupted;
    for device in recorded {
        // Compare the device with the same number first: its difference is the best reason to report.
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
            return Err(why.unwrap_or_else(|| format!("the former block device {} is gone", device.number)));
        };
        left.remove(at);
        known = known.min(found);
    }
    match left.first() {
        None => Ok(known),
        Some(other) => Err(format!("block device {} below it is new", other.number)),
    }
}

/// True if every device of `now` is one of those of `recorded`: what is written to `now` may be written to `recorded`.
pub(super) fn is_part_of(now: &TargetRecord, recorded: &TargetRecord) -> bool {
    let is_same_boot = !recorded.boot.is_empty() && recorded.boot == now.boot;
    let is_known = |device: &DeviceRecord| {
        recorded.devices.iter().any(|other| same_device(other, device, is_same_boot).is_ok())
    };
    !now.devices.is_empty() && now.devices.iter().all(is_known)
}

/// True for a device that has, or is on one that has, neither UUID nor serial number: nothing tells it from another
/// one.
pub(super) fn is_nameless(target: &TargetRecord) -> bool {
    let has_no_name = |device: &DeviceRecord| {
        [&device.uuid, &device.wwid, &device.serial, &device.backing].into_iter().all(Option::is_none)
    };
    target.file.is_none() && target.devices.iter().any(has_no_name)
}

fn same_device(
    recorded: &DeviceRecord,
    now: &DeviceRecord,
    is_same_boot: bool,
) -> Result<Recognition, String> {
    let number = now.number;
    if recorded.size_bytes != now.size_bytes {
        return Err(format!(
            "block device {number} has {} bytes, not {}",
            now.size_bytes, recorded.size_bytes
        ));
    }
    let part = |device: &DeviceRecord| (device.partition_start_bytes, device.partition_uuid.clone());
    if part(recorded) != part(now) {
        return Err(format!("block device {number} is another partition"));
    }
    let facts = [
        ("UUID", &recorded.uuid, &now.uuid),
        ("world-wide name", &recorded.wwid, &now.wwid),
        ("serial number", &recorded.serial, &now.serial),
        ("backing file", &recorded.backing, &now.backing),
    ];
    if let Some((what, ..)) = facts.iter().find(|(_, recorded, now)| recorded != now) {
        return Err(format!("the {what} of block device {number} differs"));
    }
    if is_same_boot
        && recorded.number == number
        && recorded.sequence.is_some()
        && recorded.sequence == now.sequence
    {
        return Ok(Recognition::Uninterrupted);
    }
    let is_doubtful = recorded.doubtful || now.doubtful;
    let proves = |what: &str| !is_doubtful || ["UUID", "backing file"].contains(&what);
    let mut present =
        facts.iter().filter(|(_, recorded, _)| recorded.is_some()).map(|(what, ..)| *what).peekable();
    if present.peek().is_none() {
        return Err(format!(
            "block device {number} was attached anew, and has neither UUID nor serial number to identify it"
        ));
    }
    Ok(if present.any(proves) { Recognition::Same } else { Recognition::Unproven })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::base::ErrorKind;

    fn dev(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    pub fn disk(minor: u32, sequence: u64, serial: Option<&str>) -> DeviceRecord {
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
            doubtful: false,
        }
    }

    fn target(devices: &[DeviceRecord]) -> TargetRecord {
        TargetRecord { boot: "b".to_owned(), file: None, devices: devices.to_vec() }
    }

    fn known(recorded: &TargetRecord, now: &TargetRecord) -> Option<Recognition> {
        match recognize(Some(recorded), now, Path::new("/dev/sdb")) {
            Ok(known) => Some(known),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Refused);
                assert!(error.next_step().is_some() && error.state_left().is_some());
                None
            }
        }
    }

    #[test]
    fn a_disk_is_distinguished_from_another_of_its_name() {
        let recorded = target(&[disk(16, 5, Some("A"))]);
        assert_eq!(known(&recorded, &recorded), Some(Recognition::Uninterrupted));
        assert_eq!(known(&recorded, &target(&[disk(16, 6, Some("A"))])), Some(Recognition::Same));
        assert_eq!(known(&recorded, &target(&[disk(32, 6, Some("A"))])), Some(Recognition::Same));
        assert_eq!(known(&recorded, &target(&[disk(16, 6, Some("B"))])), None);
        assert_eq!(known(&recorded, &target(&[disk(16, 6, None)])), None);
        assert_eq!(known(&recorded, &target(&[disk(16, 5, Some("B"))])), None, "nothing may differ");
        assert_eq!(known(&recorded, &target(&[])), None);
        let smaller = DeviceRecord { size_bytes: 1 << 29, ..disk(16, 5, Some("A")) };
        assert_eq!(known(&recorded, &target(&[smaller])), None);
        let rebooted = TargetRecord { boot: "c".to_owned(), ..recorded.clone() };
        assert_eq!(known(&recorded, &rebooted), Some(Recognition::Same));
        let error = recognize(None, &recorded, Path::new("/dev/sdb")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
    }

    #[test]
    fn a_serial_number_shared_by_a_docks_disks_proves_nothing() {
        let doubtful = |sequence| DeviceRecord { doubtful: true, ..disk(16, sequence, Some("DOCK")) };
        let recorded = target(&[doubtful(5)]);
        assert_eq!(known(&recorded, &recorded), Some(Recognition::Uninterrupted));
        assert_eq!(known(&recorded, &target(&[doubtful(6)])), Some(Recognition::Unproven));
        assert_eq!(known(&recorded, &target(&[disk(16, 6, Some("DOCK"))])), Some(Recognition::Unproven));
        assert_eq!(
            known(&target(&[disk(16, 5, Some("DOCK"))]), &target(&[doubtful(6)])),
            Some(Recognition::Unproven)
        );
        let volume = |sequence| DeviceRecord { uuid: Some("LVM-x".to_owned()), ..doubtful(sequence) };
        assert_eq!(known(&target(&[volume(5)]), &target(&[volume(6)])), Some(Recognition::Same));
    }

    #[test]
    fn a_filesystem_without_an_id_of_its_own_is_recognized_by_its_uuid() {
        let file = |minor: u32, uuid: Option<&str>| FileRecord {
            device: dev(8, minor),
            mount: u64::from(minor),
            filesystem: u64::from(8 << 8 | minor),
            inode: 12,
            generation: Some(7),
            born_utc_ns: Some(1_000_000_000_000),
            filesystem_uuid: uuid.map(str::to_owned),
            inode_passes: false,
        };
        let known = |recorded: &FileRecord, now: &FileRecord| {
            let of = |file: &FileRecord| TargetRecord { file: Some(file.clone()), ..target(&[]) };
            recognize(Some(&of(recorded)), &of(now), Path::new("/x")).ok()
        };
        assert_eq!(known(&file(17, Some("a")), &file(33, Some("a"))), Some(Recognition::Same));
        assert_eq!(known(&file(17, Some("a")), &file(33, Some("b"))), None);
        assert_eq!(known(&file(17, Some("a")), &file(17, Some("b"))), None, "the same name");
        for (one, other) in [(None, None), (Some("a"), None), (None, Some("a"))] {
            assert_eq!(known(&file(17, one), &file(33, other)), Some(Recognition::Unproven));
        }
        let none = |mount| FileRecord { filesystem: 0, mount, ..file(17, None) };
        assert_eq!(known(&none(1), &none(1)), Some(Recognition::Uninterrupted));
        assert_eq!(known(&none(1), &none(2)), Some(Recognition::Unproven));
        assert_eq!(known(&none(1), &FileRecord { inode: 13, ..none(2) }), None);
        // FAT: another inode, and a time of birth with less precision.
        let fat = |mount, inode, born| FileRecord {
            inode,
            generation: None,
            born_utc_ns: Some(born),
            inode_passes: true,
            ..FileRecord { mount, ..file(17, Some("c")) }
        };
        assert_eq!(known(&fat(1, 5, 1_005_000_000), &fat(2, 9, 1_000_000_000)), Some(Recognition::Unproven));
        assert_eq!(
            known(&fat(1, 5, 1_005_000_000), &fat(1, 9, 1_005_000_000)),
            None,
            "within a mount it stays"
        );
        assert_eq!(known(&fat(1, 5, 1_005_000_000), &fat(2, 9, 9_000_000_000)), None);
    }

    #[test]
    fn a_disk_without_identifying_facts_is_refused() {
        let recorded = target(&[disk(16, 5, None)]);
        assert_eq!(known(&recorded, &recorded), Some(Recognition::Uninterrupted));
        assert_eq!(known(&recorded, &target(&[disk(16, 6, None)])), None);
        let uncounted = target(&[DeviceRecord { sequence: None, ..disk(16, 5, None) }]);
        assert_eq!(known(&uncounted, &uncounted), None, "a kernel that does not count its disks");
    }

    #[test]
    fn every_device_below_has_to_be_the_same() {
        let volume = DeviceRecord { uuid: Some("LVM-x".to_owned()), ..disk(99, 7, None) };
        let recorded = target(&[disk(16, 5, Some("A")), disk(32, 6, Some("B")), volume.clone()]);
        assert_eq!(known(&recorded, &recorded), Some(Recognition::Uninterrupted));
        let swapped = target(&[disk(16, 8, Some("B")), disk(32, 9, Some("A")), volume.clone()]);
        assert_eq!(known(&recorded, &swapped), Some(Recognition::Same));
        let moved = target(&[disk(16, 5, Some("A")), disk(48, 6, Some("C")), volume.clone()]);
        assert_eq!(known(&recorded, &moved), None);
        let more = target(&[disk(16, 5, Some("A")), disk(32, 6, Some("B")), disk(48, 1, Some("C")), volume]);
        assert_eq!(known(&recorded, &more), None);
        assert_eq!(known(&more, &recorded), None);
        let part = |start| DeviceRecord { partition_start_bytes: Some(start), ..disk(17, 5, Some("A")) };
        assert_eq!(
            known(&target(&[part(1 << 20)]), &target(&[part(1 << 20)])),
            Some(Recognition::Uninterrupted)
        );
        assert_eq!(known(&target(&[part(1 << 20)]), &target(&[part(2 << 20)])), None);
    }

    #[test]
    fn a_file_is_distinguished_from_another_of_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let make = || File::create(&path).unwrap();
        let file = make();
        let recorded = identify(&file, &path).unwrap();
        assert!(!recorded.boot.is_empty() && recorded.file.as_ref().is_some_and(|file| file.mount != 0));
        assert_eq!(
            recognize(Some(&recorded), &identify(&file, &path).unwrap(), &path).unwrap(),
            Recognition::Uninterrupted
        );
        std::fs::remove_file(&path).unwrap();
        // The first one is still open, so its inode number is not reused.
        let error = recognize(Some(&recorded), &identify(&make(), &path).unwrap(), &path).unwrap_err();
        assert!(error.to_string().contains("is not the copy's target file"), "{error}");
        let with = |change: &dyn Fn(&mut FileRecord)| {
            let mut now = recorded.clone();
            change(now.file.as_mut().unwrap());
            recognize(Some(&recorded), &now, &path).ok()
        };
        assert_eq!(with(&|_| ()), Some(Recognition::Uninterrupted));
        assert_eq!(with(&|file| file.mount += 1), Some(Recognition::Same));
        assert_eq!(with(&|file| file.device = dev(1, 1)), Some(Recognition::Same));
        let other = |id: &Option<String>| id.as_ref().map(|id| format!("{id}0"));
        assert_eq!(
            with(&|file| {
                file.filesystem ^= 1;
                file.filesystem_uuid = other(&file.filesystem_uuid);
            }),
            None
        );
        assert_eq!(with(&|file| file.inode ^= 1), None);
        assert_eq!(with(&|file| file.generation = Some(file.generation.unwrap_or(0) ^ 1)), None);
        assert_eq!(with(&|file| file.born_utc_ns = Some(1)), None);
        let device = target(&[disk(16, 5, Some("A"))]);
        assert_eq!(known(&recorded, &device), None);
        assert_eq!(known(&device, &recorded), None);
    }
}
