//! The records of what raw secondaries hold, below /var/lib/tidemark (see the [format](crate::format::raw_copy)).
//!
//! Invariants:
//! - a record is replaced as a whole, and is on stable storage when [`RawCopies::save`] returns;
//! - a device that is overwritten as a whole has no record from before the first write on; a file that replaces another
//!   one, from right after it. (In between its identity differs from that of the record.)
//!
//! Whether a secondary still holds what its record says is not known here.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use super::identity::{Recognition, is_nameless, is_part_of, recognize};
use crate::base::{Error, ErrorKind, Result, ResultExt as _};
use crate::format::raw_copy::{FILE_BYTES_MAX, RawCopy};
use crate::format::state::TargetRecord;
use crate::record::{replace, sync_directory};

/// The directory of the records.
const DIRECTORY: &str = "/var/lib/tidemark/secondaries";

/// The end of a record's name.
const EXTENSION: &str = "copy";

/// Records in a directory.
#[derive(Clone, Debug)]
pub struct RawCopies {
    directory: PathBuf,
}

impl Default for RawCopies {
    fn default() -> Self {
        Self { directory: DIRECTORY.into() }
    }
}

/// The record of a secondary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundCopy {
    /// The record.
    pub copy: RawCopy,
    /// The device's or file's own facts prove that it is the recorded one; otherwise only its content can.
    pub is_proven: bool,
}

impl RawCopies {
    /// Records in another directory.
    #[cfg(test)]
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// All records; an error for each that cannot be read.
    ///
    /// # Errors
    /// I/O errors of the directory.
    pub fn read_all(&self) -> Result<Vec<Result<RawCopy>>> {
        Ok(self.paths()?.iter().map(|path| read(path)).collect())
    }

    fn paths(&self) -> Result<Vec<PathBuf>> {
        let what = || format!("reading {}", self.directory.display());
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.io_context(what)?,
        };
        let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
        let mut paths = paths.io_context(what)?;
        paths.retain(|path| path.extension().is_some_and(|end| end == EXTENSION));
        paths.sort();
        Ok(paths)
    }

    /// The record of the secondary with the facts `now`, which is at `path` (full, without symbolic links).
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if the device at the recorded path is another one; [`ErrorKind::BadData`] if none is
    /// found and one cannot be read; I/O errors.
    pub fn find(&self, path: &Path, now: &TargetRecord) -> Result<Option<FoundCopy>> {
        let (mut candidates, mut foreign, mut damaged) = (Vec::new(), None, None);
        for copy in self.read_all()? {
            match copy {
                Err(error) => damaged = Some(error),
                Ok(copy) => match judge(&copy, path, now) {
                    Ok(Some(recognition)) => candidates.push((recognition, copy)),
                    Ok(None) => {}
                    Err(error) => foreign = Some(error),
                },
            }
        }
        let is_here = |copy: &RawCopy| Path::new(&copy.description.path) == path;
        candidates.sort_by_key(|(recognition, copy)| {
            (*recognition != Recognition::Unproven, is_here(copy), copy.shown.instant_ns)
        });
        match candidates.pop() {
            Some((recognition, copy)) => {
                Ok(Some(FoundCopy { copy, is_proven: recognition != Recognition::Unproven }))
            }
            None => foreign.or(damaged).map_or(Ok(None), Err),
        }
    }

    /// Writes a record, and removes others of the same secondary.
    ///
    /// # Errors
    /// I/O errors; the record on disk is whole, the old or the new one.
    pub fn save(&self, copy: &RawCopy) -> Result<()> {
        let what = || format!("creating {}", self.directory.display());
        if !self.directory.is_dir() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory).io_context(what)?;
            sync_directory(&self.directory).io_context(what)?;
        }
        replace(&self.path_of(copy), &copy.encode()?)?;
        let (path, now) = (Path::new(&copy.description.path), &copy.description.target);
        for other in self.read_all()?.into_iter().flatten().filter(|other| other.id != copy.id) {
            if is_same(&other, path, now) {
                self.remove(&other)?;
            }
        }
        Ok(())
    }

    /// Removes the records of what is about to be overwritten: the device with the facts `now`, at `path`, and all that
    /// is on it; or of a file that was replaced.
    ///
    /// # Errors
    /// I/O errors.
    pub fn forget(&self, path: &Path, now: &TargetRecord) -> Result<()> {
        let copies = match self.read_all() {
            // A user who may not read the records: a later increment compares the content.
            Err(error) if error.errno() == Some(libc::EACCES) => return Ok(()),
            copies => copies?,
        };
        for copy in copies.into_iter().flatten() {
            let is_on_it = now.file.is_none() && is_part_of(now, &copy.description.target);
            if is_on_it || is_same(&copy, path, now) {
                self.remove(&copy)?;
            }
        }
        Ok(())
    }

    fn remove(&self, copy: &RawCopy) -> Result<()> {
        let path = self.path_of(copy);
        let removed = fs::remove_file(&path).and_then(|()| sync_directory(&path));
        removed.io_context(|| format!("removing {}", path.display()))
    }

    fn path_of(&self, copy: &RawCopy) -> PathBuf {
        self.directory.join(format!("{}.{EXTENSION}", copy.id.simple()))
    }
}

/// True if `copy` is of the secondary with the facts `now`, at `path`, or of one that it has replaced.
fn is_same(copy: &RawCopy, path: &Path, now: &TargetRecord) -> bool {
    match (&copy.description.target.file, &now.file) {
        // A file of this name on another disk may come back.
        (Some(recorded), Some(now)) => {
            Path::new(&copy.description.path) == path && recorded.filesystem_uuid == now.filesystem_uuid
        }
        _ => matches!(judge(copy, path, now), Ok(Some(_))),
    }
}

/// How the secondary with the facts `now`, at `path`, compares with that of `copy`. None: it is another one.
///
/// # Errors
/// [`ErrorKind::Refused`] if it is another device at the path of the recorded one.
fn judge(copy: &RawCopy, path: &Path, now: &TargetRecord) -> Result<Option<Recognition>> {
    let (recorded, is_here) = (&copy.description.target, Path::new(&copy.description.path) == path);
    match recognize(Some(recorded), now, path) {
        Ok(recognition) => Ok(Some(recognition)),
        Err(error) if error.kind() != ErrorKind::Refused => Err(error),
        Err(_) if !is_here || recorded.file.is_some() != now.file.is_some() => Ok(None),
        // Facts of a file are hints: it may have been moved, or restored from a backup.
        Err(_) if now.file.is_some() || (is_nameless(recorded) && is_nameless(now)) => {
            Ok(Some(Recognition::Unproven))
        }
        Err(error) => Err(error
            .context(format!("{} is recorded as a copy of {}", path.display(), copy.description.base))
            .state("nothing was changed")
            .next("connect the recorded device, or make a whole copy (without --since)")),
    }
}

fn read(path: &Path) -> Result<RawCopy> {
    let what = || format!("reading {}", path.display());
    let mut bytes = Vec::new();
    File::open(path).io_context(what)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes).io_context(what)?;
    RawCopy::decode(&bytes).map_err(|error: Error| {
        error
            .context(path.display().to_string())
            .state("what its secondary holds is unknown")
            .next("remove it, and make a whole copy (without --since)")
    })
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::base::{Bytes, SegmentSize};
    use crate::format::raw_copy::{Description, RawCopyState, Shown};
    use crate::format::state::DeviceRecord;
    use crate::secondary::identity::identify;
    use crate::secondary::identity::tests::disk;

    fn device(devices: &[DeviceRecord]) -> TargetRecord {
        TargetRecord { boot: "b".to_owned(), file: None, devices: devices.to_vec() }
    }

    fn copy(path: &str, target: TargetRecord) -> RawCopy {
        RawCopy {
            id: Uuid::new_v4(),
            state: RawCopyState::Complete,
            base: Uuid::from_u128(1),
            shown: Shown { snapshot: None, instant_ns: 7 },
            size: Bytes(65536),
            segment: SegmentSize::new(SegmentSize::MIN).unwrap(),
            description: Description { path: path.to_owned(), base: "d@s".to_owned(), shown: None, target },
            absent: Vec::new(),
            checksums: vec![1],
        }
    }

    fn found(copies: &RawCopies, path: &str, now: &TargetRecord) -> Option<bool> {
        copies.find(Path::new(path), now).unwrap().map(|found| found.is_proven)
    }

    #[test]
    fn a_device_is_found_by_what_it_is_and_another_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let copies = RawCopies::at(&directory.path().join("new"));
        let now = device(&[disk(16, 5, Some("A"))]);
        assert_eq!(found(&copies, "/dev/sdb", &now), None);
        copies.save(&copy("/dev/sdb", now.clone())).unwrap();
        assert_eq!(found(&copies, "/dev/sdb", &now), Some(true));
        assert_eq!(
            found(&copies, "/dev/sdc", &device(&[disk(32, 9, Some("A"))])),
            Some(true),
            "another name"
        );
        assert_eq!(found(&copies, "/dev/sdc", &device(&[disk(32, 9, Some("B"))])), None);
        let error = copies.find(Path::new("/dev/sdb"), &device(&[disk(16, 9, Some("B"))])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("serial number"), "{error}");
        // Saved again under another id: one record is left.
        copies.save(&copy("/dev/sdb", now)).unwrap();
        assert_eq!(copies.read_all().unwrap().len(), 1);
    }

    #[test]
    fn only_its_content_can_tell_a_disk_without_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let copies = RawCopies::at(directory.path());
        copies.save(&copy("/dev/vdb", device(&[disk(16, 5, None)]))).unwrap();
        assert_eq!(
            found(&copies, "/dev/vdb", &device(&[disk(16, 5, None)])),
            Some(true),
            "attached all the time"
        );
        assert_eq!(found(&copies, "/dev/vdb", &device(&[disk(16, 6, None)])), Some(false));
        assert_eq!(found(&copies, "/dev/vdc", &device(&[disk(16, 6, None)])), None);
        assert!(copies.find(Path::new("/dev/vdb"), &device(&[disk(16, 6, Some("A"))])).is_err());
    }

    #[test]
    fn a_file_that_was_moved_here_is_told_by_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let copies = RawCopies::at(&directory.path().join("records"));
        let path = directory.path().join("image");
        let identity = |path: &Path| identify(&File::open(path).unwrap(), path).unwrap();
        fs::write(&path, b"x").unwrap();
        copies.save(&copy(path.to_str().unwrap(), identity(&path))).unwrap();
        assert_eq!(found(&copies, path.to_str().unwrap(), &identity(&path)), Some(true));
        let renamed = directory.path().join("renamed");
        fs::rename(&path, &renamed).unwrap();
        assert_eq!(found(&copies, renamed.to_str().unwrap(), &identity(&renamed)), Some(true));
        fs::copy(&renamed, &path).unwrap();
        assert_eq!(found(&copies, path.to_str().unwrap(), &identity(&path)), Some(false));
        let other = directory.path().join("other");
        fs::write(&other, b"x").unwrap();
        assert_eq!(found(&copies, other.to_str().unwrap(), &identity(&other)), None);
        copies.forget(&other, &identity(&other)).unwrap();
        assert_eq!(copies.read_all().unwrap().len(), 1, "another file of the same filesystem");
        copies.forget(&path, &identity(&path)).unwrap();
        assert_eq!(copies.read_all().unwrap().len(), 0, "the file was replaced");
    }

    #[test]
    fn what_is_overwritten_is_forgotten_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let copies = RawCopies::at(directory.path());
        let part =
            |minor, start| DeviceRecord { partition_start_bytes: Some(start), ..disk(minor, 5, Some("A")) };
        let (whole, one, two) = (disk(16, 5, Some("A")), part(17, 1 << 20), part(18, 1 << 29));
        let count = || copies.read_all().unwrap().len();
        copies.save(&copy("/dev/sdb1", device(&[whole.clone(), one.clone()]))).unwrap();
        copies.forget(Path::new("/dev/sdb2"), &device(&[whole.clone(), two])).unwrap();
        copies.forget(Path::new("/dev/sdc"), &device(&[disk(32, 6, Some("C"))])).unwrap();
        assert_eq!(count(), 1);
        copies.forget(Path::new("/dev/sdb"), &device(std::slice::from_ref(&whole))).unwrap();
        assert_eq!(count(), 0, "the whole disk");
        copies.save(&copy("/dev/sdb1", device(&[whole.clone(), one.clone()]))).unwrap();
        copies.forget(Path::new("/dev/sdb1"), &device(&[whole, one])).unwrap();
        assert_eq!(count(), 0, "the partition itself");
        copies.save(&copy("/dev/vdb", device(&[disk(16, 5, None)]))).unwrap();
        copies.forget(Path::new("/dev/vdb"), &device(&[disk(16, 6, None)])).unwrap();
        assert_eq!(count(), 0, "a disk without a name");
    }

    #[test]
    fn a_damaged_record_is_not_taken_for_a_missing_one() {
        let directory = tempfile::tempdir().unwrap();
        let copies = RawCopies::at(directory.path());
        let now = device(&[disk(16, 5, Some("A"))]);
        let record = copy("/dev/sdb", now.clone());
        copies.save(&record).unwrap();
        fs::write(copies.path_of(&record), b"half").unwrap();
        assert_eq!(copies.find(Path::new("/dev/sdb"), &now).unwrap_err().kind(), ErrorKind::BadData);
        copies.save(&copy("/dev/sdb", now.clone())).unwrap();
        assert_eq!(found(&copies, "/dev/sdb", &now), Some(true));
    }
}
