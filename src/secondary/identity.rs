//! Is this what the copy was made to? What a copy goes to is noted by the facts that stay with it ([`TargetRecord`]),
//! and a process that goes on with it compares them before it writes.
//!
//! Two questions are answered:
//! - is it the same device or file? Where a fact that stays with it differs, nothing may be written to it; where none
//!   differs and none proves it either ([`Known::Perhaps`]), not before what was written has been read back from it;
//! - is it the same *instance* of it, there without a break since the copy began? Otherwise what had not reached the
//!   medium may be lost, and what is to be trusted has to be read back.
//!
//! Must not open or write what it judges.

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
use crate::topology::{Ground, Topology};

/// How much a time of birth may differ that was read from the medium of FAT: its grain, and that of a clock of theirs.
const PASSING_BIRTH_NS: u64 = 2_000_000_000;

/// Linux `include/uapi/linux/magic.h`.
const EXFAT_SUPER_MAGIC: FsType = FsType(0x2011_bab0);

/// Filesystems that give out inode numbers anew with each mount.
const INODES_PASS: [FsType; 3] = [MSDOS_SUPER_MAGIC, EXFAT_SUPER_MAGIC, FUSE_SUPER_MAGIC];

/// A target that is the one that was noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Known {
    /// Nothing differs, and nothing that another could not have as well is the same.
    Perhaps,
    /// It is the same, and may have been away meanwhile.
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
        inode_passes: INODES_PASS.contains(&kind),
    };
    Ok(TargetRecord { boot, file: Some(file), devices })
}

/// Of the kernel, which tells it from 6.9 on and not for each kind; else from the device itself.
fn filesystem_uuid(file: &File, topology: &Topology, device: DeviceNumber) -> Option<String> {
    let told = block::filesystem_uuid(file).and_then(|uuid| filesystem_id::text(&uuid));
    told.or_else(|| {
        let mut head = Vec::new();
        let length = u64::try_from(filesystem_id::HEAD_BYTES).expect("4096 fits u64");
        let beneath = topology.node(device).exists().then(|| topology.name(device))?;
        File::open(beneath).ok()?.take(length).read_to_end(&mut head).ok()?;
        filesystem_id::find(&head)
    })
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
            let is_same_mount =
                is_same_boot && noted.mount != 0 && (noted.mount, noted.device) == (now.mount, now.device);
            let known = same_file(noted, now, is_same_mount).map_err(|why| {
                refused(format!("{shown} is not the file that the copy was made to: {why}"))
            })?;
            // The file's own facts say that it is the same; another disk beneath it may be a copy of the first.
            Ok(if is_same_mount { devices.unwrap_or(Known::Again) } else { known })
        }
        _ => Err(refused(format!(
            "{shown} is not what the copy was made to: one is a device, the other a file"
        ))),
    }
}

fn same_file(noted: &FileRecord, now: &FileRecord, is_same_mount: bool) -> Result<Known, String> {
    let is_proven = same_filesystem(noted, now, is_same_mount)?;
    let fact =
        |what: &str, is_same: bool| if is_same { Ok(()) } else { Err(format!("its {what} is another")) };
    let passes = !is_same_mount && (noted.inode_passes || now.inode_passes);
    if !passes {
        fact("inode", noted.inode == now.inode)?;
        fact("inode's generation", noted.generation == now.generation)?;
    }
    let is_born_then = match (noted.born_utc_ns, now.born_utc_ns) {
        // They keep it less exactly on the medium than in memory.
        (Some(noted), Some(now)) if passes => noted.abs_diff(now) <= PASSING_BIRTH_NS,
        (noted, now) => noted == now,
    };
    fact("time of birth", is_born_then)?;
    Ok(if is_proven && !passes { Known::Again } else { Known::Perhaps })
}

/// True where it is proven to be the same filesystem; an error where it is another.
fn same_filesystem(noted: &FileRecord, now: &FileRecord, is_same_mount: bool) -> Result<bool, String> {
    let compared = match (&noted.filesystem_uuid, &now.filesystem_uuid) {
        (Some(noted), Some(now)) => Some(noted == now),
        _ if is_same_mount || (is_made_from_uuid(noted) && is_made_from_uuid(now)) => {
            Some(noted.filesystem == now.filesystem)
        }
        _ => None,
    };
    match compared {
        Some(false) => Err("it is in another filesystem".to_owned()),
        compared => Ok(is_same_mount || compared.is_some()),
    }
}

/// The filesystem's id is not zero, nor the number of its device.
fn is_made_from_uuid(file: &FileRecord) -> bool {
    file.filesystem != 0 && file.filesystem != file.device.to_dev()
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
    let is_doubtful = noted.doubtful || now.doubtful;
    let proves = |what: &str| !is_doubtful || ["UUID", "backing file"].contains(&what);
    let mut told = facts.iter().filter(|(_, noted, _)| noted.is_some()).map(|(what, ..)| *what).peekable();
    if told.peek().is_none() {
        return Err(format!(
            "block device {number} has come since, and has neither UUID nor serial number by which to know it"
        ));
    }
    Ok(if told.any(proves) { Known::Again } else { Known::Perhaps })
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
            doubtful: false,
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
    fn disks_that_a_dock_gives_one_serial_number_are_not_told_apart() {
        let doubtful = |sequence| DeviceRecord { doubtful: true, ..disk(16, sequence, Some("DOCK")) };
        let noted = target(&[doubtful(5)]);
        assert_eq!(known(&noted, &noted), Some(Known::Throughout));
        assert_eq!(known(&noted, &target(&[doubtful(6)])), Some(Known::Perhaps));
        assert_eq!(known(&noted, &target(&[disk(16, 6, Some("DOCK"))])), Some(Known::Perhaps));
        assert_eq!(
            known(&target(&[disk(16, 5, Some("DOCK"))]), &target(&[doubtful(6)])),
            Some(Known::Perhaps)
        );
        let volume = |sequence| DeviceRecord { uuid: Some("LVM-x".to_owned()), ..doubtful(sequence) };
        assert_eq!(known(&target(&[volume(5)]), &target(&[volume(6)])), Some(Known::Again));
    }

    #[test]
    fn a_filesystem_whose_id_is_its_device_s_number_is_known_by_its_uuid() {
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
        let known = |noted: &FileRecord, now: &FileRecord| {
            let of = |file: &FileRecord| TargetRecord { file: Some(file.clone()), ..target(&[]) };
            recognize(Some(&of(noted)), &of(now), Path::new("/x")).ok()
        };
        assert_eq!(known(&file(17, Some("a")), &file(33, Some("a"))), Some(Known::Again));
        assert_eq!(known(&file(17, Some("a")), &file(33, Some("b"))), None);
        assert_eq!(known(&file(17, Some("a")), &file(17, Some("b"))), None, "the same name");
        for (one, other) in [(None, None), (Some("a"), None), (None, Some("a"))] {
            assert_eq!(known(&file(17, one), &file(33, other)), Some(Known::Perhaps));
        }
        let none = |mount| FileRecord { filesystem: 0, mount, ..file(17, None) };
        assert_eq!(known(&none(1), &none(1)), Some(Known::Throughout));
        assert_eq!(known(&none(1), &none(2)), Some(Known::Perhaps));
        assert_eq!(known(&none(1), &FileRecord { inode: 13, ..none(2) }), None);
        // FAT: another inode, and a birth that is known less exactly.
        let fat = |mount, inode, born| FileRecord {
            inode,
            generation: None,
            born_utc_ns: Some(born),
            inode_passes: true,
            ..FileRecord { mount, ..file(17, Some("c")) }
        };
        assert_eq!(known(&fat(1, 5, 1_005_000_000), &fat(2, 9, 1_000_000_000)), Some(Known::Perhaps));
        assert_eq!(
            known(&fat(1, 5, 1_005_000_000), &fat(1, 9, 1_005_000_000)),
            None,
            "within a mount it stays"
        );
        assert_eq!(known(&fat(1, 5, 1_005_000_000), &fat(2, 9, 9_000_000_000)), None);
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
        assert_eq!(known(&noted, &device), None);
        assert_eq!(known(&device, &noted), None);
    }
}
