//! Jobs found on disk: those that run, and what dead ones left.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::file::temporary;
use super::paths::{RUN_DIR, lock_path, progress_path, record_path, segments_path};
use super::published;
use crate::base::{Error, Result, ResultExt};
use crate::dm::naming::is_id;
use crate::format::state::{
    JobRecord, ProgressView, RECORD_BYTES_MAX, Record, VIEW_BYTES_MAX, decode, is_fully_known,
};

/// Most jobs looked at: a bound on a directory that somebody else filled.
const JOBS_MAX: usize = 4096;

/// A job found on disk.
#[derive(Debug)]
pub struct FoundJob {
    /// Its id.
    pub id: String,
    /// Its process lives.
    pub alive: bool,
    /// Its record; an error where it cannot be read (the kernel's tables do without).
    pub record: Result<JobRecord>,
    /// A newer program has written something into its record that this one does not know.
    pub is_newer: bool,
    /// How far it is, or was when it died; None where it did not say.
    pub progress: Option<ProgressView>,
    /// Held while we look after a dead one, so that no two recovers do.
    pub(super) lock: Option<Flock<File>>,
}

impl FoundJob {
    /// Where the log of its segments is, if it made one.
    #[must_use]
    pub fn segments_path(&self) -> PathBuf {
        segments_path(Path::new(RUN_DIR), &self.id)
    }

    /// Removes the record and the lock of a dead job, once everything it made is gone.
    ///
    /// # Errors
    /// I/O errors.
    ///
    /// # Panics
    /// For a living job: a broken invariant.
    pub fn remove(self) -> Result<()> {
        assert!(self.lock.is_some(), "only a dead job is removed");
        remove_job(Path::new(RUN_DIR), &self.id)
    }
}

/// Every job that left something in [`RUN_DIR`]; the dead ones are locked by us from here on.
///
/// # Errors
/// I/O errors.
pub fn find_jobs() -> Result<Vec<FoundJob>> {
    find_jobs_in(Path::new(RUN_DIR))
}

/// As [`find_jobs`], of one job alone.
///
/// # Errors
/// I/O errors.
pub fn find_one(id: &str) -> Result<Option<FoundJob>> {
    find_job(Path::new(RUN_DIR), id.to_owned())
}

/// As [`find_jobs`], for who only looks: no job is locked afterwards, so that whoever looks again and
/// again is never taken for the owner of a dead one.
///
/// # Errors
/// I/O errors.
pub fn look_at_jobs() -> Result<Vec<FoundJob>> {
    look_at_jobs_in(Path::new(RUN_DIR))
}

pub(super) fn look_at_jobs_in(directory: &Path) -> Result<Vec<FoundJob>> {
    let look = |id| Ok(find_job(directory, id)?.map(|found| FoundJob { lock: None, ..found }));
    job_ids(directory)?.into_iter().filter_map(|id| look(id).transpose()).collect()
}

pub(super) fn find_jobs_in(directory: &Path) -> Result<Vec<FoundJob>> {
    job_ids(directory)?.into_iter().filter_map(|id| find_job(directory, id).transpose()).collect()
}

fn job_ids(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).io_context(|| format!("reading {}", directory.display())),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.io_context(|| format!("reading {}", directory.display()))?.file_name();
        let id = name.to_str().and_then(|name| name.split_once('.')).map(|(id, _)| id.to_owned());
        let hidden = name.to_str().is_some_and(|name| name.ends_with(".lock-new"));
        if let Some(id) = id.filter(|id| is_id(id) && !hidden && !ids.contains(id)) {
            ids.push(id);
        }
        if ids.len() > JOBS_MAX {
            return Err(Error::refused(format!("{} holds over {JOBS_MAX} jobs", directory.display())));
        }
    }
    ids.sort();
    Ok(ids)
}

/// None where the job ended while we looked.
fn find_job(directory: &Path, id: String) -> Result<Option<FoundJob>> {
    let path = lock_path(directory, &id);
    // A record alone is what a removal leaves that was cut short: then the lock is made anew.
    let orphan = !path.exists() && record_path(directory, &id).exists();
    let opened = OpenOptions::new().write(true).create(orphan).truncate(false).mode(0o600).open(&path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).io_context(|| format!("opening {}", path.display())),
    };
    let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Some(lock),
        Err((_, Errno::EWOULDBLOCK)) => None,
        Err((_, errno)) => return Err(Error::io(format!("locking {}", path.display()), errno.into())),
    };
    let path = record_path(directory, &id);
    let read = read_bytes(&path).and_then(|bytes| Ok((decode_at(&path, &bytes)?, bytes)));
    let is_newer = read.as_ref().is_ok_and(|(record, bytes)| !is_fully_known(record, bytes));
    let record = read.map(|(record, _)| record);
    let progress = read_progress(&progress_path(directory, &id));
    Ok(Some(FoundJob { id, alive: lock.is_none(), record, is_newer, progress, lock }))
}

pub(super) fn remove_job(directory: &Path, id: &str) -> Result<()> {
    // The lock last: as long as it exists the job can be found.
    let record = record_path(directory, id);
    let progress = progress_path(directory, id);
    for path in [
        published::temporary(&progress),
        progress,
        segments_path(directory, id).with_extension("segments-new"),
        segments_path(directory, id),
        temporary(&record),
        record,
        lock_path(directory, id),
    ] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).io_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The record of job `id`, whether it lives or not: nothing is locked.
///
/// # Errors
/// As [`read_record`].
pub fn record_of(id: &str) -> Result<JobRecord> {
    read_record(&record_path(Path::new(RUN_DIR), id))
}

/// Reads the record at `path`.
///
/// # Errors
/// I/O errors; [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for one that is not right.
pub fn read_record<R: Record>(path: &Path) -> Result<R> {
    decode_at(path, &read_bytes(path)?)
}

fn decode_at<R: Record>(path: &Path, bytes: &[u8]) -> Result<R> {
    decode(bytes).map_err(|error| error.context(path.display().to_string()))
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("reading {}", path.display());
    let limit = u64::try_from(RECORD_BYTES_MAX).expect("16 MiB fits u64") + 1;
    let mut bytes = Vec::new();
    File::open(path).io_context(what)?.take(limit).read_to_end(&mut bytes).io_context(what)?;
    Ok(bytes)
}

/// It is for people: whatever cannot be read is as good as none.
fn read_progress(path: &Path) -> Option<ProgressView> {
    let limit = u64::try_from(VIEW_BYTES_MAX).expect("64 KiB fit u64") + 1;
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)).ok()?;
    ProgressView::decode(&bytes)
}
