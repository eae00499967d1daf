//! One job for one live origin.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::paths::{RUN_DIR, origin_lock_path};
use crate::base::{DeviceNumber, Error, Result, ResultExt};
use crate::topology::Topology;

/// How often a job that finds an origin's lock held looks again, and how long it waits in between.
const ORIGIN_LOOKS: u32 = 10;
const ORIGIN_LOOK_PAUSE: Duration = Duration::from_millis(20);

/// What is read of an origin's lock at most.
const OWNER_TEXT_BYTES_MAX: u64 = 256;

/// `/run/tidemark/origins/M:m.lock`, locked (flock) for as long as a job has the live origin of that number: whoever
/// comes second is told by what it says. A killed process leaves the file, which locks nothing.
#[derive(Debug)]
pub(super) struct OriginLock {
    path: PathBuf,
    _lock: Flock<File>,
}

impl OriginLock {
    /// Takes it.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) with the job that has it; I/O errors.
    pub(super) fn take(directory: &Path, number: DeviceNumber, job: &str) -> Result<Self> {
        let path = origin_lock_path(directory, number);
        let what = || format!("locking {}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(directory.join("origins")).io_context(what)?;
        let mut looks_left = ORIGIN_LOOKS;
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(&path).io_context(what)?;
            let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                // Who only looks holds it for a moment.
                Err((_, Errno::EWOULDBLOCK)) if looks_left > 0 => {
                    looks_left -= 1;
                    thread::sleep(ORIGIN_LOOK_PAUSE);
                    continue;
                }
                Err((file, Errno::EWOULDBLOCK)) => return Err(held_origin(&file, number)),
                Err((_, errno)) => return Err(Error::io(what(), errno.into())),
            };
            // Whoever had it may have taken the name away between our open and our lock.
            let (ours, named) = (lock.metadata().io_context(what)?, fs::metadata(&path));
            if named.is_ok_and(|named| named.ino() == ours.ino()) {
                // For people: a full /run is no reason to fail.
                let _ = lock.set_len(0).and_then(|()| {
                    (&*lock).write_all(format!("job {job} (process {})", std::process::id()).as_bytes())
                });
                return Ok(Self { path, _lock: lock });
            }
        }
    }

    pub(super) fn release(self) {
        // A file that stays locks nothing.
        let _ = fs::remove_file(&self.path);
    }
}

/// Refuses a live origin that a job has.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) with the job and its process.
pub fn refuse_held_origin(number: DeviceNumber) -> Result<()> {
    refuse_held_origin_in(Path::new(RUN_DIR), number)
}

pub(super) fn refuse_held_origin_in(directory: &Path, number: DeviceNumber) -> Result<()> {
    // Where it cannot be opened there is none, or we may not have the origin anyway.
    let Ok(file) = File::open(origin_lock_path(directory, number)) else { return Ok(()) };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Err((file, Errno::EWOULDBLOCK)) => Err(held_origin(&file, number)),
        _ => Ok(()),
    }
}

fn held_origin(lock: &File, number: DeviceNumber) -> Error {
    let mut text = String::new();
    let read = lock.take(OWNER_TEXT_BYTES_MAX).read_to_string(&mut text);
    let who =
        if read.is_ok() && !text.is_empty() { text.as_str() } else { "another job, which is beginning" };
    let shown = Topology::default().name(number);
    Error::refused(format!("the origin, {shown}, is being copied by {who}"))
        .state("nothing was changed")
        .next("wait for the copy in progress ('tidemark status --watch')")
}
