//! Records with an owner: created, found, taken over, removed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::file::{RecordFile, decode_at, read_bytes, temporary};
use crate::base::{Error, Result, ResultExt as _};
use crate::format::state::{Record, is_fully_known};
use crate::sys::lock::{LockedFile, is_named, try_lock};

/// Suffix of a lock's hidden name, before it is locked.
const HIDDEN: &str = "lock-new";

/// Attempts to create a lock, while another process may remove the hidden file as a leftover.
const CREATE_ATTEMPTS: u32 = 16;
/// Pause between two attempts.
const CREATE_PAUSE: Duration = Duration::from_millis(5);

/// Most records in a directory: a bound in case another program fills it.
const RECORDS_MAX: usize = 4096;

/// The path of record `id`.
#[must_use]
pub fn path_of(directory: &Path, id: &str) -> PathBuf {
    directory.join(format!("{id}.json"))
}

fn lock_path(directory: &Path, id: &str) -> PathBuf {
    directory.join(format!("{id}.lock"))
}

/// A record whose owner is this process. If it is dropped, its files stay.
#[derive(Debug)]
pub struct LockedRecord<R> {
    directory: PathBuf,
    id: String,
    record: R,
    file: RecordFile,
    _lock: LockedFile,
}

impl<R: Record> LockedRecord<R> {
    /// Creates record `id` in `directory`, which is created if necessary.
    ///
    /// # Errors
    /// I/O errors; EEXIST if there is such a record. Nothing is left then.
    pub fn create(directory: &Path, id: &str, record: R) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .io_context(|| format!("creating the directory {}", directory.display()))?;
        let lock = create_lock(directory, id)?;
        let mut created = Self::of(directory, id, record, lock);
        match created.save() {
            Ok(()) => Ok(created),
            // The files that exist already would pass for those of a dead process.
            Err(error) => Err(error.after_undo(created.remove(&[]))),
        }
    }

    /// The record `id`, whose lock this process has taken.
    #[must_use]
    pub fn of(directory: &Path, id: &str, record: R, lock: LockedFile) -> Self {
        let file = RecordFile::new(path_of(directory, id));
        Self { directory: directory.to_owned(), id: id.to_owned(), record, file, _lock: lock }
    }

    /// The record.
    #[must_use]
    pub fn record(&self) -> &R {
        &self.record
    }

    /// The record, to be changed; [`LockedRecord::save`] makes the change durable.
    pub fn record_mut(&mut self) -> &mut R {
        &mut self.record
    }

    /// The directory that the record is in.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns once the record is on stable storage.
    ///
    /// # Errors
    /// I/O errors; the record on disk is whole, the old or the new one.
    pub fn save(&mut self) -> Result<()> {
        self.file.save(&self.record)
    }

    /// Removes the files `beside`, then the record.
    ///
    /// # Errors
    /// I/O errors.
    pub fn remove(self, beside: &[PathBuf]) -> Result<()> {
        remove(&self.directory, &self.id, beside)
    }
}

/// A record found on disk.
#[derive(Debug)]
pub struct FoundRecord<R> {
    /// Its id.
    pub id: String,
    /// The record; an error if it cannot be read.
    pub record: Result<R>,
    /// True if a newer program has written something into the record that this one does not know.
    pub is_newer: bool,
    /// None while its owner lives. Else held by this process, so that no other process handles the record.
    pub lock: Option<LockedFile>,
    directory: PathBuf,
}

impl<R: Record> FoundRecord<R> {
    /// Makes this process the owner of the record.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if its owner lives; the error of its record, if
    /// that cannot be read.
    pub fn take_over(self) -> Result<LockedRecord<R>> {
        let Some(lock) = self.lock else {
            return Err(Error::refused(format!("{} is in use by a running process", self.id))
                .state("nothing was changed"));
        };
        Ok(LockedRecord::of(&self.directory, &self.id, self.record?, lock))
    }

    /// Removes the files `beside`, then the record.
    ///
    /// # Errors
    /// I/O errors.
    ///
    /// # Panics
    /// If its owner lives: a broken invariant.
    pub fn remove(self, beside: &[PathBuf]) -> Result<()> {
        assert!(self.lock.is_some(), "only a dead process's record is removed by another one");
        remove(&self.directory, &self.id, beside)
    }
}

/// The ids of all records in `directory`, sorted. Removes what a process left that died while it created one.
///
/// # Errors
/// I/O errors.
pub fn ids(directory: &Path) -> Result<Vec<String>> {
    let what = || format!("reading {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.io_context(what)?,
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.io_context(what)?.file_name();
        let Some((id, suffix)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
        match suffix {
            HIDDEN => remove_unowned(&directory.join(&name)),
            "json" | "new" | "lock" if !ids.iter().any(|known| known == id) => ids.push(id.to_owned()),
            _ => {}
        }
        if ids.len() > RECORDS_MAX {
            return Err(Error::refused(format!("{} holds over {RECORDS_MAX} records", directory.display())));
        }
    }
    ids.sort();
    Ok(ids)
}

/// Finds record `id`. None if it does not exist, or was removed meanwhile.
///
/// # Errors
/// I/O errors.
pub fn find<R: Record>(directory: &Path, id: &str) -> Result<Option<FoundRecord<R>>> {
    let (path, lock) = (path_of(directory, id), lock_path(directory, id));
    // A file of a record whose lock another program has removed: the lock is created again.
    let is_orphan = !lock.exists() && (path.exists() || temporary(&path).exists());
    let opened = OpenOptions::new().write(true).create(is_orphan).truncate(false).mode(0o600).open(&lock);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.io_context(|| format!("opening {}", lock.display()))?,
    };
    let held = try_lock(file, &lock)?.ok();
    // What a removed record named may belong to another one by now.
    if let Some(held) = &held
        && !is_named(held, &lock)?
    {
        return Ok(None);
    }
    let read = read_bytes(&path).and_then(|bytes| Ok((decode_at(&path, &bytes)?, bytes)));
    let is_newer = read.as_ref().is_ok_and(|(record, bytes)| !is_fully_known(record, bytes));
    let record = read.map(|(record, _)| record);
    Ok(Some(FoundRecord { id: id.to_owned(), record, is_newer, lock: held, directory: directory.to_owned() }))
}

/// Removes the files `beside`, then those of record `id`, the lock last: as long as it exists, the record can be
/// found. A file that does not exist is no error.
///
/// # Errors
/// I/O errors.
pub fn remove(directory: &Path, id: &str, beside: &[PathBuf]) -> Result<()> {
    let path = path_of(directory, id);
    let own = [temporary(&path), path, lock_path(directory, id)];
    for path in beside.iter().chain(&own) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).io_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

fn create_lock(directory: &Path, id: &str) -> Result<LockedFile> {
    let (path, hidden) = (lock_path(directory, id), directory.join(format!("{id}.{HIDDEN}")));
    let what = || format!("creating {}", path.display());
    for _ in 0..CREATE_ATTEMPTS {
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&hidden);
        let made = match made {
            // Left by a process that died before the rename, or about to be removed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                remove_unowned(&hidden);
                None
            }
            file => Some(file.io_context(what)?),
        };
        let Some(Ok(lock)) = made.map(|file| try_lock(file, &hidden)).transpose()? else {
            thread::sleep(CREATE_PAUSE);
            continue;
        };
        match rename_new(&hidden, &path) {
            // Another process may have removed the hidden file before it was locked, and the name may be another's.
            Ok(()) if is_named(&lock, &path)? => return Ok(lock),
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => {
                let undo = fs::remove_file(&hidden).io_context(|| format!("removing {}", hidden.display()));
                return Err(Error::io(what(), errno.into()).after_undo(undo));
            }
        }
    }
    Err(Error::refused(what())
        .state("another process keeps removing files from the directory")
        .next("wait until no 'tidemark recover' is running"))
}

/// Renames `from`, unless `to` exists. Not every filesystem can do this in one step (EINVAL).
fn rename_new(from: &Path, to: &Path) -> nix::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        Err(Errno::EINVAL) => {
            nix::unistd::linkat(AT_FDCWD, from, AT_FDCWD, to, nix::fcntl::AtFlags::empty())?;
            nix::unistd::unlink(from)
        }
        result => result,
    }
}

/// Removes a hidden lock that no process has locked. A file that cannot be removed locks nothing.
fn remove_unowned(hidden: &Path) {
    if let Ok(file) = File::open(hidden)
        && let Ok(Ok(lock)) = try_lock(file, hidden)
        && is_named(&lock, hidden).unwrap_or(false)
    {
        let _ = fs::remove_file(hidden);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::state::VolumeRecord;

    fn record(name: &str) -> VolumeRecord {
        VolumeRecord {
            name: name.to_owned(),
            id: "0123456789abcdef0123456789abcdef".to_owned(),
            device: "/dev/vda".to_owned(),
            size_bytes: 4096,
            attached_utc_ns: 1,
        }
    }

    fn create(directory: &Path, id: &str) -> Result<LockedRecord<VolumeRecord>> {
        LockedRecord::create(directory, id, record("first"))
    }

    fn found(directory: &Path, id: &str) -> FoundRecord<VolumeRecord> {
        find(directory, id).unwrap().unwrap()
    }

    fn count(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn a_record_has_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = create(dir.path(), "a").unwrap();
        assert_eq!(create(dir.path(), "a").unwrap_err().errno(), Some(libc::EEXIST));
        assert_eq!(ids(dir.path()).unwrap(), ["a"]);
        let error = found(dir.path(), "a").take_over().unwrap_err();
        assert_eq!(error.kind(), crate::base::ErrorKind::Refused);
        first.record_mut().name = "changed".to_owned();
        assert_eq!(found(dir.path(), "a").record.unwrap().name, "first", "not saved yet");
        first.save().unwrap();
        drop(first);
        let looked_at = found(dir.path(), "a");
        assert!(found(dir.path(), "a").lock.is_none(), "the first one that found it holds it");
        let second = looked_at.take_over().unwrap();
        assert_eq!(second.record().name, "changed");
        second.remove(&[]).unwrap();
        assert_eq!(count(dir.path()), 0);
    }

    #[test]
    fn a_record_that_was_removed_meanwhile_is_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let first = create(dir.path(), "a").unwrap();
        let open = File::open(lock_path(dir.path(), "a")).unwrap();
        first.remove(&[]).unwrap();
        assert!(find::<VolumeRecord>(dir.path(), "a").unwrap().is_none());
        let open = try_lock(open, Path::new("a")).unwrap().unwrap();
        assert!(!is_named(&open, &lock_path(dir.path(), "a")).unwrap());
        let _second = create(dir.path(), "a").unwrap();
        assert!(!is_named(&open, &lock_path(dir.path(), "a")).unwrap(), "another file has its name");
    }

    /// Regression: a record was visible for a moment before it was locked, and passed for that of a dead process.
    #[test]
    fn a_record_is_never_found_without_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    for id in ids(dir.path()).unwrap() {
                        if let Some(found) = find::<VolumeRecord>(dir.path(), &id).unwrap() {
                            assert!(found.lock.is_none(), "{id} passes for a dead process's record");
                        }
                    }
                }
            });
            for round in 0..300 {
                create(dir.path(), &format!("r{round}")).unwrap().remove(&[]).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
        });
    }

    #[test]
    fn what_a_process_left_that_died_is_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.lock-new"), "").unwrap();
        assert_eq!(ids(dir.path()).unwrap(), [""; 0]);
        assert_eq!(count(dir.path()), 0, "it died before the lock had its name");
        fs::write(dir.path().join("a.lock-new"), "").unwrap();
        create(dir.path(), "a").unwrap().remove(&[]).unwrap();
        assert_eq!(count(dir.path()), 0, "a record of the same id is created in spite of it");
        for left in [&["lock"][..], &["lock", "new"], &["lock", "json", "new"], &["json"], &["new"]] {
            left.iter().for_each(|suffix| fs::write(dir.path().join(format!("a.{suffix}")), "torn").unwrap());
            let beside = dir.path().join("a.segments");
            fs::write(&beside, "").unwrap();
            assert_eq!(ids(dir.path()).unwrap(), ["a"], "{left:?}");
            let found = found(dir.path(), "a");
            assert!(found.record.is_err());
            found.remove(&[beside]).unwrap();
            assert_eq!(count(dir.path()), 0, "{left:?}");
        }
    }
}
