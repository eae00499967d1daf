//! The jobs found on disk: running ones, and what dead ones left.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::paths::{RUN_DIR, further_progress_path, progress_path, segments_path};
use super::published;
use crate::base::Result;
use crate::dm::naming::is_id;
use crate::format::state::{JobRecord, ProgressView, VIEW_BYTES_MAX};
use crate::record::{self, FoundRecord};
use crate::sys::lock::LockedFile;

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
    /// The progress of its other origins, as far as they have reported any.
    pub further_progress: Vec<ProgressView>,
    /// Held while this process handles a dead job, so that no other process does.
    pub(super) lock: Option<LockedFile>,
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
    find_job(Path::new(RUN_DIR), id)
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
    let look = |id: String| Ok(find_job(directory, &id)?.map(|found| FoundJob { lock: None, ..found }));
    job_ids(directory)?.into_iter().filter_map(|id| look(id).transpose()).collect()
}

pub(super) fn find_jobs_in(directory: &Path) -> Result<Vec<FoundJob>> {
    job_ids(directory)?.into_iter().filter_map(|id| find_job(directory, &id).transpose()).collect()
}

fn job_ids(directory: &Path) -> Result<Vec<String>> {
    Ok(record::ids(directory)?.into_iter().filter(|id| is_id(id)).collect())
}

/// None if the job ended meanwhile.
fn find_job(directory: &Path, id: &str) -> Result<Option<FoundJob>> {
    let Some(found) = record::find(directory, id)? else { return Ok(None) };
    let FoundRecord { id, record, is_newer, lock, .. } = found;
    let progress = read_progress(&progress_path(directory, &id));
    let further = 1..=record.as_ref().map_or(0, |record: &JobRecord| record.further_origins.len());
    let further_progress = further
        .filter_map(|index| read_progress(&further_progress_path(directory, &id, index + 1)))
        .collect();
    Ok(Some(FoundJob { id, alive: lock.is_none(), record, is_newer, progress, further_progress, lock }))
}

pub(super) fn remove_job(directory: &Path, id: &str) -> Result<()> {
    let progress = progress_path(directory, id);
    let segments = segments_path(directory, id);
    let mut beside =
        vec![published::temporary(&progress), progress, segments.with_extension("segments-new"), segments];
    beside.extend(further_files(directory, id));
    record::remove(directory, id, &beside)
}

/// The files of the further origins of job `id`. One that cannot be found harms nothing.
fn further_files(directory: &Path, id: &str) -> Vec<PathBuf> {
    let begin = format!("{id}-");
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_of_job = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&begin))
    };
    entries.filter(is_of_job).collect()
}

/// The record of job `id`, running or not. Nothing is locked.
///
/// # Errors
/// As [`record::read`].
pub fn record_of(id: &str) -> Result<JobRecord> {
    record::read(&record::path_of(Path::new(RUN_DIR), id))
}

/// For display only: a file that cannot be read counts as missing.
fn read_progress(path: &Path) -> Option<ProgressView> {
    let limit = u64::try_from(VIEW_BYTES_MAX).expect("64 KiB fit u64") + 1;
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)).ok()?;
    ProgressView::decode(&bytes)
}
