//! A regular file that gets its name only when it is complete, so that a result appears in one step.
//!
//! Invariants:
//! - until [`PartialFile::publish`] the bytes are under `.NAME.tidemark-partial.<id>` in the final directory,
//!   and the final name is as it was before;
//! - publish happens after the file's sync, and syncs the directory: a crash leaves either no final name, or
//!   a complete file under it;
//! - dropping an unpublished file removes the partial name. A killed process leaves the file under that name
//!   only, to be resumed ([`PartialFile::reopen`]) or removed ([`remove_leftover`]);
//! - the file is locked (flock) as long as any write to it may arrive: writes of a killed process that are
//!   still in flight keep the file open, and the lock with it. A process that resumes the copy waits for
//!   their end;
//! - a target has at most one locked partial file: a second command with the same target is refused;
//! - a file that is open for writing is not replaced, neither at the beginning nor at the end;
//! - a complete file is never removed: one that cannot get its name stays in the same directory as
//!   `NAME.tidemark-complete.<id>`.
//!
//! This module does not interpret the bytes, and never writes to or removes a file that it did not create.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::unistd::AccessFlags;

use super::identity::{Recognition, identify, recognize};
use crate::base::{Bytes, Error, ErrorKind, Result, ResultExt as _, directory_of};
use crate::format::state::TargetRecord;
use crate::topology::Topology;

/// A file under construction.
#[derive(Debug)]
pub struct PartialFile {
    file: File,
    partial: PathBuf,
    target: PathBuf,
    replace: bool,
    fate: Fate,
    identity: Box<TargetRecord>,
    recognition: Recognition,
}

/// What happens to the file when it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is removed.
    Unfinished,
    /// It stays for a later attempt.
    Left,
    /// It is complete, and stays under another name.
    Kept,
    /// It has its final name.
    Published,
}

/// The part between the final name and the id in the name of a partial file.
const INFIX: &str = ".tidemark-partial.";

/// The same for a complete file that could not get its name.
const COMPLETE_INFIX: &str = ".tidemark-complete.";

/// Longest wait for the last writes of a killed process.
const LAST_WRITES_MAX: Duration = Duration::from_secs(10);

/// Time between two checks.
const LAST_WRITES_POLL: Duration = Duration::from_millis(20);

/// Limits the wait for the last writes of a killed process.
pub(super) struct Deadline {
    end: Instant,
}

impl Deadline {
    pub(super) fn new() -> Self {
        Self::of(LAST_WRITES_MAX)
    }

    fn of(time: Duration) -> Self {
        Self { end: Instant::now() + time }
    }

    /// Waits a moment; false once the time has run out.
    pub(super) fn pause(&self) -> bool {
        let is_left = Instant::now() < self.end;
        if is_left {
            std::thread::sleep(LAST_WRITES_POLL);
        }
        is_left
    }
}

/// Hexadecimal digits of the id.
const ID_LENGTH: usize = 12;

impl PartialFile {
    /// Creates the partial file in the directory of `target`, with direct I/O if the filesystem supports
    /// it.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if `target` exists and `replace` is false, or exists and is not a regular
    /// file; [`ErrorKind::Usage`] if `target` does not name a file; I/O errors otherwise.
    pub fn create(target: &Path, replace: bool) -> Result<Self> {
        let (target, directory, name) = examine_target(target, replace)?;
        // Two processes that begin at the same time run one after the other, so that the second one finds the
        // first one's file.
        let _turn = DirectoryLock::take(&directory)?;
        refuse_others(&target, &directory, &name, None)?;
        let id = &uuid::Uuid::new_v4().simple().to_string()[..ID_LENGTH];
        let mut partial_name = OsString::from(".");
        partial_name.push(name);
        partial_name.push(format!("{INFIX}{id}"));
        let partial = directory.join(partial_name);
        let file = open_direct_or_buffered(&partial)?;
        let locked = lock(&file, &partial, &Deadline::new()).and_then(|()| identify(&file, &partial));
        let identity = locked.inspect_err(|_| {
            let _ = fs::remove_file(&partial);
        })?;
        Ok(Self::unfinished(file, partial, target, replace, (identity, Recognition::Uninterrupted)))
    }

    fn unfinished(
        file: File,
        partial: PathBuf,
        target: PathBuf,
        replace: bool,
        (identity, recognition): (TargetRecord, Recognition),
    ) -> Self {
        let (fate, identity) = (Fate::Unfinished, Box::new(identity));
        Self { file, partial, target, replace, fate, identity, recognition }
    }

    /// The checks of [`PartialFile::create`], without creating anything.
    ///
    /// # Errors
    /// As [`PartialFile::create`].
    pub fn check(target: &Path, replace: bool) -> Result<()> {
        let (target, directory, name) = examine_target(target, replace)?;
        refuse_others(&target, &directory, &name, None)?;
        nix::unistd::eaccess(&directory, AccessFlags::W_OK | AccessFlags::X_OK).map_err(|errno| {
            Error::io(format!("create a file in {}", directory.display()), errno.into())
                .with_kind(ErrorKind::Refused)
                .state("nothing was changed")
                .next("name a directory that can be written")
        })
    }

    /// Opens the partial file of `target` that a killed process has left, unchanged. The file is kept after
    /// an error.
    ///
    /// # Errors
    /// As [`PartialFile::create`]; [`ErrorKind::Refused`] if `partial` is not recorded, is missing, was
    /// not created by Tidemark for `target`, or is not the `recorded` one.
    pub fn reopen(
        partial: Option<&Path>,
        target: &Path,
        replace: bool,
        recorded: Option<&TargetRecord>,
    ) -> Result<Self> {
        let (target, directory, name) = examine_target(target, replace)?;
        let Some(partial) = partial else {
            return Err(cannot_resume(format!("no partial file is recorded for {}", target.display())));
        };
        let partial = partial.to_owned();
        let shown = partial.display();
        if partial.parent() != Some(&directory) || partial_of(&partial) != Some(name.as_bytes()) {
            return Err(cannot_resume(format!("{shown} is not a partial file of {}", target.display())));
        }
        let file = match open_again(&partial) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(cannot_resume(format!("the partial file {shown} is gone")));
            }
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
                return Err(cannot_resume(format!(
                    "{shown} is a symbolic link, not a partial file of Tidemark"
                )));
            }
            Err(error) => return Err(Error::io(format!("open the partial file {shown}"), error)),
        };
        let found = file.metadata().io_context(|| format!("stat of {shown}"))?;
        if !is_ours(&found) {
            return Err(cannot_resume(format!(
                "{shown} was not created by Tidemark: it is not a regular file, belongs to another user, or has a \
                 second name"
            )));
        }
        let identity = identify(&file, &partial)?;
        let recognition = recognize(recorded, &identity, &partial)?;
        lock(&file, &partial, &Deadline::new())?;
        refuse_others(&target, &directory, &name, Some(&partial))?;
        Ok(Self::unfinished(file, partial, target, replace, (identity, recognition)))
    }

    /// Refuses a file that is shorter than the data written to it.
    pub(super) fn check_length(&self, needed: Bytes) -> Result<()> {
        let shown = self.partial.display();
        let length = self.file.metadata().io_context(|| format!("stat of {shown}"))?.len();
        if Bytes(length) >= needed {
            return Ok(());
        }
        Err(cannot_resume(format!("{shown} is shorter than the data written to it: {length} bytes")))
    }

    /// The facts that identify the file.
    pub(super) fn identity(&self) -> &TargetRecord {
        &self.identity
    }

    /// How the file compares with the recorded one.
    pub(super) fn recognition(&self) -> Recognition {
        self.recognition
    }

    /// The open file, for reading and writing.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The name until then.
    #[must_use]
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Gives the file its final name. The caller has synced the file's data; its metadata (the final length)
    /// is synced here too.
    ///
    /// Order: 1. file sync, 2. rename, 3. directory sync. A crash before 2 leaves the partial name. A crash
    /// between 2 and 3 leaves either name, and the file under it is complete because of 1.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if `replace` is false and the final name appeared meanwhile, or if the
    /// file of that name is in use; I/O errors. After an error the final name is as it was, except after a
    /// failed directory sync, which the error states. A file that was synced stays.
    pub fn publish(&mut self) -> Result<()> {
        self.file.sync_all().io_context(|| format!("sync {}", self.partial.display()))?;
        self.take_name().map_err(|error| self.keep(error))?;
        self.fate = Fate::Published;
        self.sync_directory().map_err(|error| {
            error
                .state(format!(
                    "{} is complete, but its name may not survive a power cut",
                    self.target.display()
                ))
                .next("check the filesystem, run sync, and verify the copy")
        })
    }

    fn take_name(&self) -> Result<()> {
        if !self.replace {
            return self.rename_without_replacing();
        }
        // The target may have been opened for writing while the copy ran.
        Topology::default().check_replaceable(&self.target)?;
        fs::rename(&self.partial, &self.target)
            .io_context(|| format!("rename {} to {}", self.partial.display(), self.target.display()))
    }

    fn sync_directory(&self) -> Result<()> {
        let directory = directory_of(&self.partial);
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .io_context(|| format!("sync directory {}", directory.display()))
    }

    /// Keeps the complete file, which cannot get its name. Its partial name is changed, because job records
    /// and users take files of that name for removable.
    fn keep(&mut self, error: Error) -> Error {
        self.fate = Fate::Kept;
        if let Some(complete) = complete_name(&self.partial) {
            match rename_to_new(&self.partial, &complete) {
                Ok(()) => self.partial = complete,
                Err(error) => tracing::warn!(%error, "{} keeps its partial name", self.partial.display()),
            }
        }
        if let Err(error) = self.sync_directory() {
            tracing::warn!("{error}");
        }
        let (kept, target) = (self.partial.display(), self.target.display());
        error
            .context("the copy is complete, but could not get its name")
            .state(format!("{target} was not touched"))
            .next(format!("run mv -T {kept} {target} once that name is free, or rename it to another name"))
    }

    fn rename_without_replacing(&self) -> Result<()> {
        rename_to_new(&self.partial, &self.target).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => exists(&self.target),
            _ => Error::io(format!("rename {} to {}", self.partial.display(), self.target.display()), error),
        })
    }

    /// Leaves the file under its partial name, for a later attempt.
    pub(super) fn leave(&mut self) {
        self.fate = Fate::Left;
    }

    /// Removes the partial file, unless it is complete; returns the state that is left, for the text of an
    /// error.
    ///
    /// # Errors
    /// The removal's I/O error; the file is then still under its partial name.
    pub fn abandon(&mut self) -> Result<String> {
        let shown = self.partial.display();
        match self.fate {
            Fate::Published => return Ok(format!("{} is complete", self.target.display())),
            Fate::Kept => return Ok(format!("the copy is complete, in {shown}")),
            Fate::Left => return Ok(format!("{shown} was left as it is")),
            Fate::Unfinished => self.fate = Fate::Left,
        }
        fs::remove_file(&self.partial)
            .io_context(|| format!("remove the partial file {}", self.partial.display()))?;
        Ok(format!("the partial file was removed, nothing was written to {}", self.target.display()))
    }
}

/// Renames a file to a name that does not exist yet.
fn rename_to_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(()),
        // Filesystems without the flag (some network ones): a hard link never replaces a file either.
        Err(Errno::EINVAL | Errno::ENOSYS) => link_and_remove(from, to, |from| fs::remove_file(from)),
        Err(errno) => Err(errno.into()),
    }
}

/// The name of a complete file that cannot get its final name.
fn complete_name(partial: &Path) -> Option<PathBuf> {
    let name = partial_of(partial)?;
    let id = &partial.file_name()?.as_bytes()[1 + name.len() + INFIX.len()..];
    let complete = [name, COMPLETE_INFIX.as_bytes(), id].concat();
    Some(partial.with_file_name(OsStr::from_bytes(&complete)))
}

/// Gives a file the final name as its second name, and removes the first. Once it has the final name the copy
/// is complete: a first name that cannot be removed is harmless, and does not make the copy fail.
fn link_and_remove(
    partial: &Path,
    target: &Path,
    remove: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    fs::hard_link(partial, target)?;
    if let Err(error) = remove(partial) {
        tracing::warn!(
            "{} is complete, but its other name {} could not be removed ({error}): remove it",
            target.display(),
            partial.display()
        );
    }
    Ok(())
}

/// The final name within the name of a partial file; None for any other file.
fn partial_of(path: &Path) -> Option<&[u8]> {
    let name = path.file_name()?.as_bytes().strip_prefix(b".")?;
    let (rest, id) = name.split_at_checked(name.len().checked_sub(ID_LENGTH)?)?;
    let name = rest.strip_suffix(INFIX.as_bytes())?;
    let is_id = id.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (is_id && !name.is_empty()).then_some(name)
}

/// True if `partial` has the name of a partial file of `target`.
#[must_use]
pub fn is_partial_of(partial: &Path, target: &Path) -> bool {
    let name = target.file_name().map(OsStr::as_bytes);
    partial.parent() == target.parent() && name.is_some() && partial_of(partial) == name
}

/// True for a file as this module creates them: regular, owned by this user, with one name.
fn is_ours(found: &fs::Metadata) -> bool {
    found.is_file() && found.uid() == nix::unistd::geteuid().as_raw() && found.nlink() == 1
}

/// Refuses a file that must not be written in place: it is missing, not a regular file, in use, or about to be
/// replaced.
///
/// # Errors
/// [`ErrorKind::Refused`]; I/O errors.
pub(super) fn check_existing(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => {}
        Ok(_) => return Err(Error::refused(format!("{} is not a regular file", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::refused(format!("{} does not exist", path.display())));
        }
        Err(error) => return Err(Error::io(format!("stat of {}", path.display()), error)),
    }
    let topology = Topology::default();
    topology.check_unused(path)?;
    topology.check_replaceable(path)?;
    let name = path.file_name().unwrap_or_default();
    refuse_others(path, directory_of(path), name, None)
}

/// Opens a complete file to be written in place, with direct I/O if the filesystem supports it, and locks it. Waits for
/// the last writes of a killed process, which keep the lock.
///
/// # Errors
/// As [`check_existing`].
pub(super) fn open_existing(path: &Path) -> Result<File> {
    let deadline = Deadline::new();
    while let Err(error) = check_existing(path) {
        // The lock tells such a process from another one only once the file is open, which this check forbids.
        if error.kind() != ErrorKind::Refused || !path.exists() || !deadline.pause() {
            return Err(error);
        }
    }
    let file = open_again(path).io_context(|| format!("open {}", path.display()))?;
    lock(&file, path, &deadline)?;
    // Opened between the check and the open.
    Topology::default().check_unused(path)?;
    Ok(file)
}

/// Removes a partial file that a killed process has left; returns whether it existed. Its path comes from the
/// job's record; the name is checked so that no record can make it remove any other file. If the copy got
/// its final name before the process died, only the partial name is removed.
///
/// # Errors
/// [`ErrorKind::Refused`] for a path that is not a partial file of ours; I/O errors.
pub fn remove_leftover(path: &Path) -> Result<bool> {
    let shown = path.display();
    let refused = |why: &str| {
        Error::refused(format!("{shown} is not a partial file of Tidemark: {why}"))
            .state("it was not touched")
            .next("inspect it, and remove it yourself if it is not needed")
    };
    if partial_of(path).is_none() {
        return Err(refused("its name is not that of a partial file"));
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io(format!("stat of {shown}"), error)),
        Ok(found) if !found.is_file() => return Err(refused("it is not a regular file")),
        Ok(_) => {}
    }
    fs::remove_file(path).io_context(|| format!("remove the partial file {shown}"))?;
    Ok(true)
}

fn cannot_resume(what: String) -> Error {
    Error::refused(what).state("nothing was written").next("run 'tidemark recover', and copy again")
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if self.fate == Fate::Unfinished
            && let Err(error) = fs::remove_file(&self.partial)
        {
            tracing::warn!(path = %self.partial.display(), %error, "a partial file could not be removed");
        }
    }
}

fn exists(target: &Path) -> Error {
    Error::refused(format!("{} exists", target.display()))
        .state("it was not touched")
        .next("remove it, choose another name, or pass --yes to replace it when the copy is complete")
}

/// The target's real path, its directory, and its name; refused if the file cannot be created or replaced.
fn examine_target(target: &Path, replace: bool) -> Result<(PathBuf, PathBuf, OsString)> {
    let target = resolve(target)?;
    match fs::symlink_metadata(&target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io(format!("stat of {}", target.display()), error)),
        Ok(found) if !found.is_file() => {
            return Err(Error::refused(format!("{} exists and is not a regular file", target.display()))
                .next("name a file that does not exist yet, a block device, or - for standard output"));
        }
        Ok(_) if !replace => return Err(exists(&target)),
        Ok(_) => Topology::default().check_replaceable(&target)?,
    }
    let (Some(directory), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(Error::usage(format!("{} does not name a file", target.display())));
    };
    let (directory, name) = (directory.to_owned(), name.to_owned());
    Ok((target, directory, name))
}

/// The full path of `target`. A symbolic link at its end is followed: the file that it names is the one
/// replaced.
///
/// # Errors
/// [`ErrorKind::Usage`] if it does not name a file, [`ErrorKind::Refused`] if its directory does not
/// exist; I/O errors.
pub fn resolve(target: &Path) -> Result<PathBuf> {
    if target.as_os_str().as_bytes().is_empty() {
        return Err(Error::usage("an empty name does not name a file"));
    }
    match fs::canonicalize(target) {
        Ok(path) => return Ok(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io(format!("resolve {}", target.display()), error)),
    }
    let Some(name) = target.file_name() else {
        return Err(Error::usage(format!("{} does not name a file", target.display())));
    };
    let parent = directory_of(target);
    let parent = fs::canonicalize(parent).map_err(|error| {
        Error::io(format!("resolve the directory {}", parent.display()), error)
            .with_kind(ErrorKind::Refused)
            .next("create the directory first")
    })?;
    Ok(parent.join(name))
}

/// A lock of the target's directory: processes that create partial files of one target do so one after the
/// other.
struct DirectoryLock {
    _directory: Option<File>,
}

impl DirectoryLock {
    fn take(directory: &Path) -> Result<Self> {
        // Without permission to read the directory, or without such locks in the filesystem, there is no
        // lock: see [`lock`].
        let Ok(file) = File::open(directory) else { return Ok(Self { _directory: None }) };
        lock(&file, directory, &Deadline::new())?;
        Ok(Self { _directory: Some(file) })
    }
}

/// Refuses a target for which a living process has another partial file than `own`: the last one to end would
/// replace the other's result. A file that no process has locked was left by a killed process.
fn refuse_others(target: &Path, directory: &Path, name: &OsStr, own: Option<&Path>) -> Result<()> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    for path in entries.flatten().map(|entry| entry.path()) {
        if partial_of(&path) != Some(name.as_bytes()) || own == Some(&path) {
            continue;
        }
        let flags = libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(&path) else { continue };
        if !matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
            continue;
        }
        let writer = Topology::default().user_of(&path)?.map_or_else(
            || format!("another process has {} open", path.display()),
            |user| format!("its partial file is {user}"),
        );
        return Err(Error::refused(format!("{} is already being written: {writer}", target.display()))
            .state("it was not touched")
            .next("wait for it ('tidemark status' shows jobs), or name another target"));
    }
    Ok(())
}

/// Locks the file as long as it is open through this handle or a duplicate of it.
fn lock(file: &File, path: &Path, deadline: &Deadline) -> Result<()> {
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if deadline.pause() => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::refused(format!(
                    "{} is still being written by another process, or by the last writes of a killed one",
                    path.display()
                ))
                .state("nothing was written")
                .next("check its disk ('dmesg'), and try again"));
            }
            // If the filesystem has no locks, there is nothing to wait for.
            Err(TryLockError::Error(error)) => {
                tracing::debug!(path = %path.display(), %error, "no lock on the partial file");
                return Ok(());
            }
        }
    }
}

/// Opens a file that exists, with direct I/O if the filesystem supports it.
fn open_again(path: &Path) -> io::Result<File> {
    let open = |flags: i32| {
        let flags = flags | libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
    };
    match open(libc::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(0),
        opened => opened,
    }
}

fn open_direct_or_buffered(path: &Path) -> Result<File> {
    let open = |flags: i32| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(flags | libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)
    };
    match open(libc::O_DIRECT) {
        Ok(file) => Ok(file),
        // Some filesystems create the file and then refuse O_DIRECT: this process created it, as O_EXCL
        // guarantees.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("remove {}", path.display()), error));
                }
                _ => {}
            }
            tracing::info!(path = %path.display(), "no direct I/O on this filesystem; using the page cache");
            open(0).io_context(|| format!("create {}", path.display()))
        }
        Err(error) => Err(Error::io(format!("create {}", path.display()), error)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_name_appears_only_on_publish() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let mut partial = PartialFile::create(&target, false).unwrap();
        assert_eq!(names(directory.path()).len(), 1);
        assert!(names(directory.path())[0].starts_with(".out.tidemark-partial."));
        partial.file().set_len(10).unwrap();
        partial.publish().unwrap();
        drop(partial);
        assert_eq!(names(directory.path()), ["out"]);
        assert_eq!(fs::metadata(&target).unwrap().len(), 10);
    }

    #[test]
    fn dropping_or_abandoning_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        drop(PartialFile::create(&target, false).unwrap());
        assert!(names(directory.path()).is_empty());
        let mut partial = PartialFile::create(&target, false).unwrap();
        partial.abandon().unwrap();
        drop(partial);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn a_name_that_appears_meanwhile_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let mut partial = PartialFile::create(&target, false).unwrap();
        File::create(&target).unwrap().write_all(b"theirs").unwrap();
        assert_eq!(partial.publish().unwrap_err().kind(), ErrorKind::Refused);
        drop(partial);
        assert_eq!(fs::read(&target).unwrap(), b"theirs");
        assert_eq!(PartialFile::create(&target, false).unwrap_err().kind(), ErrorKind::Refused);

        let mut partial = PartialFile::create(&target, true).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"theirs");
        partial.file().set_len(4096).unwrap();
        partial.publish().unwrap();
        let mut first = [1u8; 1];
        File::open(&target).unwrap().read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [0]);
    }

    #[test]
    fn a_complete_copy_that_cannot_get_its_name_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        fs::write(&target, b"theirs").unwrap();
        let kept = |replace: bool, hinder: &dyn Fn() -> Option<File>| {
            let mut partial = PartialFile::create(&target, replace).unwrap();
            let (id, hidden) =
                (partial.partial().to_str().unwrap().rsplit_once('.').unwrap().1.to_owned(), {
                    fs::write(partial.partial(), b"ours").unwrap();
                    partial.partial().to_owned()
                });
            let hindrance = hinder();
            let error = partial.publish().unwrap_err();
            let complete = directory.path().join(format!("out.tidemark-complete.{id}"));
            let shown = complete.to_str().unwrap();
            assert!(partial.abandon().unwrap().contains(shown), "{error}");
            assert!(error.next_step().unwrap().contains(shown), "{error}");
            // 'recover', which knows the name from a record, does not remove it either.
            assert!(!remove_leftover(&hidden).unwrap());
            drop((partial, hindrance));
            assert_eq!(fs::read(&complete).unwrap(), b"ours");
            fs::remove_file(&complete).unwrap();
            error
        };
        let error = kept(true, &|| OpenOptions::new().write(true).open(&target).ok());
        assert_eq!(
            (error.kind(), fs::read(&target).unwrap().as_slice()),
            (ErrorKind::Refused, &b"theirs"[..])
        );
        fs::remove_file(&target).unwrap();
        assert_eq!(
            kept(false, &|| fs::write(&target, b"theirs").map(|()| None).unwrap()).kind(),
            ErrorKind::Refused
        );
        let error = kept(true, &|| {
            fs::remove_file(&target).unwrap();
            fs::create_dir(&target).map(|()| None).unwrap()
        });
        assert_eq!(error.errno(), Some(libc::EISDIR));
        assert_eq!(names(directory.path()), ["out"]);
    }

    #[test]
    fn a_link_keeps_its_place_and_a_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().join("real");
        let link = directory.path().join("link");
        File::create(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let mut partial = PartialFile::create(&link, true).unwrap();
        partial.file().set_len(3).unwrap();
        partial.publish().unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::metadata(&real).unwrap().len(), 3);
        let error = PartialFile::create(directory.path(), true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
    }

    fn reopen(partial: &Path, target: &Path) -> Result<PartialFile> {
        let is_file = fs::metadata(partial).is_ok_and(|found| found.is_file());
        let recorded = is_file.then(|| identify(&File::open(partial).unwrap(), partial).unwrap());
        PartialFile::reopen(Some(partial), target, false, recorded.as_ref())
    }

    /// The partial file of a process that was killed, and a handle that outlives it.
    fn killed(target: &Path) -> (PathBuf, File) {
        let mut partial = PartialFile::create(target, false).unwrap();
        let (path, handle) = (partial.partial().to_owned(), partial.file().try_clone().unwrap());
        fs::write(&path, b"so far").unwrap();
        partial.leave();
        (path, handle)
    }

    #[test]
    fn a_killed_process_s_file_is_reopened() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let (path, file) = killed(&target);
        drop(file);
        let mut again = reopen(&path, &target).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"so far");
        again.publish().unwrap();
        assert_eq!(names(directory.path()), ["out"]);
        assert_eq!(fs::read(&target).unwrap(), b"so far");
        let error = reopen(&path, &directory.path().join("other")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
    }

    #[test]
    fn the_last_writes_of_a_killed_process_are_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        // Writes that an io_uring still holds while it is being torn down.
        let (path, in_flight) = killed(&target);
        let error = lock(&File::open(&path).unwrap(), &path, &Deadline::of(Duration::ZERO)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        let landed = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(150));
                landed.store(true, std::sync::atomic::Ordering::SeqCst);
                drop(in_flight);
            });
            reopen(&path, &target).unwrap().leave();
            assert!(landed.load(std::sync::atomic::Ordering::SeqCst), "a write was still in flight");
        });
    }

    #[test]
    fn only_our_own_partial_file_of_that_target_is_reopened() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let path = directory.path().join(".out.tidemark-partial.0123456789ab");
        let refused = |partial: &Path, target: &Path| {
            let error = reopen(partial, target).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
            assert!(error.next_step().is_some());
        };
        refused(&path, &target);
        assert_eq!(PartialFile::reopen(None, &target, false, None).unwrap_err().kind(), ErrorKind::Refused);
        let other = directory.path().join("theirs");
        fs::write(&other, b"theirs").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        refused(&path, &target);
        fs::remove_file(&path).unwrap();
        fs::hard_link(&other, &path).unwrap();
        refused(&path, &target);
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        refused(&path, &target);
        fs::remove_file(&path).unwrap();
        if nix::unistd::geteuid().is_root() {
            fs::write(&path, b"").unwrap();
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
            refused(&path, &target);
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        }
        fs::write(&path, b"ours").unwrap();
        refused(&path, &directory.path().join("other"));
        refused(&path, &directory.path().join("sub/out"));
        refused(&other, &target);
        // The refused file is unchanged and can still be reopened.
        reopen(&path, &target).unwrap().leave();
        fs::write(&target, b"appeared").unwrap();
        refused(&path, &target);
        assert_eq!(names(directory.path()), [".out.tidemark-partial.0123456789ab", "out", "theirs"]);
    }

    #[test]
    fn only_a_partial_file_is_removed_as_a_leftover() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str| {
            let path = directory.path().join(name);
            fs::write(&path, b"x").unwrap();
            path
        };
        for name in [
            "out",
            ".tidemark-partial.0123456789ab",
            "out.tidemark-partial.0123456789ab",
            ".out.tidemark-partial.0123456789a",
            ".out.tidemark-partial.0123456789abc",
            ".out.tidemark-partial.0123456789aB",
            ".out.partial.0123456789ab",
            ".o",
        ] {
            let path = put(name);
            assert_eq!(remove_leftover(&path).unwrap_err().kind(), ErrorKind::Refused, "{name}");
            assert!(path.exists(), "{name}");
        }
        let path = put(".o.tidemark-partial.0123456789ab");
        assert!(remove_leftover(&path).unwrap());
        assert!(!path.exists());
        assert!(!remove_leftover(&path).unwrap());
        fs::create_dir(&path).unwrap();
        assert_eq!(remove_leftover(&path).unwrap_err().kind(), ErrorKind::Refused);
        fs::remove_dir(&path).unwrap();
        std::os::unix::fs::symlink(directory.path().join("out"), &path).unwrap();
        assert_eq!(remove_leftover(&path).unwrap_err().kind(), ErrorKind::Refused);
    }

    #[test]
    fn a_complete_copy_is_not_failed_by_its_other_name() {
        let directory = tempfile::tempdir().unwrap();
        let (partial, target) = (directory.path().join("partial"), directory.path().join("out"));
        fs::write(&partial, b"whole").unwrap();
        link_and_remove(&partial, &target, |_| Err(io::ErrorKind::PermissionDenied.into())).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        assert_eq!(
            link_and_remove(&partial, &target, |_| Ok(())).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
    }
}
