//! Locks lvm2 out of a volume group while the table of one of its volumes is changed.
//!
//! Each lvm2 command that changes a volume group holds an exclusive lock on a file of the group, from before
//! it reads the metadata until it has resumed the last table. Commands that only read hold a shared lock
//! (`flock`; lvm2 `lib/locking/file_locking.c` and `lib/misc/lvm-flock.c`). So the holder of a shared lock
//! sees a group that is not being changed, and a command that would change it waits until the lock is
//! released.
//!
//! A second file (`:aux`) is locked first by every process, and a writer keeps it while it waits. So we wait
//! for writers, as lvm2's own readers do. lvm2 removes both files when it releases the lock, so a lock is
//! valid only if the file still has its name.
//!
//! Not detected: commands without locking (`--nolocking`), with another `locking_dir`, in another mount
//! namespace, or on other hosts of a shared group.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::clock::Stopwatch;
use crate::base::{DeviceNumber, Error, Result, ResultExt as _};
use crate::dm::{DeviceInfo, Dm};
use crate::sys::lock::{LockedFile, is_named, try_lock, try_lock_shared};
use crate::sys::process::crash_point;

/// lvm2's default for `global/locking_dir`.
const LOCKING_DIR: &str = "/run/lock/lvm";

/// Prefix of the UUIDs of lvm2's devices.
const LVM_UUID_PREFIX: &str = "LVM-";

/// Longest wait for a command of lvm2.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// Attempts to lock a file that is removed each time before we have the lock.
const LOCK_RETRIES_MAX: u32 = 100;

/// How long lvm2 is locked out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LvmScope {
    /// While the origin's table is being changed.
    #[default]
    Change,
    /// From before the instant until the origin has its own table again. A command that would change the
    /// group waits that long, and so does every later command that only reads, as lvm2 lets no reader pass a
    /// waiting writer.
    Copy,
}

/// Keeps a volume group unchanged as long as this value lives. Empty for a device that is not lvm2's.
#[derive(Debug)]
pub struct LvmLock {
    _held: Option<Held>,
}

#[derive(Debug)]
struct Held {
    file: Option<LockedFile>,
    path: PathBuf,
}

impl LvmLock {
    /// Locks the volume group of `device`; None if a command of lvm2 is changing it, or waits to do so.
    ///
    /// # Errors
    /// I/O errors of the lock's files; the kernel's.
    pub fn try_hold(dm: &Dm, device: DeviceNumber) -> Result<Option<Self>> {
        try_hold_of(Path::new(LOCKING_DIR), &|| dm.info(device))
    }

    /// Locks the volume groups of all `devices`, each once: a second lock would wait for a writer that waits for the
    /// first one. In the order of the groups' names, as lvm2 does. Returns the lock of each device, in their order.
    ///
    /// # Errors
    /// As [`LvmLock::hold`].
    pub fn hold_all(
        dm: &Dm,
        devices: &[DeviceNumber],
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Vec<Arc<Self>>> {
        let group = |device: &DeviceNumber| Ok(dm.info(*device)?.as_ref().and_then(volume_group));
        let groups = devices.iter().map(group).collect::<Result<Vec<Option<String>>>>()?;
        let mut locks = BTreeMap::new();
        let first_of_each: BTreeMap<&Option<String>, &DeviceNumber> = groups.iter().zip(devices).collect();
        for (group, device) in first_of_each {
            locks.insert(group, Arc::new(Self::hold(dm, *device, interrupt)?));
        }
        Ok(groups.iter().map(|group| Arc::clone(&locks[group])).collect())
    }

    /// As [`LvmLock::try_hold`], but waits up to 60 s for lvm2.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) after that; I/O errors, the kernel's, `interrupt`'s.
    pub fn hold(dm: &Dm, device: DeviceNumber, interrupt: &dyn Fn() -> Result<()>) -> Result<Self> {
        let watch = Stopwatch::start();
        loop {
            if let Some(lock) = Self::try_hold(dm, device)? {
                crash_point("lvm.locked");
                return Ok(lock);
            }
            interrupt()?;
            if watch.elapsed() >= WAIT_MAX {
                return Err(Error::refused(format!(
                    "an LVM command has been changing the volume group of device {device} for {} s",
                    WAIT_MAX.as_secs()
                ))
                .next("wait until it is done ('fuser /run/lock/lvm/V_*' shows its process)"));
            }
            thread::sleep(PAUSE);
        }
    }
}

/// `device_now` returns the device's present state. A device that is gone, or is not lvm2's, needs no lock.
fn try_hold_of(
    directory: &Path,
    device_now: &dyn Fn() -> Result<Option<DeviceInfo>>,
) -> Result<Option<LvmLock>> {
    let group_now = || Ok::<_, Error>(device_now()?.as_ref().and_then(volume_group));
    for _ in 0..LOCK_RETRIES_MAX {
        let Some(group) = group_now()? else { return Ok(Some(LvmLock { _held: None })) };
        let Some(held) = try_hold_in(directory, &group)? else { return Ok(None) };
        // vgrename changes the name of the lock. While this lock is held, vgrename cannot start.
        if group_now()?.as_ref() == Some(&group) {
            return Ok(Some(LvmLock { _held: Some(held) }));
        }
    }
    Ok(None)
}

/// The name of the volume group of an lvm2 device, whose name is `GROUP-VOLUME`, with hyphens within either
/// part doubled.
pub(super) fn volume_group(device: &DeviceInfo) -> Option<String> {
    if !device.uuid.starts_with(LVM_UUID_PREFIX) {
        return None;
    }
    let mut group = String::new();
    let mut rest = device.name.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '-' && rest.next_if_eq(&'-').is_none() {
            return Some(group);
        }
        group.push(c);
    }
    None
}

fn try_hold_in(directory: &Path, group: &str) -> Result<Option<Held>> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .io_context(|| format!("creating the directory {}", directory.display()))?;
    let aux = directory.join(format!("V_{group}:aux"));
    // Released once the lock itself is taken or refused.
    let Some(_aux) = lock_named(&aux, try_lock)? else { return Ok(None) };
    lock_named(&directory.join(format!("V_{group}")), try_lock_shared)
}

type TryToLock = fn(File, &Path) -> Result<std::result::Result<LockedFile, File>>;

/// None if another process holds it in a mode that conflicts.
fn lock_named(path: &Path, try_to_lock: TryToLock) -> Result<Option<Held>> {
    let what = || format!("locking {}", path.display());
    for _ in 0..LOCK_RETRIES_MAX {
        let opened = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(path);
        let file = match opened {
            // The file cannot be created: lvm2 cannot lock it either.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                return Ok(Some(Held { file: None, path: path.to_owned() }));
            }
            opened => opened.io_context(what)?,
        };
        let Ok(file) = try_to_lock(file, path)? else { return Ok(None) };
        // Otherwise it was removed by its previous owner.
        if is_named(&file, path)? {
            return Ok(Some(Held { file: Some(file), path: path.to_owned() }));
        }
    }
    Ok(None)
}

impl Drop for Held {
    /// The last holder removes the file, as in lvm2.
    fn drop(&mut self) {
        let Some(file) = self.file.take() else { return };
        let is_named = is_named(&file, &self.path).unwrap_or(false);
        if is_named && file.try_lock().is_ok() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use nix::fcntl::{Flock, FlockArg};

    use super::*;

    fn device(name: &str, uuid: &str) -> DeviceInfo {
        DeviceInfo {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            number: DeviceNumber { major: 253, minor: 0 },
            open_count: 0,
            suspended: false,
            has_active: true,
            has_inactive: false,
            read_only: false,
        }
    }

    #[test]
    fn a_volume_group_is_derived_from_the_device_name() {
        let group = |name: &str| volume_group(&device(name, "LVM-x"));
        assert_eq!(group("vg-data").as_deref(), Some("vg"));
        assert_eq!(group("my--vg-data--1").as_deref(), Some("my-vg"));
        assert_eq!(group("a----b-c-real").as_deref(), Some("a--b"));
        assert_eq!(group("a---b").as_deref(), Some("a-"));
        assert_eq!(group("nothing"), None);
        assert_eq!(volume_group(&device("vg-data", "CRYPT-x")), None);
    }

    /// Takes the lock as lvm2 does.
    fn lvm_lock(path: &Path, how: FlockArg) -> Flock<File> {
        let file = OpenOptions::new().append(true).create(true).open(path).unwrap();
        Flock::lock(file, how).map_err(|(_, errno)| errno).unwrap()
    }

    #[test]
    fn a_group_is_locked_while_lvm_reads_it_but_not_while_lvm_changes_it() {
        let dir = tempfile::tempdir().unwrap();
        let locks = dir.path().join("lvm");
        assert!(try_hold_in(&locks, "vg").unwrap().is_some());
        assert_eq!(fs::read_dir(&locks).unwrap().count(), 0, "the files are removed, as by lvm2");
        let file = locks.join("V_vg");
        let writer = lvm_lock(&file, FlockArg::LockExclusiveNonblock);
        assert!(try_hold_in(&locks, "vg").unwrap().is_none());
        assert!(try_hold_in(&locks, "other").unwrap().is_some());
        drop(writer);
        let reader = lvm_lock(&file, FlockArg::LockSharedNonblock);
        let held = try_hold_in(&locks, "vg").unwrap().unwrap();
        drop(reader);
        let open = OpenOptions::new().append(true).open(&file).unwrap();
        let (open, errno) = Flock::lock(open, FlockArg::LockExclusiveNonblock).unwrap_err();
        assert_eq!(errno, Errno::EWOULDBLOCK, "a writer waits for us");
        assert!(try_hold_in(&locks, "vg").unwrap().is_some(), "another copy does not wait");
        drop(held);
        Flock::lock(open, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno).unwrap();
    }

    #[test]
    fn a_writer_that_waits_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let waiting = lvm_lock(&dir.path().join("V_vg:aux"), FlockArg::LockExclusiveNonblock);
        assert!(try_hold_in(dir.path(), "vg").unwrap().is_none());
        drop(waiting);
        assert!(try_hold_in(dir.path(), "vg").unwrap().is_some());
    }

    #[test]
    fn a_device_that_is_not_lvms_needs_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        for device_now in [None, Some(device("data", ""))] {
            let lock = try_hold_of(dir.path(), &|| Ok(device_now.clone())).unwrap().unwrap();
            assert!(lock._held.is_none());
        }
    }

    #[test]
    fn a_renamed_group_is_locked_by_its_new_name() {
        let dir = tempfile::tempdir().unwrap();
        let names = std::cell::RefCell::new(vec!["new-data", "new-data", "new-data", "old-data"]);
        let device_now = || Ok(Some(device(names.borrow_mut().pop().unwrap(), "LVM-x")));
        let lock = try_hold_of(dir.path(), &device_now).unwrap().unwrap();
        assert!(names.borrow().is_empty());
        assert_eq!(lock._held.as_ref().unwrap().path, dir.path().join("V_new"));
        assert!(!dir.path().join("V_old").exists());
    }
}
