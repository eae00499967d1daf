//! Keeps lvm2 away from a volume's table while it is changed.
//!
//! Each command of lvm2 that changes a volume group holds an exclusive lock on a file of the group's from before it reads
//! the metadata until behind the last table that it resumes; commands that only look hold a shared one (`flock`; lvm2
//! `lib/locking/file_locking.c` and `lib/misc/lvm-flock.c`). Whoever holds a shared lock so sees a group that is at rest,
//! and a command that would change it waits until the lock is given back.
//!
//! A second file says that a writer waits: everybody locks it first, and a writer keeps it while it waits. So we wait for
//! writers, as lvm2's own readers do. lvm2 removes both files when it gives the lock back: a lock counts only if the file
//! still has its name.
//!
//! Not seen: commands with locking turned off (`--nolocking`), with another `locking_dir`, in another mount namespace, or
//! on other hosts of a shared group.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::base::clock::Stopwatch;
use crate::base::{DeviceNumber, Error, Result, ResultExt as _};
use crate::dm::{DeviceInfo, Dm};

/// lvm2's default for `global/locking_dir`.
const LOCKING_DIR: &str = "/run/lock/lvm";

/// How the UUIDs of lvm2's devices begin.
const LVM_UUID_PREFIX: &str = "LVM-";

/// Longest wait for a command of lvm2.
const PATIENCE: Duration = Duration::from_secs(60);

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// Attempts to lock a file that is removed each time before we have it.
const RENEWALS_MAX: u32 = 100;

/// For how long lvm2 is kept away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LvmScope {
    /// While the origin's table is being changed.
    #[default]
    Change,
    /// From before the instant until the origin has its own table again. Everything that would change the group waits that
    /// long, and behind it everything that only looks: lvm2 lets nobody pass a writer that waits.
    Copy,
}

/// A volume group at rest, as long as it lives. Of a device that is not lvm2's there is nothing to hold.
#[derive(Debug)]
pub struct LvmLock {
    _held: Option<Held>,
}

#[derive(Debug)]
struct Held {
    file: Option<Flock<File>>,
    path: PathBuf,
}

impl LvmLock {
    /// The volume group of `device`, held from now on; None where a command of lvm2 is at it, or waits to be.
    ///
    /// # Errors
    /// I/O errors of the lock's files; the kernel's.
    pub fn try_hold(dm: &Dm, device: DeviceNumber) -> Result<Option<Self>> {
        try_hold_of(Path::new(LOCKING_DIR), &|| dm.info(device))
    }

    /// As [`LvmLock::try_hold`], but waits up to 60 s for lvm2.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) after that; I/O errors, the kernel's, `interrupt`'s.
    pub fn hold(dm: &Dm, device: DeviceNumber, interrupt: &dyn Fn() -> Result<()>) -> Result<Self> {
        let watch = Stopwatch::start();
        loop {
            if let Some(lock) = Self::try_hold(dm, device)? {
                return Ok(lock);
            }
            interrupt()?;
            if watch.elapsed() >= PATIENCE {
                return Err(Error::refused(format!(
                    "a command of LVM has been changing the volume group of device {device} for {} s",
                    PATIENCE.as_secs()
                ))
                .next("wait until it is done (see who has the file open: fuser /run/lock/lvm/V_*)"));
            }
            thread::sleep(PAUSE);
        }
    }
}

/// `look` tells the device as it is now. A device that is gone, or not of lvm2, needs no lock.
fn try_hold_of(directory: &Path, look: &dyn Fn() -> Result<Option<DeviceInfo>>) -> Result<Option<LvmLock>> {
    let group_now = || Ok::<_, Error>(look()?.as_ref().and_then(volume_group));
    for _ in 0..RENEWALS_MAX {
        let Some(group) = group_now()? else { return Ok(Some(LvmLock { _held: None })) };
        let Some(held) = try_hold_in(directory, &group)? else { return Ok(None) };
        // vgrename gives the lock another name. With this one held it cannot begin.
        if group_now()?.as_ref() == Some(&group) {
            return Ok(Some(LvmLock { _held: Some(held) }));
        }
    }
    Ok(None)
}

/// The name of the volume group that a device of lvm2's belongs to. Its own name is `GROUP-VOLUME`, with a hyphen within
/// either doubled.
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
        .io_context(|| format!("making the directory {}", directory.display()))?;
    let turn = directory.join(format!("V_{group}:aux"));
    // In its turn, and given back when the lock itself is there, or cannot be had.
    let Some(_turn) = lock_named(&turn, FlockArg::LockExclusiveNonblock)? else { return Ok(None) };
    lock_named(&directory.join(format!("V_{group}")), FlockArg::LockSharedNonblock)
}

/// None where somebody holds it in a way that does not go with `how`.
fn lock_named(path: &Path, how: FlockArg) -> Result<Option<Held>> {
    let what = || format!("locking {}", path.display());
    for _ in 0..RENEWALS_MAX {
        let opened = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(path);
        let file = match opened {
            // There is no such file and there can be none: lvm2 does not get past this either.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                return Ok(Some(Held { file: None, path: path.to_owned() }));
            }
            opened => opened.io_context(what)?,
        };
        let file = match Flock::lock(file, how) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(Error::io(what(), errno.into())),
        };
        let ours = file.metadata().io_context(what)?;
        match fs::metadata(path) {
            Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => {
                return Ok(Some(Held { file: Some(file), path: path.to_owned() }));
            }
            // Removed by who had it before us.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(what(), error)),
        }
    }
    Ok(None)
}

impl Drop for Held {
    /// As lvm2 does: whoever is the last one takes the file away.
    fn drop(&mut self) {
        let Some(file) = self.file.take() else { return };
        let Ok(ours) = file.metadata() else { return };
        let named = fs::metadata(&self.path);
        let is_named = named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino()));
        if is_named && file.relock(FlockArg::LockExclusiveNonblock).is_ok() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
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
    fn a_volume_group_is_told_by_the_name_of_its_device() {
        let group = |name: &str| volume_group(&device(name, "LVM-x"));
        assert_eq!(group("vg-data").as_deref(), Some("vg"));
        assert_eq!(group("my--vg-data--1").as_deref(), Some("my-vg"));
        assert_eq!(group("a----b-c-real").as_deref(), Some("a--b"));
        assert_eq!(group("a---b").as_deref(), Some("a-"));
        assert_eq!(group("nothing"), None);
        assert_eq!(volume_group(&device("vg-data", "CRYPT-x")), None);
    }

    /// As lvm2 takes it.
    fn theirs(path: &Path, how: FlockArg) -> Flock<File> {
        let file = OpenOptions::new().append(true).create(true).open(path).unwrap();
        Flock::lock(file, how).map_err(|(_, errno)| errno).unwrap()
    }

    #[test]
    fn a_group_that_lvm_changes_is_not_held_and_one_that_it_reads_is() {
        let dir = tempfile::tempdir().unwrap();
        let locks = dir.path().join("lvm");
        assert!(try_hold_in(&locks, "vg").unwrap().is_some());
        assert_eq!(fs::read_dir(&locks).unwrap().count(), 0, "as lvm2, which takes its files away");
        let file = locks.join("V_vg");
        let writer = theirs(&file, FlockArg::LockExclusiveNonblock);
        assert!(try_hold_in(&locks, "vg").unwrap().is_none());
        assert!(try_hold_in(&locks, "other").unwrap().is_some());
        drop(writer);
        let reader = theirs(&file, FlockArg::LockSharedNonblock);
        let held = try_hold_in(&locks, "vg").unwrap().unwrap();
        drop(reader);
        let open = OpenOptions::new().append(true).open(&file).unwrap();
        let (open, errno) = Flock::lock(open, FlockArg::LockExclusiveNonblock).unwrap_err();
        assert_eq!(errno, Errno::EWOULDBLOCK, "a writer waits for us");
        assert!(try_hold_in(&locks, "vg").unwrap().is_some(), "and another copy does not");
        drop(held);
        Flock::lock(open, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno).unwrap();
    }

    #[test]
    fn a_writer_that_waits_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let waiting = theirs(&dir.path().join("V_vg:aux"), FlockArg::LockExclusiveNonblock);
        assert!(try_hold_in(dir.path(), "vg").unwrap().is_none());
        drop(waiting);
        assert!(try_hold_in(dir.path(), "vg").unwrap().is_some());
    }

    #[test]
    fn what_is_not_of_lvm_needs_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        for look in [None, Some(device("data", ""))] {
            let lock = try_hold_of(dir.path(), &|| Ok(look.clone())).unwrap().unwrap();
            assert!(lock._held.is_none());
        }
    }

    #[test]
    fn a_group_that_was_renamed_meanwhile_is_held_by_its_new_name() {
        let dir = tempfile::tempdir().unwrap();
        let names = std::cell::RefCell::new(vec!["new-data", "new-data", "new-data", "old-data"]);
        let look = || Ok(Some(device(names.borrow_mut().pop().unwrap(), "LVM-x")));
        let lock = try_hold_of(dir.path(), &look).unwrap().unwrap();
        assert!(names.borrow().is_empty());
        assert_eq!(lock._held.as_ref().unwrap().path, dir.path().join("V_new"));
        assert!(!dir.path().join("V_old").exists());
    }
}
