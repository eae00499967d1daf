//! `tidemark attach`: makes a volume, /dev/mapper/NAME, of a raw device, to be mounted from then on.
//!
//! The volume is one linear target that covers the whole device at the same offsets, so it can be detached at any time
//! and the device mounted directly again. The order is safe against crashes:
//! 1. The record is written and synced under /var/lib/tidemark/volumes.
//! 2. The device is created.
//!
//! A crash between the two leaves a record without a device. Attaching again replaces it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt, Sectors, clock};
use crate::dm::naming::ROLE_VOLUME;
use crate::dm::{DeviceIdentity, Dm, Table, Target, Udev, node};
use crate::format::state::VolumeRecord;
use crate::topology::Topology;
use crate::volume::{self, OriginKind};

use super::snapshot::link;
use super::unit;
use crate::job::Job;
use crate::record;
use crate::sys::privilege;

/// The directory of volume records.
pub const VOLUME_DIR: &str = "/var/lib/tidemark/volumes";
/// Maximum length of a volume's name: with the suffixes of a stack ("#preserve") it fits the kernel's 127 bytes.
const NAME_BYTES_MAX: usize = 64;

/// The result of attaching.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Attached {
    /// The volume's name.
    pub name: String,
    /// /dev/mapper/NAME.
    pub path: PathBuf,
    /// The device below, by a persistent path.
    pub device: PathBuf,
    /// Its size.
    pub size: Bytes,
    /// A line for /etc/fstab, if the filesystem is known.
    pub fstab: String,
    /// The systemd unit that was written.
    pub unit: Option<PathBuf>,
    /// What the user should do next, one command per line.
    pub next: Vec<String>,
}

/// Attaches `device` as the volume `name`. Succeeds if it is already attached so.
///
/// # Errors
/// [`ErrorKind::Refused`] for a device that is in use or not a whole number of sectors, or a name that is taken;
/// [`ErrorKind::Usage`] for a bad name; errors of the kernel.
pub fn attach(device: &Path, name: &str, install_unit: bool) -> Result<Attached> {
    privilege::require_root("attaching a device")?;
    check_name(name)?;
    let meta = fs::metadata(device).io_context(|| format!("examining {}", device.display()))?;
    if !meta.file_type().is_block_device() {
        return Err(Error::usage(format!("{} is not a block device", device.display()))
            .next("a regular file does not have to be attached: copy it directly"));
    }
    let number = DeviceNumber::from_dev(meta.rdev());
    let dm = Dm::open()?;
    let stable = stable_path(device, number);
    if let Some(info) = dm.info(name)? {
        let table = dm.table(name, crate::dm::Slot::Active)?;
        let is_below = |table: Table| table.maps_to(number) || link::leads_to(&dm, name, &table, number);
        let is_it = DeviceIdentity::parse(&info.uuid).is_some_and(|it| it.role == ROLE_VOLUME)
            && table.is_some_and(is_below);
        if is_it {
            return finish(name, &stable, Bytes(size_of(&info.number)?), install_unit);
        }
        return Err(Error::refused(format!("a device-mapper device {name} exists already"))
            .state("nothing was changed")
            .next("choose another --name"));
    }
    // A detach that was killed leaves the layers of its snapshots, which hold the device.
    let is_held = link::is_held_by_layers(&dm, name, number)?;
    if !is_held {
        refuse(device, number)?;
    }
    let size = create(&dm, name, (number, is_held), &stable)?;
    finish(name, &stable, size, install_unit)
}

/// Creates record and device.
fn create(dm: &Dm, name: &str, device: (DeviceNumber, bool), stable: &Path) -> Result<Bytes> {
    // The volume has the job's id: while the job is alive, recover does not touch the unfinished volume.
    let job = Job::begin("attach")?;
    let id = job.id().to_owned();
    let result = create_as(dm, name, device, stable, &id);
    job.conclude(result)
}

fn create_as(
    dm: &Dm,
    name: &str,
    (number, is_held): (DeviceNumber, bool),
    stable: &Path,
    id: &str,
) -> Result<Bytes> {
    // Held until the device is created, so that the raw device is not mounted meanwhile.
    let exclusive = if is_held { None } else { Some(dm.open_device(number, false, libc::O_EXCL)?) };
    let size = Bytes(size_of(&number)?);
    let record = VolumeRecord {
        name: name.to_owned(),
        id: id.to_owned(),
        device: stable.display().to_string(),
        size_bytes: size.get(),
        attached_utc_ns: clock::utc_now_ns(),
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(VOLUME_DIR)
        .io_context(|| format!("making the directory {VOLUME_DIR}"))?;
    record::write(&record_path(name), &record)?;
    let own = Table::single(
        size.to_sectors("the device")?,
        Target::Linear { device: number, offset: Sectors::ZERO },
    )?;
    let uuid = DeviceIdentity::new(name, ROLE_VOLUME, id).uuid();
    // device-mapper itself opens the device exclusively.
    drop(exclusive);
    let table = match link::assemble(dm, name, stable, &own) {
        Ok(table) => table.unwrap_or(own),
        Err(error) => return Err(error.after_undo(forget(name))),
    };
    dm.create_active(name, &uuid, &table, Udev::Public).map_err(|error| match forget(name) {
        Ok(()) => error.state("nothing was changed"),
        Err(undo) => error.with_failed_undo(undo),
    })?;
    Ok(size)
}

fn finish(name: &str, stable: &Path, size: Bytes, install_unit: bool) -> Result<Attached> {
    let path = node::mapper_path(name);
    let mut next = vec![format!("mount {} MOUNT-POINT", path.display())];
    let unit = if install_unit {
        let unit = unit::write_volume(name, stable, &[])?;
        next.push(format!("systemctl daemon-reload && systemctl enable {}", unit::volume_unit(name)));
        Some(unit)
    } else {
        None
    };
    let fstab = format!(
        "{} MOUNT-POINT auto defaults,x-systemd.requires={} 0 2",
        path.display(),
        unit::volume_unit(name)
    );
    next.push(format!("in /etc/fstab, replace the device's line by: {fstab}"));
    Ok(Attached { name: name.to_owned(), path, device: stable.to_owned(), size, fstab, unit, next })
}

/// Allows letters, digits and `_.-`, with no dot or dash first.
///
/// # Errors
/// [`ErrorKind::Usage`] for any other name.
pub fn check_name(name: &str) -> Result<()> {
    let bad = |why: &str| {
        Err(Error::usage(format!("'{name}' cannot be a volume's name: {why}"))
            .next("use letters, digits, '_', '.' and '-', such as --name data"))
    };
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return bad(&format!("it must have 1 to {NAME_BYTES_MAX} characters"));
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte)) {
        return bad("it has other characters than letters, digits, '_', '.' and '-'");
    }
    if name.starts_with(['.', '-']) || name == "control" {
        return bad("it begins with '.' or '-', or is 'control'");
    }
    Ok(())
}

/// Refuses a device that is in use.
fn refuse(device: &Path, number: DeviceNumber) -> Result<()> {
    let topology = Topology::default();
    if topology.is_read_only(number) {
        return Err(Error::refused(format!("{} is read-only", device.display()))
            .next("copy it without attaching it, or make it writable (blockdev --setrw)"));
    }
    match volume::resolve(device) {
        Ok(origin) => match origin.kind {
            OriginKind::ColdDevice => Ok(()),
            OriginKind::Live { .. } => Err(Error::refused(format!(
                "{} is a device-mapper device and does not have to be attached",
                device.display()
            ))
            .state("nothing was changed")
            .next(format!("copy it directly: tidemark copy {} SECONDARY", device.display()))),
            OriginKind::Snapshot { .. } => {
                Err(Error::refused(format!("{} is a kept snapshot, which is read-only", device.display()))
                    .state("nothing was changed")
                    .next("make a clone of it: 'tidemark snapshot clone'"))
            }
            OriginKind::ColdFile => Err(Error::usage(format!("{} is not a block device", device.display()))),
        },
        Err(error) if error.kind() == ErrorKind::Refused => {
            Err(error.context(format!("attaching {}", device.display())))
        }
        Err(error) => Err(error),
    }
}

fn size_of(number: &DeviceNumber) -> Result<u64> {
    let path = format!("/sys/dev/block/{number}/size");
    let text = fs::read_to_string(&path).io_context(|| format!("reading {path}"))?;
    text.trim()
        .parse()
        .ok()
        .and_then(|sectors| Sectors(sectors).checked_bytes())
        .map(Bytes::get)
        .ok_or_else(|| Error::bad_data(format!("{path} contains '{}'", text.trim())))
}

/// The first udev link to the device that does not depend on the order in which devices were found; without one, the
/// given path.
fn stable_path(device: &Path, number: DeviceNumber) -> PathBuf {
    for directory in ["/dev/disk/by-id", "/dev/disk/by-partuuid", "/dev/disk/by-path"] {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        let mut links: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| node::is_node_of(path, number))
            .collect();
        links.sort();
        if let Some(link) = links.into_iter().next() {
            return link;
        }
    }
    fs::canonicalize(device).unwrap_or_else(|_| device.to_owned())
}

/// The path of the record of volume `name`.
#[must_use]
pub fn record_path(name: &str) -> PathBuf {
    Path::new(VOLUME_DIR).join(format!("{name}.json"))
}

/// All recorded volumes by name; a record that cannot be read gives an error among the others.
///
/// # Errors
/// I/O errors of reading the directory.
pub fn recorded_volumes() -> Result<Vec<Result<VolumeRecord>>> {
    let entries = match fs::read_dir(VOLUME_DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).io_context(|| format!("reading {VOLUME_DIR}")),
    };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    paths.sort();
    Ok(paths.iter().map(|path| record::read(path)).collect())
}

/// Removes the record of a volume, if there is one.
pub(super) fn forget(name: &str) -> Result<()> {
    let path = record_path(name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).io_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["data", "a", "my-vol_1.x", "0"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "x".repeat(65);
        for bad in ["", ".", "-x", "a/b", "a b", "control", "ä", "a\n", long.as_str()] {
            assert_eq!(check_name(bad).unwrap_err().kind(), ErrorKind::Usage, "{bad}");
        }
    }
}
