//! Locks on whole files (flock(2)): held until the file is closed.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::base::{Error, Result, ResultExt as _};

/// Locks `file`, opened at `path`. False if another open file has it locked, in any mode.
///
/// # Errors
/// I/O errors.
pub fn try_lock(file: &File, path: &Path) -> Result<bool> {
    answer(file.try_lock(), path)
}

/// As [`try_lock`], but shared: false if another open file has it locked exclusively.
///
/// # Errors
/// I/O errors.
pub fn try_lock_shared(file: &File, path: &Path) -> Result<bool> {
    answer(file.try_lock_shared(), path)
}

fn answer(locked: std::result::Result<(), TryLockError>, path: &Path) -> Result<bool> {
    match locked {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
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
