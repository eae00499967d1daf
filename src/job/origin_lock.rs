//! Allows only one job per live origin.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::paths::{RUN_DIR, origin_lock_path};
use crate::base::{DeviceNumber, Error, Result, ResultExt};
use crate::sys::lock::{LockedFile, is_named, try_lock, try_lock_shared};
use crate::topology::Topology;

/// Attempts to take a lock that is held, and the pause between two of them.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Most bytes that are read from an origin's lock.
const OWNER_TEXT_BYTES_MAX: u64 = 256;

/// `/run/tidemark/origins/M:m.lock`, locked (flock) as long as a job has the live origin of that number. Its
/// text names that job, for the error of a second one. A killed process leaves the file, which locks nothing.
#[derive(Debug)]
pub(super) struct OriginLock {
    path: PathBuf,
    _lock: LockedFile,
}

impl OriginLock {
    /// Takes the lock.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) with the job that holds it; I/O errors.
    pub(super) fn take(directory: &Path, number: DeviceNumber, job: &str) -> Result<Self> {
        let path = origin_lock_path(directory, number);
        let what = || format!("locking {}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(directory.join("origins")).io_context(what)?;
        let mut attempts_left = LOCK_ATTEMPTS;
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(&path).io_context(what)?;
            let lock = match try_lock(file, &path)? {
                Ok(lock) => lock,
                // A process that only checks the lock holds it for a moment.
                Err(_) if attempts_left > 0 => {
                    attempts_left -= 1;
                    thread::sleep(LOCK_PAUSE);
                    continue;
                }
                Err(file) => return Err(origin_held_error(&file, number)),
            };
            // The previous owner may have removed the file between our open and our lock.
            if is_named(&lock, &path)? {
                // Only for messages, so a full /run is not an error.
                let _ = lock.set_len(0).and_then(|()| {
                    (&*lock).write_all(format!("job {job} (process {})", std::process::id()).as_bytes())
                });
                return Ok(Self { path, _lock: lock });
            }
        }
    }

    pub(super) fn release(self) {
        // A file that cannot be removed locks nothing.
        let _ = fs::remove_file(&self.path);
    }
}

/// Refuses a live origin that a job is using.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) with the job and its process.
pub fn refuse_held_origin(number: DeviceNumber) -> Result<()> {
    refuse_held_origin_in(Path::new(RUN_DIR), number)
}

pub(super) fn refuse_held_origin_in(directory: &Path, number: DeviceNumber) -> Result<()> {
    // If it cannot be opened, there is no lock, or we may not use the origin anyway.
    let path = origin_lock_path(directory, number);
    let Ok(file) = File::open(&path) else { return Ok(()) };
    match try_lock_shared(file, &path) {
        Ok(Err(file)) => Err(origin_held_error(&file, number)),
        _ => Ok(()),
    }
}

fn origin_held_error(lock: &File, number: DeviceNumber) -> Error {
    let mut text = String::new();
    let read = lock.take(OWNER_TEXT_BYTES_MAX).read_to_string(&mut text);
    let owner =
        if read.is_ok() && !text.is_empty() { text.as_str() } else { "another job, which is starting" };
    let shown = Topology::default().name(number);
    Error::refused(format!("the origin, {shown}, is being copied by {owner}"))
        .state("nothing was changed")
        .next("wait for the copy in progress ('tidemark status --watch')")
}
