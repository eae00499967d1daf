//! Resolves what the user typed to an origin that can be copied, or to a refusal that names an alternative.
//!
//! Read-only: changes nothing, and opens a device only to find out whether it is in use.
//!
//! | origin | how it is copied |
//! |---|---|
//! | an attached volume, or another device of linear and striped targets in use | live: a stack is inserted |
//! | a kept snapshot | nothing is inserted, as it never changes |
//! | a device or file that no process has open for writing | cold: nothing is inserted |
//! | anything else | refused |

pub mod free;
mod layers;
pub mod lvm_lock;
mod mounts;
mod shared;
pub mod subset;
pub mod waits;

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::base::{Bytes, DeviceNumber, Error, Result, ResultExt as _, escape};
use crate::dm::naming::{ROLE_CLONE, ROLE_SNAPSHOT, ROLE_VOLUME};
use crate::dm::{DeviceIdentity, Dm, Slot, Target};
use crate::topology::{Topology, User, check_answers, device_number};

pub use mounts::{FreezeSet, filesystems_on, open_in_other_namespace};

/// What an origin is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum OriginKind {
    /// A device-mapper device of linear and striped targets, in use or not: a stack can be inserted.
    Live {
        /// Its device-mapper name.
        name: String,
        /// True for a volume created by `tidemark attach`.
        attached: bool,
    },
    /// The device of a kept snapshot, which never changes.
    Snapshot {
        /// The snapshot's id.
        id: String,
    },
    /// A block device that is not in use.
    ColdDevice,
    /// A regular file that is not being written.
    ColdFile,
}

impl fmt::Display for OriginKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Live { name, attached: true } => write!(f, "attached volume {name}"),
            Self::Live { name, attached: false } => write!(f, "device-mapper device {name}"),
            Self::Snapshot { .. } => f.write_str("kept snapshot"),
            Self::ColdDevice => f.write_str("block device that is not in use"),
            Self::ColdFile => f.write_str("regular file"),
        }
    }
}

/// An origin that can be copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Origin {
    /// The path of the device or file, by a name that users know.
    pub path: PathBuf,
    /// What it is.
    pub kind: OriginKind,
    /// Its number, for a device.
    pub number: Option<DeviceNumber>,
    /// Size in bytes.
    pub size: Bytes,
    /// One mount point of each filesystem mounted from it, in the order of freezing.
    #[serde(serialize_with = "escape::paths")]
    pub filesystems: Vec<PathBuf>,
    /// Its own filesystem, if any, is not in that list: the suspension must freeze it through the device.
    pub lock_filesystem: bool,
    /// Filesystems on it that are not frozen, and why; as text.
    pub not_frozen: Vec<String>,
    /// Notes for the user about how it will be held.
    pub notes: Vec<String>,
    /// The filesystems on it, as found.
    #[serde(skip)]
    pub frozen: FreezeSet,
}

impl Origin {
    /// The name that users know: the volume's, else the last component of its path.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.kind {
            OriginKind::Live { name, .. } => name.clone(),
            _ => self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        }
    }
}

/// Resolves `typed`: the name of a volume, a device, or a regular file.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it cannot be copied, with the reason and an
/// alternative; I/O and kernel errors.
pub fn resolve(typed: &Path) -> Result<Origin> {
    let path = find(typed)?;
    let meta = fs::metadata(&path).io_context(|| format!("examining {}", path.display()))?;
    if meta.is_file() {
        return cold_file(path, &meta);
    }
    if !meta.file_type().is_block_device() {
        return Err(Error::refused(format!(
            "{} is neither a block device nor a regular file",
            path.display()
        ))
        .next("name a volume, a block device or a regular file"));
    }
    let number = DeviceNumber::from_dev(meta.rdev());
    let topology = Topology::default();
    if is_device_mapper(number) {
        device_mapper(path, number, &topology)
    } else {
        plain_device(path, number, &topology)
    }
}

/// The path as typed, or the device of that name below /dev/mapper.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it may be either, I/O errors if it is neither.
pub fn find(typed: &Path) -> Result<PathBuf> {
    let path = find_or_new(typed)?;
    match fs::metadata(&path) {
        Ok(_) => Ok(path),
        Err(cause) => Err(Error::io(format!("examining {}", typed.display()), cause)
            .next("name a volume (see 'tidemark status'), a block device or a regular file")),
    }
}

/// As [`find`], for a name that may be that of a file to be created.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it is both a file and a device, or does not
/// answer.
pub fn find_or_new(typed: &Path) -> Result<PathBuf> {
    check_answers(typed)?;
    // "./data" is a path; "data" may be either.
    let volume = Path::new("/dev/mapper").join(typed);
    if !is_word(typed) || !matches!(device_number(&volume), Ok(Some(_))) {
        return Ok(typed.to_owned());
    }
    if typed.exists() {
        return Err(Error::refused(format!(
            "'{}' is both a file here and the device {}",
            typed.display(),
            volume.display()
        ))
        .state("nothing was changed")
        .next(format!("write ./{} or {}", typed.display(), volume.display())));
    }
    Ok(volume)
}

/// True for a name without a directory, which may be a volume's.
#[must_use]
pub fn is_word(typed: &Path) -> bool {
    typed.parent() == Some(Path::new(""))
}

fn cold_file(path: PathBuf, meta: &fs::Metadata) -> Result<Origin> {
    let topology = Topology::default();
    let view = topology.own_view()?;
    let swapped = topology.swaps()?.into_iter().any(|swap| {
        let own = (DeviceNumber::from_dev(meta.dev()), meta.ino());
        view.stat(&swap).is_ok_and(|swap| (swap.dev, swap.inode) == own)
    });
    if swapped {
        return Err(Error::refused(format!("{} is swap space", path.display()))
            .next(format!("swapoff {} first", path.display())));
    }
    if has_writers(&path)? {
        return Err(Error::refused(format!("{} is open for writing", path.display()))
            .state("nothing was changed")
            .next(
                "stop its writers (fuser shows them); copy a disk image in use through the device that uses \
                 it",
            ));
    }
    Ok(Origin {
        path,
        kind: OriginKind::ColdFile,
        number: None,
        size: Bytes(meta.len()),
        filesystems: Vec::new(),
        lock_filesystem: false,
        not_frozen: Vec::new(),
        notes: Vec::new(),
        frozen: FreezeSet::default(),
    })
}

/// Requests a read lease, which the kernel refuses while the file is open for writing (fcntl(2), F_SETLEASE).
/// If leases are not available (another user's file, another kind of filesystem), the file counts as not
/// open, and the comparison of before and after the copy decides.
fn has_writers(path: &Path) -> Result<bool> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .io_context(|| format!("opening {}", path.display()))?;
    Ok(crate::sys::block::is_open_for_writing(&file))
}

fn is_device_mapper(number: DeviceNumber) -> bool {
    Path::new(&format!("/sys/dev/block/{number}/dm")).exists()
}

fn device_mapper(path: PathBuf, number: DeviceNumber, topology: &Topology) -> Result<Origin> {
    let dm = Dm::open()?;
    let name = dm.name_of(number)?.ok_or_else(|| {
        Error::refused(format!("{} no longer exists", path.display())).next("check 'dmsetup ls'")
    })?;
    let info = dm.info_of(&name)?;
    let uuid = info.uuid.as_str();
    let identity = DeviceIdentity::parse(uuid);
    let attached = identity.as_ref().is_some_and(|it| it.role == ROLE_VOLUME);
    if let Some(snapshot) = identity.as_ref().filter(|it| it.role == ROLE_SNAPSHOT) {
        return kept_snapshot(path, number, &dm, snapshot);
    }
    if let Some(internal) = identity.as_ref().filter(|_| !attached) {
        return Err(internal_device(&path, internal));
    }
    if dm.stack_under(&name)?.is_some() {
        return Err(Error::refused(format!("{} is being copied, or a copy of it has died", path.display()))
            .state("nothing was changed")
            .next(
                "wait for the copy in progress ('tidemark status'); if it died: 'tidemark \
                 resume' completes it, 'tidemark recover' undoes it",
            ));
    }
    shared::refuse_shared(&dm, &info)?;
    let table = dm.table(&name, Slot::Active)?.ok_or_else(|| {
        Error::refused(format!("{name} has no table")).next("activate the device, then copy it")
    })?;
    let refusal = table.lines().iter().find_map(|line| refuse_target(&path, &line.target).err());
    if let Some(refusal) = refusal {
        // At rest it needs no stack. The origin of a snapshot does not count as at rest, as the snapshot may
        // be in use.
        let has_snapshot = table.lines().iter().any(|line| line.target.kind() == "snapshot-origin");
        return if info.open_count == 0 && !has_snapshot {
            plain_device(path, number, topology)
        } else {
            Err(refusal)
        };
    }
    if info.read_only {
        return plain_device(path, number, topology);
    }
    let held = filesystems_on(&[number], topology)?;
    if topology.is_dax(number) && held.points.is_empty() {
        // At rest it needs no stack. If it is mounted out of reach, it is in use, and opening it fails.
        return plain_device(path, number, topology);
    }
    if topology.is_dax(number) {
        return Err(Error::refused(format!(
            "{} is memory that programs map directly (DAX): their stores bypass the block layer",
            path.display()
        ))
        .state("nothing was changed")
        .next("unmount it, then copy it"));
    }
    let mut notes = held.notes.clone();
    notes.extend(atomic_writes(&path, number, topology));
    Ok(Origin {
        kind: OriginKind::Live { name, attached },
        number: Some(number),
        size: table.length().bytes(),
        filesystems: held.points.clone(),
        lock_filesystem: held.frozen_by_suspension.contains(&number),
        not_frozen: held.not_frozen.clone(),
        notes,
        frozen: held,
        path,
    })
}

/// The refusal for a device that Tidemark made, and that is no volume.
fn internal_device(path: &Path, identity: &DeviceIdentity) -> Error {
    let shown = path.display();
    if identity.role == ROLE_CLONE {
        return Error::refused(format!("{shown} is a clone of a kept snapshot"))
            .state("nothing was changed")
            .next("copy the snapshot itself; a clone that was written can be read with other tools");
    }
    Error::refused(format!("{shown} is a device that Tidemark created for a copy"))
        .next("copy the volume itself; 'tidemark status' names it, 'tidemark recover' removes leftovers")
}

/// The device of a kept snapshot: it is read-only, so it may be mounted meanwhile.
fn kept_snapshot(path: PathBuf, number: DeviceNumber, dm: &Dm, identity: &DeviceIdentity) -> Result<Origin> {
    let table = dm.table(number, Slot::Active)?.ok_or_else(|| {
        Error::refused(format!("{} has no table", path.display()))
            .next("'tidemark snapshot list' shows its state")
    })?;
    Ok(Origin {
        kind: OriginKind::Snapshot { id: identity.id.clone() },
        size: table.length().bytes(),
        ..cold_device(path, number)
    })
}

/// A warning if the origin supports atomic writes.
fn atomic_writes(path: &Path, number: DeviceNumber, topology: &Topology) -> Option<String> {
    (topology.atomic_write_bytes(number) > 0).then(|| {
        format!(
            "{} supports atomic writes (RWF_ATOMIC), but not while it is copied: a program that relies on them (a \
             database without double writes) gets errors",
            path.display()
        )
    })
}

/// The list of supported targets: those without state beyond their table.
fn refuse_target(path: &Path, target: &Target) -> Result<()> {
    // One path: a volume leads so past its snapshots where all of them leave something out.
    if matches!(target, Target::Switch { .. }) {
        return Ok(());
    }
    let kind = target.kind();
    let instead = match kind {
        "linear" | "striped" => return Ok(()),
        "snapshot-origin" => "it has a snapshot already: copy that, or remove it",
        "snapshot" | "snapshot-merge" => "copy the snapshot's origin, or deactivate the snapshot first",
        "thin" => "a thin volume has snapshots of its own: take one (lvcreate -s) and copy that, unmounted",
        "thin-pool" => "copy its thin volumes, not the pool",
        "cache" | "writecache" | "era" | "clone" => {
            "its table does not hold all of its state: flush and split it (lvconvert --splitcache), or copy the \
             device above a linear volume"
        }
        "crypt" => "its key cannot be read back: attach or copy the encrypted device beneath it",
        "raid" | "mirror" => "copy it unmounted, or convert it to a linear volume",
        "multipath" => {
            "multipathd replaces its table whenever paths come or go: copy the LVM volume or the partition \
             on it; if a filesystem is directly on it, make it a volume, which needs one remount (umount, \
             'tidemark attach', mount /dev/mapper/NAME)"
        }
        "integrity" | "verity" => "copy the device beneath it, unmounted",
        _ => "only devices of linear and striped targets can be copied while they are in use",
    };
    Err(Error::refused(format!(
        "{} has a '{kind}' target, under which Tidemark cannot insert a snapshot",
        path.display()
    ))
    .state("nothing was changed")
    .next(instead))
}

fn plain_device(path: PathBuf, number: DeviceNumber, topology: &Topology) -> Result<Origin> {
    topology.check_loops_answer(number, &path)?;
    refuse_use(&path, number, topology)?;
    for other in topology.other_paths(number) {
        refuse_use(Path::new(&topology.name(other)), other, topology).map_err(|error| {
            error.context(format!("{} is another path to a disk that is in use", path.display()))
        })?;
    }
    if let Some(user) = topology.user_of(&path)?.filter(User::writes) {
        return Err(Error::refused(format!("{} is {user}", path.display()))
            .state("nothing was changed")
            .next(format!(
                "{}; to copy the device while it is in use, attach it as a volume first",
                user.remedy()
            )));
    }
    let mut file =
        OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&path).map_err(
            |error| match error.raw_os_error() {
                Some(libc::EBUSY) => Error::refused(format!("{} is in use", path.display()))
                    .with_source(error)
                    .state("nothing was changed")
                    .next("find its users with lsblk and fuser; stop them, then attach it as a volume"),
                Some(libc::EACCES | libc::EPERM) => {
                    Error::refused(format!("{} cannot be opened", path.display()))
                        .with_source(error)
                        .next("copying a device needs root: run it again with sudo")
                }
                _ => Error::io(format!("opening {}", path.display()), error),
            },
        )?;
    let size =
        file.seek(SeekFrom::End(0)).io_context(|| format!("finding the size of {}", path.display()))?;
    Ok(Origin { size: Bytes(size), ..cold_device(path, number) })
}

/// A device that is not held, of no size.
fn cold_device(path: PathBuf, number: DeviceNumber) -> Origin {
    Origin {
        path,
        kind: OriginKind::ColdDevice,
        number: Some(number),
        size: Bytes::ZERO,
        filesystems: Vec::new(),
        lock_filesystem: false,
        not_frozen: Vec::new(),
        notes: Vec::new(),
        frozen: FreezeSet::default(),
    }
}

/// Refuses a device in use that is no volume. Names its user, and how to make it a volume.
fn refuse_use(path: &Path, number: DeviceNumber, topology: &Topology) -> Result<()> {
    let shown = path.display();
    let mounts = topology.mounts()?;
    let on = |device| mounts.iter().find(|mount| mount.is_of(device));
    if let Some(mount) = on(number) {
        let point = mount.point.display();
        return Err(Error::refused(format!("{shown} is mounted (at {point}) and is not a volume"))
            .state("nothing was changed")
            .next(format!(
                "make it one, which needs one remount: umount {point}; tidemark attach {shown} --name NAME; \
                 mount /dev/mapper/NAME {point}; then copy NAME"
            )));
    }
    for part in topology.partitions(number) {
        if let Some(mount) = on(part) {
            return Err(Error::refused(format!(
                "{shown} has the partition {}, mounted at {}: a disk with mounted partitions cannot be copied whole",
                topology.name(part),
                mount.point.display()
            ))
            .state("nothing was changed")
            .next(format!(
                "copy the partition instead: tidemark attach {} --name NAME (unmounted)",
                topology.name(part)
            )));
        }
    }
    for device in topology.above(number) {
        if device != number && topology.holders(device).is_empty() && is_device_mapper(device) {
            return Err(Error::refused(format!("{shown} is in use by {}", topology.name(device)))
                .state("nothing was changed")
                .next(format!("copy {} instead, which may be in use", topology.name(device))));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::base::ErrorKind;

    #[test]
    fn a_file_at_rest_is_an_origin() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 1000]).unwrap();
        let path = file.path().to_owned();
        let keep = file.into_temp_path();
        let origin = resolve(&path).unwrap();
        assert_eq!((origin.kind, origin.size), (OriginKind::ColdFile, Bytes(1000)));
        drop(keep);
    }

    #[test]
    fn a_file_being_written_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = resolve(file.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("open for writing"), "{error}");
    }

    #[test]
    fn what_is_neither_device_nor_file_is_refused() {
        assert_eq!(resolve(Path::new("/dev/null")).unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!(resolve(Path::new("/proc")).unwrap_err().kind(), ErrorKind::Refused);
        let missing = resolve(Path::new("/nowhere/at-all")).unwrap_err();
        assert_eq!((missing.kind(), missing.errno()), (ErrorKind::Io, Some(libc::ENOENT)));
    }

    #[test]
    fn stateful_targets_are_refused_by_name() {
        for kind in [
            "thin",
            "thin-pool",
            "cache",
            "writecache",
            "era",
            "crypt",
            "raid",
            "mirror",
            "integrity",
            "snapshot",
            "snapshot-origin",
            "multipath",
            "zero",
            "flakey",
        ] {
            let error = refuse_target(Path::new("/dev/x"), &Target::parse(kind, "")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.to_string().contains(&format!("'{kind}'")), "{error}");
            assert!(error.next_step().is_some());
        }
    }
}
