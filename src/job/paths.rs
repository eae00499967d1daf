//! The paths of a job's files.

use std::path::{Path, PathBuf};

use crate::base::DeviceNumber;

/// The directory of all jobs.
pub const RUN_DIR: &str = "/run/tidemark";

pub(super) fn origin_lock_path(directory: &Path, number: DeviceNumber) -> PathBuf {
    directory.join("origins").join(format!("{number}.lock"))
}

pub(super) fn progress_path(directory: &Path, id: &str) -> PathBuf {
    directory.join(format!("{id}.progress"))
}

/// The path of the progress of origin `number` of several, from 2.
pub(super) fn further_progress_path(directory: &Path, id: &str, number: usize) -> PathBuf {
    directory.join(format!("{id}-{number}.progress"))
}

pub(super) fn segments_path(directory: &Path, id: &str) -> PathBuf {
    directory.join(format!("{id}.segments"))
}
