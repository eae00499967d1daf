//! Locks on whole files (flock(2)).

use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::base::{Error, Result, ResultExt as _};

/// A file that is locked until this value is dropped. The lock is released explicitly: a child process that is
/// being started has the file open too until it runs its own program, which would keep the lock.
#[derive(Debug)]
pub struct LockedFile(File);

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        // It fails only for a file without such locks; the close ends the lock as well.
        let _ = self.0.unlock();
    }
}

/// Locks `file`, opened at `path`. Gives the file back if another open file has it locked, in any mode.
///
/// # Errors
/// I/O errors.
pub fn try_lock(file: File, path: &Path) -> Result<std::result::Result<LockedFile, File>> {
    let locked = file.try_lock();
    answer(locked, file, path)
}

/// As [`try_lock`], but shared: gives the file back if another open file has it locked exclusively.
///
/// # Errors
/// I/O errors.
pub fn try_lock_shared(file: File, path: &Path) -> Result<std::result::Result<LockedFile, File>> {
    let locked = file.try_lock_shared();
    answer(locked, file, path)
}

fn answer(
    locked: std::result::Result<(), TryLockError>,
    file: File,
    path: &Path,
) -> Result<std::result::Result<LockedFile, File>> {
    match locked {
        Ok(()) => Ok(Ok(LockedFile(file))),
        Err(TryLockError::WouldBlock) => Ok(Err(file)),
        Err(TryLockError::Error(error)) => Err(Error::io(format!("locking {}", path.display()), error)),
    }
}

/// True if `path` still names `file`: a lock file that was removed locks nothing.
///
/// # Errors
/// I/O errors.
pub fn is_named(file: &File, path: &Path) -> Result<bool> {
    let what = || format!("examining {}", path.display());
    let ours = file.metadata().io_context(what)?;
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        named => named.map(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())).io_context(what),
    }
}
