//! Resolves the name of a target on the command line, and finds what would be lost there and which job uses it.
//!
//! Changes nothing. The [`secondary`](crate::secondary) itself refuses targets that are in use.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use serde::Serialize;

use super::attach::recorded_volumes;
use crate::base::{Bytes, Error, ErrorKind, Result, directory_of};
use crate::format::state::{DeviceRecord, JobRecord};
use crate::job::{list_jobs, partials};
use crate::secondary::partial::{is_partial_of, resolve};
use crate::sys::privilege::is_root;
use crate::topology::{Topology, device_number};
use crate::volume;

/// Facts about a target for a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TargetFacts {
    /// What would be lost, in words; None if nothing.
    pub overwrites: Option<String>,
    /// Problems that are no reason to refuse.
    pub warnings: Vec<String>,
    /// The device and those below it; empty for anything else.
    #[serde(skip)]
    devices: Vec<DeviceRecord>,
}

impl TargetFacts {
    /// Examines `path`, to which at most `size` bytes are to be written.
    #[must_use]
    pub fn of(path: &Path, size: Option<Bytes>) -> Self {
        Self {
            overwrites: overwritten(path),
            warnings: size.and_then(|size| space_warning(path, size)).into_iter().collect(),
            devices: devices_of(path),
        }
    }

    /// Of a target that is examined elsewhere.
    #[must_use]
    pub fn overwriting(overwrites: Option<String>) -> Self {
        Self { overwrites, ..Self::default() }
    }

    /// Checks that the device at `path` is still the one for which consent was given: another one may have got its name
    /// while the command waited. To be called when it is open.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if it is not.
    pub fn check_same(&self, path: &Path) -> Result<()> {
        if self.devices.is_empty() || devices_of(path) == self.devices {
            return Ok(());
        }
        Err(Error::refused(format!("{} is not the device any more that it was", path.display()))
            .state("nothing was written to it")
            .next("look at what it is now (lsblk), and run the command again"))
    }
}

/// The device at `path` and those below it; empty for anything else.
fn devices_of(path: &Path) -> Vec<DeviceRecord> {
    let number = device_number(path).ok().flatten();
    number.map(|number| Topology::default().identities(number)).unwrap_or_default()
}

/// The path of the target that `typed` names. As for an origin, a plain word names a device in /dev/mapper if there is
/// one, otherwise a file.
///
/// # Errors
/// [`ErrorKind::Refused`] if the name is ambiguous, or is that of a volume that is not attached now.
pub fn named(typed: &Path) -> Result<PathBuf> {
    let path = volume::find_or_new(typed)?;
    if path.exists() || !volume::is_word(&path) {
        return Ok(path);
    }
    let is_it = |name: &str| path.as_os_str() == name;
    // A user who may not read the records cannot attach volumes either.
    let recorded = recorded_volumes().unwrap_or_default();
    if recorded.iter().flatten().any(|volume| is_it(&volume.name)) {
        let name = path.display();
        return Err(Error::refused(format!("{name} is a volume that is not attached"))
            .state("nothing was changed")
            .next(format!("attach it ('tidemark status' names its device), or write ./{name} for a file")));
    }
    Ok(path)
}

/// What writing to `target` would destroy. If it cannot be examined, the operation itself reports the error in more
/// detail.
fn overwritten(target: &Path) -> Option<String> {
    let kind = fs::metadata(target).ok()?.file_type();
    if kind.is_block_device() {
        Some(format!("everything on the device {} will be overwritten", target.display()))
    } else {
        kind.is_file().then(|| format!("the file {} will be replaced", target.display()))
    }
}

/// Warns instead of refusing, because zeros need no space in a file.
fn space_warning(target: &Path, size: Bytes) -> Option<String> {
    if matches!(device_number(target), Ok(Some(_))) {
        return None;
    }
    let directory = directory_of(target);
    let room = statvfs(directory).ok()?;
    let room = Bytes(room.blocks_available().saturating_mul(room.fragment_size()));
    (room < size).then(|| {
        format!(
            "{} has {room} of free space; up to {size} are needed, less if the origin holds zeros",
            directory.display()
        )
    })
}

/// Prefixes a refusal of `target` with the job that uses it.
#[must_use]
pub fn naming_job(error: Error, target: &Path) -> Error {
    if error.kind() != ErrorKind::Refused || !is_root() {
        return error;
    }
    let topology = Topology::default();
    let full = resolve(target).unwrap_or_else(|_| target.to_owned());
    let has_it = |record: &JobRecord| {
        partials(record).any(|partial| is_partial_of(partial, &full))
            || topology.is_writing(record.process, target)
    };
    let jobs = list_jobs().unwrap_or_default();
    let holder = jobs.into_iter().filter(|job| job.alive).find_map(|job| {
        let record = job.record.ok()?;
        has_it(&record).then_some((job.id, record.process))
    });
    match holder {
        None => error,
        Some((job, process)) => error
            .context(format!("job {job} (process {process}) is writing it"))
            .next("wait for the job ('tidemark status --watch'), or name another target"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_and_devices_are_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("f");
        assert_eq!(overwritten(&file), None);
        assert_eq!(overwritten(directory.path()), None);
        fs::write(&file, b"x").unwrap();
        assert!(overwritten(&file).unwrap().contains("replaced"));
        assert_eq!(TargetFacts::of(&file, Some(Bytes(1))).warnings, [""; 0]);
        let warnings = TargetFacts::of(&file, Some(Bytes(u64::MAX))).warnings;
        assert!(warnings[0].contains("of free space"), "{warnings:?}");
    }

    #[test]
    fn a_word_is_a_file_where_no_device_has_the_name() {
        for typed in ["no-such-device.tdm", "./x", "/tmp/x"] {
            assert_eq!(named(Path::new(typed)).unwrap(), Path::new(typed));
        }
    }
}
