//! The jobs found on disk: running ones, and what dead ones left.

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

/// Most jobs in the directory: a bound in case another program fills it.
const JOBS_MAX: usize = 4096;

/// A job found on disk.
#[derive(Debug)]
pub struct FoundJob {
    /// Its id.
    pub id: String,
    /// True if its process is running.
    pub alive: bool,
    /// Its record; an error if it cannot be read (recovery can do without, by the kernel's tables).
    pub record: Result<JobRecord>,
    /// True if a newer program has written something into the record that this one does not know.
    pub is_newer: bool,
    /// Its progress, or the last progress before it died; None if it reported none.
    pub progress: Option<ProgressView>,
    /// Held while this process handles a dead job, so that no other process does.
    pub(super) lock: Option<Flock<File>>,
}

impl FoundJob {
    /// The path of its segment log, if it has one.
    #[must_use]
    pub fn segments_path(&self) -> PathBuf {
        segments_path(Path::new(RUN_DIR), &self.id)
    }

    /// Removes the record and the lock of a dead job, once everything that it created is gone.
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

/// Every job that left something in [`RUN_DIR`]. From here on this process holds the locks of the dead ones.
///
/// # Errors
/// I/O errors.
pub fn find_jobs() -> Result<Vec<FoundJob>> {
    find_jobs_in(Path::new(RUN_DIR))
}

/// As [`find_jobs`], for one job.
///
/// # Errors
/// I/O errors.
pub fn find_one(id: &str) -> Result<Option<FoundJob>> {
    find_job(Path::new(RUN_DIR), id.to_owned())
}

/// As [`find_jobs`], but holds no lock afterwards. So a process that lists jobs repeatedly is not taken for
/// the owner of a dead one.
///
/// # Errors
/// I/O errors.
pub fn list_jobs() -> Result<Vec<FoundJob>> {
    list_jobs_in(Path::new(RUN_DIR))
}

pub(super) fn list_jobs_in(directory: &Path) -> Result<Vec<FoundJob>> {
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

/// None if the job ended meanwhile.
fn find_job(directory: &Path, id: String) -> Result<Option<FoundJob>> {
    let path = lock_path(directory, &id);
    // A removal that was cut short may leave a record without a lock: then the lock is created again.
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
    // The lock comes last: as long as it exists, the job can be found.
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

/// The record of job `id`, running or not. Nothing is locked.
///
/// # Errors
/// As [`read_record`].
pub fn record_of(id: &str) -> Result<JobRecord> {
    read_record(&record_path(Path::new(RUN_DIR), id))
}

/// Reads the record at `path`.
///
/// # Errors
/// I/O errors; [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) if it is malformed.
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

/// For display only: a file that cannot be read counts as missing.
fn read_progress(path: &Path) -> Option<ProgressView> {
    let limit = u64::try_from(VIEW_BYTES_MAX).expect("64 KiB fit u64") + 1;
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)).ok()?;
    ProgressView::decode(&bytes)
}
