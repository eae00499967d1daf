#![doc = include_str!("FORMAT.md")]
//!
//! # Codec
//!
//! Pure: bytes in, structures out. Invariants: decoding never panics and accepts nothing whose checksum, kind
//! or version is wrong; what is encoded decodes to the same value; an encoded record is at most
//! [`RECORD_BYTES_MAX`] long.

mod snapshots;
mod view;

pub use snapshots::{
    DetachedRecord, ROLLBACK_NAME, RollbackRecord, RollbackState, SnapshotGroupRecord, SnapshotRecord,
    SnapshotSetRecord, SnapshotState, SubsetRecord,
};
pub use view::{OriginView, ProgressView, RegionsView, StoreView, VIEW_BYTES_MAX, VIEW_VERSION};

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::base::checksum::crc32c_salted;
use crate::base::{DeviceNumber, Error, Result};

/// Longest record, in bytes: a table of 65,536 lines of 100 bytes and room to spare.
pub const RECORD_BYTES_MAX: usize = 16 << 20;

/// The version that is written, and the only one that is read. A field that may be absent can be added under
/// the same version: a program that does not know it ignores it.
pub const VERSION: u32 = 1;

/// A job in progress: what `recover` needs and the kernel does not know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// The job's id, as in its devices' UUIDs.
    pub job: String,
    /// The command that the user ran: "copy".
    pub command: String,
    /// Process id, for display. The lock shows whether the process lives.
    pub process: u32,
    /// Start, UTC, in nanoseconds since 1970.
    pub started_utc_ns: u64,
    /// The origin, once known; of a group the first one.
    pub origin: Option<OriginRecord>,
    /// The other origins of a group.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further_origins: Vec<OriginRecord>,
    /// The change in progress, if any.
    pub change: Option<ChangeRecord>,
    /// Other things that the job has made and that must be removed, in the order in which they were made.
    pub resources: Vec<ResourceRecord>,
    /// The copy, once its instant is taken, if another process can resume it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyRecord>,
}

impl JobRecord {
    /// All origins, in the order in which they were given.
    pub fn origins(&self) -> impl Iterator<Item = &OriginRecord> {
        self.origin.iter().chain(&self.further_origins)
    }
}

/// A copy between its instant and its end: what a process needs to resume it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRecord {
    /// The user's request as JSON, in the form of the program that wrote it.
    pub request: String,
    /// The origin's path, for display.
    pub origin_path: String,
    /// Unit of copying, bytes.
    pub segment_bytes: u64,
    /// Unit of release, bytes.
    pub region_bytes: u64,
    /// The instant, UTC, in nanoseconds since 1970.
    pub instant_utc_ns: u64,
    /// Nanoseconds: writing back the filesystems, filesystems frozen, origin suspended.
    pub held_ns: [u64; 3],
    /// The archive's UUID.
    pub archive: Option<String>,
    /// The secondary's file under the name that it has until it is complete.
    pub partial: Option<String>,
    /// The ranges that are not copied because they were not in use: first byte and end of each, in order.
    pub skipped: Vec<(u64, u64)>,
    /// --hook-after has run.
    pub hook_after_done: bool,
    /// The facts that identify the copy's target. None in a record of a program that did not store them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<TargetRecord>,
}

/// The facts by which a later process recognizes a copy's target, and distinguishes it from another of the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetRecord {
    /// The kernel's id of this boot.
    pub boot: String,
    /// The file; None if the target is a device.
    pub file: Option<FileRecord>,
    /// The target, or the device that the file's filesystem is on, and every device below it, in the order of
    /// their numbers.
    pub devices: Vec<DeviceRecord>,
}

/// A file and its filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// `st_dev`.
    pub device: DeviceNumber,
    /// The kernel's id of the mount.
    pub mount: u64,
    /// The filesystem's id from statfs(2) (`f_fsid`). Some filesystems derive it from their UUID; others
    /// return the number of their device, or zero.
    pub filesystem: u64,
    /// Inode number.
    pub inode: u64,
    /// The inode's generation, if the filesystem reports it.
    pub generation: Option<u32>,
    /// When the file was created, UTC, in nanoseconds since 1970, if the filesystem reports it.
    pub born_utc_ns: Option<u64>,
    /// The filesystem's UUID or volume serial number, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem_uuid: Option<String>,
    /// The filesystem assigns inode numbers anew at each mount.
    #[serde(default, skip_serializing_if = "is_false")]
    pub inode_passes: bool,
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its number.
    pub number: DeviceNumber,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The kernel's count of disks, never used twice in a boot; for a partition that of its disk.
    pub sequence: Option<u64>,
    /// The UUID of a device-mapper or md device.
    pub uuid: Option<String>,
    /// The disk's world-wide name.
    pub wwid: Option<String>,
    /// The disk's serial number.
    pub serial: Option<String>,
    /// A loop device's file: "major:minor inode offset".
    pub backing: Option<String>,
    /// A partition's first byte on its disk.
    pub partition_start_bytes: Option<u64>,
    /// A partition's UUID, if the kernel reports it.
    pub partition_uuid: Option<String>,
    /// The world-wide name and the serial number do not identify the disk: it is attached through a USB
    /// bridge, or another disk reports the same ones.
    #[serde(default, skip_serializing_if = "is_false")]
    pub doubtful: bool,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// The device being copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginRecord {
    /// Its device-mapper name.
    pub device: String,
    /// Its number.
    pub number: DeviceNumber,
    /// Its own table, as the kernel printed it.
    pub table: String,
    /// Settings of its queue before the table was changed, by the names of their files in sysfs. Empty in a
    /// record of a program that did not store them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub queue: BTreeMap<String, String>,
}

/// The progress of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeRecord {
    /// The change's name.
    pub name: String,
    /// The step that is next or in progress, from 0.
    pub step: usize,
    /// True if `step` and the steps before it are being undone.
    pub undo: bool,
    /// Filesystems that may be frozen now.
    pub frozen: Vec<String>,
    /// Devices that may be suspended now.
    pub suspended: Vec<String>,
    /// The steps, in words.
    pub steps: Vec<String>,
}

/// Something that the job made apart from devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceRecord {
    /// "partial": a file under construction. "rcu-expedited": a kernel setting to be turned off.
    pub kind: String,
    /// Its path.
    pub path: String,
}

/// A volume that was attached: this record outlives a boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its name: /dev/mapper/NAME.
    pub name: String,
    /// Its id, as in the device's UUID.
    pub id: String,
    /// The device below, by a path that stays the same from boot to boot.
    pub device: String,
    /// Its size in bytes when it was attached.
    pub size_bytes: u64,
    /// When, UTC, in nanoseconds since 1970.
    pub attached_utc_ns: u64,
}

/// A record that is stored in a file of its own.
pub trait Record: Serialize + DeserializeOwned {
    /// Its kind, in the header line and in the checksum's salt.
    const KIND: &'static str;
}

impl Record for JobRecord {
    const KIND: &'static str = "job";
}

impl Record for VolumeRecord {
    const KIND: &'static str = "volume";
}

/// The bytes of `record`.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) if it is too long.
pub fn encode<R: Record>(record: &R) -> Result<Vec<u8>> {
    encode_padded(record, 0)
}

/// As [`encode`], padded to `length` bytes with spaces after the object, if it is shorter.
///
/// # Errors
/// As [`encode`].
pub fn encode_padded<R: Record>(record: &R, length: usize) -> Result<Vec<u8>> {
    let mut body = serde_json::to_string(record).map_err(|source| {
        Error::bad_data(format!("encoding a {} record failed", R::KIND)).with_source(source)
    })?;
    // The bytes around the body: the first line, three newlines in all, and "crc32c " with its digits.
    let around = format!("tidemark-{} {VERSION}\n\ncrc32c 00000000\n", R::KIND).len();
    body.extend(std::iter::repeat_n(' ', length.saturating_sub(around + body.len())));
    let head = format!("tidemark-{} {VERSION}\n{body}\n", R::KIND);
    let text = format!("{head}crc32c {:08x}\n", crc32c_salted(R::KIND.as_bytes(), head.as_bytes()));
    if text.len() > RECORD_BYTES_MAX {
        return Err(Error::bad_data(format!("a {} record of {} bytes is too long", R::KIND, text.len())));
    }
    Ok(text.into_bytes())
}

/// The record in `bytes`.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) naming the first thing that is wrong.
pub fn decode<R: Record>(bytes: &[u8]) -> Result<R> {
    let bad = |what: &str| Error::bad_data(format!("not a {} record: {what}", R::KIND));
    if bytes.len() > RECORD_BYTES_MAX {
        return Err(bad("it is too long"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| bad("it is not UTF-8"))?;
    let mut lines = text.split_inclusive('\n');
    let (Some(header), Some(body), Some(checksum), None) =
        (lines.next(), lines.next(), lines.next(), lines.next())
    else {
        return Err(bad("it does not have three lines"));
    };
    let version = header
        .strip_prefix("tidemark-")
        .and_then(|rest| rest.strip_prefix(R::KIND))
        .and_then(|rest| rest.strip_prefix(' '))
        .and_then(|rest| rest.strip_suffix('\n'))
        .ok_or_else(|| bad("its first line is not that of such a record"))?;
    let head = &text[..header.len() + body.len()];
    let expected = format!("crc32c {:08x}\n", crc32c_salted(R::KIND.as_bytes(), head.as_bytes()));
    if checksum != expected {
        return Err(bad("its checksum is wrong"));
    }
    if version != VERSION.to_string() {
        return Err(bad(&format!("its version is {version}; this program reads {VERSION}")));
    }
    serde_json::from_str(body)
        .map_err(|source| bad("a field is missing or has the wrong type").with_source(source))
}

/// True if `bytes`, from which `record` was decoded, have no field that this program does not know.
#[must_use]
pub fn is_fully_known<R: Record>(record: &R, bytes: &[u8]) -> bool {
    encode_padded(record, bytes.len()).is_ok_and(|again| again == bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn job() -> JobRecord {
        JobRecord {
            job: "0123456789abcdef0123456789abcdef".to_owned(),
            command: "copy".to_owned(),
            process: 4711,
            started_utc_ns: 1_763_712_000_000_000_000,
            origin: Some(OriginRecord {
                device: "vg-data".to_owned(),
                number: DeviceNumber { major: 253, minor: 3 },
                table: "0 8192 linear 8:16 2048\n8192 8192 linear 8:32 2048".to_owned(),
                queue: BTreeMap::new(),
            }),
            further_origins: Vec::new(),
            change: Some(ChangeRecord {
                name: "insert".to_owned(),
                step: 9,
                undo: false,
                frozen: vec!["/srv/data".to_owned()],
                suspended: vec!["vg-data".to_owned()],
                steps: vec!["make device vg-data-real".to_owned()],
            }),
            resources: vec![ResourceRecord { kind: "loop".to_owned(), path: "/dev/loop3".to_owned() }],
            copy: None,
        }
    }

    fn with_settings() -> JobRecord {
        let queue = [("read_ahead_kb", "4096"), ("write_cache", "write through")];
        let queue = queue.map(|(file, value)| (file.to_owned(), value.to_owned())).into();
        JobRecord { origin: job().origin.map(|origin| OriginRecord { queue, ..origin }), ..job() }
    }

    fn of_a_group() -> JobRecord {
        let wal = OriginRecord {
            device: "vg-wal".to_owned(),
            number: DeviceNumber { major: 253, minor: 4 },
            table: "0 2048 linear 8:48 2048".to_owned(),
            queue: BTreeMap::new(),
        };
        JobRecord { further_origins: vec![wal], ..job() }
    }

    fn copying() -> JobRecord {
        let copy = CopyRecord {
            request: r#"{"origin":"/dev/mapper/vg-data"}"#.to_owned(),
            origin_path: "/dev/mapper/vg-data".to_owned(),
            segment_bytes: 1 << 20,
            region_bytes: 1 << 24,
            instant_utc_ns: 1_763_712_000_500_000_000,
            held_ns: [5_000_000, 3_000_000, 1_000_000],
            archive: None,
            partial: Some("/backup/.data.img.tidemark-partial.0123456789ab".to_owned()),
            skipped: vec![(4096, 1 << 20)],
            hook_after_done: true,
            target: None,
        };
        JobRecord { copy: Some(copy), ..job() }
    }

    fn copying_to(target: TargetRecord) -> JobRecord {
        let JobRecord { copy, .. } = copying();
        JobRecord { copy: copy.map(|copy| CopyRecord { target: Some(target), ..copy }), ..job() }
    }

    fn target() -> TargetRecord {
        TargetRecord {
            boot: "01234567-89ab-4cde-8f01-23456789abcd".to_owned(),
            file: Some(FileRecord {
                device: DeviceNumber { major: 8, minor: 17 },
                mount: 42,
                filesystem: 0x0123_4567_89ab_cdef,
                inode: 12,
                generation: Some(7),
                born_utc_ns: Some(1_763_712_000_000_000_001),
                filesystem_uuid: None,
                inode_passes: false,
            }),
            devices: vec![DeviceRecord {
                number: DeviceNumber { major: 8, minor: 17 },
                size_bytes: 1 << 40,
                sequence: Some(9),
                uuid: None,
                wwid: Some("naa.5000c500a1b2c3d4".to_owned()),
                serial: Some("WD-1234".to_owned()),
                backing: None,
                partition_start_bytes: Some(1 << 20),
                partition_uuid: Some("0a1b2c3d-01".to_owned()),
                doubtful: false,
            }],
        }
    }

    fn snapshots() -> SnapshotSetRecord {
        let snapshot = |name: &str, id: &str, state, lost: Option<&str>| SnapshotRecord {
            name: name.to_owned(),
            id: id.repeat(32),
            instant_utc_ns: 1_763_712_000_000_000_000,
            store: format!("/var/lib/tidemark/data@{name}.store"),
            store_bytes_max: 1 << 31,
            state,
            lost: lost.map(str::to_owned),
            clone_of: None,
            group: None,
            subset: None,
        };
        SnapshotSetRecord {
            id: "0123456789abcdef0123456789abcdef".to_owned(),
            volume: "data".to_owned(),
            device: "/dev/disk/by-id/wwn-0x5000c500a1b2c3d4".to_owned(),
            size_bytes: 1 << 30,
            chunk_bytes: 4096,
            snapshots: vec![
                snapshot("a", "a", SnapshotState::Detached, Some("the device was written")),
                snapshot("b", "b", SnapshotState::Kept, None),
                snapshot("c", "c", SnapshotState::Deleting, None),
                snapshot("d", "d", SnapshotState::Unlinked, None),
                snapshot("e", "e", SnapshotState::Retired, None),
                snapshot("f", "f", SnapshotState::Creating, None),
            ],
            rollback: None,
            mounts: Some("ext4 0 mounts 7 last 1763712000 dirty 1".to_owned()),
            detached: Some(DetachedRecord {
                at_utc_ns: 1_763_712_000_000_000_001,
                seed: 7,
                digest: "5e".repeat(32),
            }),
        }
    }

    /// One of a group, and the record that makes the group exist.
    fn of_a_snapshot_group() -> (SnapshotSetRecord, SnapshotGroupRecord) {
        let mut set = snapshots();
        set.snapshots.last_mut().unwrap().group = Some("9".repeat(32));
        let group = SnapshotGroupRecord {
            id: "9".repeat(32),
            instant_utc_ns: 1_763_712_000_000_000_000,
            snapshots: vec!["data@f".to_owned(), "wal@f".to_owned()],
        };
        (set, group)
    }

    /// One that leaves something out.
    fn with_subset() -> SnapshotSetRecord {
        let mut set = snapshots();
        set.snapshots[1].subset = Some(SubsetRecord {
            include: vec!["/srv/mail".to_owned()],
            exclude: vec!["*.tmp".to_owned(), "bytes:4096+8192".to_owned()],
            left_out: vec![(4096, 12_288), (1 << 20, 1 << 21)],
        });
        set
    }

    fn volume() -> VolumeRecord {
        VolumeRecord {
            name: "data".to_owned(),
            id: "0123456789abcdef0123456789abcdef".to_owned(),
            device: "/dev/disk/by-id/wwn-0x5000c500a1b2c3d4".to_owned(),
            size_bytes: 1 << 40,
            attached_utc_ns: 1_763_712_000_000_000_000,
        }
    }

    #[test]
    fn a_padded_record_has_the_requested_length_and_the_same_content() {
        let length = encode(&job()).unwrap().len();
        for wanted in [length, length + 1, 32 << 10] {
            let bytes = encode_padded(&job(), wanted).unwrap();
            assert_eq!((bytes.len(), decode::<JobRecord>(&bytes).unwrap()), (wanted, job()));
            assert!(is_fully_known(&job(), &bytes));
        }
        assert_eq!(encode_padded(&job(), 0).unwrap(), encode(&job()).unwrap());
    }

    /// A set with a clone, and a rollback in progress.
    fn with_rollback() -> SnapshotSetRecord {
        let mut set = snapshots();
        let clone = |name: &str, id: &str| SnapshotRecord {
            name: name.to_owned(),
            id: id.repeat(32),
            clone_of: Some("b".repeat(32)),
            ..set.snapshots[1].clone()
        };
        let clones = [clone("test", "1"), clone(ROLLBACK_NAME, "2")];
        set.snapshots.extend(clones);
        set.rollback = Some(RollbackRecord {
            snapshot: "b".repeat(32),
            state: RollbackState::Merging,
            reserve_bytes: Some(1 << 30),
            directory: "/var/lib/tidemark".to_owned(),
            mounts: None,
        });
        set.detached = None;
        set
    }

    #[test]
    fn golden_files_of_version_1_are_read_and_written_the_same() {
        let golden: &[u8] = include_bytes!("golden/job-v1.json");
        assert_eq!(decode::<JobRecord>(golden).unwrap(), job());
        assert_eq!(encode(&job()).unwrap(), golden);
        let golden: &[u8] = include_bytes!("golden/snapshots-v1.json");
        assert_eq!(decode::<SnapshotSetRecord>(golden).unwrap(), snapshots());
        assert_eq!(encode(&snapshots()).unwrap(), golden);
        let golden: &[u8] = include_bytes!("golden/snapshots-rollback-v1.json");
        assert_eq!(decode::<SnapshotSetRecord>(golden).unwrap(), with_rollback());
        assert_eq!(encode(&with_rollback()).unwrap(), golden);
        let golden: &[u8] = include_bytes!("golden/snapshots-subset-v1.json");
        assert_eq!(decode::<SnapshotSetRecord>(golden).unwrap(), with_subset());
        assert_eq!(encode(&with_subset()).unwrap(), golden);
        let (set, group) = of_a_snapshot_group();
        let golden: &[u8] = include_bytes!("golden/snapshots-group-v1.json");
        assert_eq!(decode::<SnapshotSetRecord>(golden).unwrap(), set);
        assert_eq!(encode(&set).unwrap(), golden);
        let golden: &[u8] = include_bytes!("golden/snapshot-group-v1.json");
        assert_eq!(decode::<SnapshotGroupRecord>(golden).unwrap(), group);
        assert_eq!(encode(&group).unwrap(), golden);
        let golden: &[u8] = include_bytes!("golden/job-queue-v1.json");
        assert_eq!(decode::<JobRecord>(golden).unwrap(), with_settings());
        assert_eq!(encode(&with_settings()).unwrap(), golden);
        let golden: &[u8] = include_bytes!("golden/job-group-v1.json");
        assert_eq!(decode::<JobRecord>(golden).unwrap(), of_a_group());
        assert_eq!(encode(&of_a_group()).unwrap(), golden);
        let golden: &[u8] = include_bytes!("golden/job-copy-v1.json");
        assert_eq!(decode::<JobRecord>(golden).unwrap(), copying());
        assert_eq!(encode(&copying()).unwrap(), golden);
        let golden: &[u8] = include_bytes!("golden/job-copy-target-v1.json");
        assert_eq!(decode::<JobRecord>(golden).unwrap(), copying_to(target()));
        assert_eq!(encode(&copying_to(target())).unwrap(), golden);
        let golden: &[u8] = include_bytes!("golden/volume-v1.json");
        assert_eq!(decode::<VolumeRecord>(golden).unwrap(), volume());
        assert_eq!(encode(&volume()).unwrap(), golden);
    }

    #[test]
    fn fields_of_a_newer_program_are_ignored_and_reported() {
        let now = text_of(&copying_to(target()));
        let is_known = |bytes: &[u8]| is_fully_known(&decode::<JobRecord>(bytes).unwrap(), bytes);
        for (before, after) in [
            ("\"job\":", "\"new\":{\"a\":[1]},\"job\":"),
            ("\"origin_path\":", "\"new\":0,\"origin_path\":"),
            ("\"inode\":", "\"new\":null,\"inode\":"),
            ("\"size_bytes\":", "\"new\":\"\",\"size_bytes\":"),
        ] {
            assert!(now.contains(before));
            let newer = sealed("job", &now.replacen(before, after, 1));
            assert_eq!(decode::<JobRecord>(&newer).unwrap(), copying_to(target()), "{after}");
            assert!(!is_known(&newer), "{after}");
        }
        assert!(is_known(&sealed("job", &now)));
        assert!(is_known(include_bytes!("golden/job-copy-v1.json")));
        let volume = sealed("volume", &text_of(&volume()).replacen('{', "{\"new\":1,", 1));
        assert_eq!(decode::<VolumeRecord>(&volume).unwrap(), self::volume());
        // A field that version 1 has had from the beginning is always present.
        assert!(decode::<JobRecord>(&sealed("job", &now.replacen("\"process\":4711,", "", 1))).is_err());
    }

    /// The second line of a record.
    fn text_of<R: Record>(record: &R) -> String {
        let text = String::from_utf8(encode(record).unwrap()).unwrap();
        text.lines().nth(1).unwrap().to_owned()
    }

    fn sealed(kind: &str, body: &str) -> Vec<u8> {
        let head = format!("tidemark-{kind} 1\n{body}\n");
        let sum = crc32c_salted(kind.as_bytes(), head.as_bytes());
        format!("{head}crc32c {sum:08x}\n").into_bytes()
    }

    #[test]
    fn every_changed_byte_and_every_truncation_is_detected() {
        let good = encode(&copying_to(target())).unwrap();
        for at in 0..good.len() {
            for flip in [0x01, 0x20, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= flip;
                assert!(decode::<JobRecord>(&bad).is_err(), "byte {at} xor {flip:#x}");
            }
            assert!(decode::<JobRecord>(&good[..at]).is_err(), "cut at {at}");
        }
        assert!(decode::<VolumeRecord>(&good).is_err(), "one kind does not pass for another");
        let mut longer = good;
        longer.push(b'\n');
        assert!(decode::<JobRecord>(&longer).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<JobRecord>(&bytes);
            let _ = decode::<VolumeRecord>(&bytes);
        }

        #[test]
        fn any_text_round_trips(name in "\\PC{0,60}", device in any::<String>(), size_bytes: u64) {
            let record = VolumeRecord { name, device, size_bytes, ..volume() };
            prop_assert_eq!(decode::<VolumeRecord>(&encode(&record).unwrap()).unwrap(), record);
        }
    }
}
