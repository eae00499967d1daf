//! Where the store of a snapshot or clone is, and how large.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::base::{Bytes, ChunkSize, Error, Result, directory_of};
use crate::format::state::SnapshotSetRecord;
use crate::op::admission::Question;
use crate::op::unit;
use crate::store::{TailPlace, size};

/// A store's size by default, as a share of the volume.
const STORE_SHARE: u64 = 5;

/// The directory for the file of a store.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for anything but a directory.
pub fn resolve_directory(wanted: Option<&Path>) -> Result<PathBuf> {
    match TailPlace::resolve(wanted)? {
        TailPlace::Directory(directory) => Ok(directory),
        place => Err(Error::usage(format!("--store {}: not a directory", place.path().display()))
            .state("nothing was changed")
            .next("name an existing directory on another filesystem: the store of a snapshot is a file")),
    }
}

/// As [`resolve_directory`], if no file there can depend on the volume.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) otherwise; as [`resolve_directory`].
pub fn choose_place(question: &Question, wanted: Option<&Path>) -> Result<PathBuf> {
    let directory = resolve_directory(wanted)?;
    question.check_place(&TailPlace::Directory(directory.clone()))?;
    Ok(directory)
}

/// The size of a store for a volume of `volume` bytes.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a volume that is too large.
pub fn choose_size(wanted: Option<Bytes>, volume: Bytes, chunk: ChunkSize) -> Result<Bytes> {
    let least = size::smallest(chunk).align_up(size::STORE_UNIT);
    let share = Bytes(volume.get() / STORE_SHARE).align_up(size::STORE_UNIT);
    let wanted = wanted.unwrap_or(share).align_up(size::STORE_UNIT);
    Ok(wanted.max(least).min(size::worst_case(volume, chunk)?))
}

/// The file of a store.
#[must_use]
pub fn store_path(directory: &Path, (volume, name): (&str, &str), id: &str) -> String {
    directory.join(format!("{volume}@{name}-{id}.store")).display().to_string()
}

/// The volume's unit, if it is installed, has to wait for all stores at boot.
///
/// # Errors
/// I/O errors.
pub fn refresh_unit(record: &SnapshotSetRecord) -> Result<()> {
    let directories: BTreeSet<PathBuf> =
        record.snapshots.iter().map(|snapshot| directory_of(Path::new(&snapshot.store)).to_owned()).collect();
    let directories: Vec<PathBuf> = directories.into_iter().collect();
    if let Some(unit) = unit::rewrite_volume(&record.volume, Path::new(&record.device), &directories)? {
        tracing::info!("{} was written again: run 'systemctl daemon-reload'", unit.display());
    }
    Ok(())
}
