//! The file of a record, which can be changed even if no space is left.
//!
//! When a record is created, its file and a spare file are created, both with more space than the record will
//! need. From then on a new record is written into the spare file in place, and the two files exchange names:
//! neither a block nor an inode is allocated. So a full `/run` never ends a copy in progress, and never
//! prevents a change of the origin from being recorded.
//!
//! Crash argument of a change:
//! 1. the new record is written into the spare file and synced: the record's file is whole, with the old
//!    record;
//! 2. `renameat2(RENAME_EXCHANGE)` exchanges the names: it is whole, with the new record;
//! 3. the directory is synced.
//!
//! The rest of a file after its record consists of spaces within the record's second line, which its checksum
//! covers.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::base::{Bytes, ErrorKind, Result, ResultExt as _};
use crate::format::state::{RECORD_BYTES_MAX, Record, decode, encode, encode_padded};
use crate::sys::process::crash_point;

/// Initial size of the files, and the step in which they grow: a record has some KiB.
const STEP_BYTES: usize = 32 << 10;

/// Space beyond the record that there should be: the next changes must not need a block while writers wait.
const SLACK_BYTES: usize = 4 << 10;

/// A record on disk.
#[derive(Debug)]
pub(super) struct RecordFile {
    path: PathBuf,
    /// Size of both files, once both exist.
    size: Option<usize>,
}

impl RecordFile {
    /// At `path`; creates nothing yet. Takes over the files that a dead process left there, if both have their
    /// space.
    pub fn new(path: PathBuf) -> Self {
        let length = |path: &Path| fs::metadata(path).ok().and_then(|meta| usize::try_from(meta.len()).ok());
        let size = length(&path).filter(|size| *size > 0 && length(&temporary(&path)) == Some(*size));
        Self { path, size }
    }

    /// Replaces the record, in the order given at the head of this module.
    ///
    /// # Errors
    /// I/O errors; the record on disk is whole, the old or the new one. An error for lack of space is possible
    /// only the first time, or if the record has grown much larger.
    pub fn save<R: Record>(&mut self, record: &R) -> Result<()> {
        let needed = encode(record)?.len();
        match self.size {
            Some(size) if needed + SLACK_BYTES <= size => self.save_padded(record, size),
            size => {
                let larger = (needed + STEP_BYTES / 2).next_multiple_of(STEP_BYTES).min(RECORD_BYTES_MAX);
                match (self.save_padded(record, larger), size) {
                    (Err(error), Some(size)) if error.kind() == ErrorKind::NoSpace && needed <= size => {
                        self.save_padded(record, size)
                    }
                    (saved, _) => saved,
                }
            }
        }
    }

    fn save_padded<R: Record>(&mut self, record: &R, size: usize) -> Result<()> {
        let bytes = encode_padded(record, size)?;
        let spare = temporary(&self.path);
        write_in_place(&spare, &bytes)?;
        if self.size == Some(size) {
            self.exchange(&spare)?;
        } else {
            // The first record, or larger files: the other file gets its space now. If it cannot, both files have
            // their old size or more.
            self.exchange(&spare)?;
            write_in_place(&spare, &bytes)?;
            self.size = Some(size);
        }
        Ok(())
    }

    fn exchange(&self, spare: &Path) -> Result<()> {
        let what = || format!("writing {}", self.path.display());
        match renameat2(AT_FDCWD, spare, AT_FDCWD, &self.path, RenameFlags::RENAME_EXCHANGE) {
            Ok(()) => {}
            // There is no record yet, or the filesystem cannot exchange names.
            Err(Errno::ENOENT | Errno::EINVAL) => fs::rename(spare, &self.path).io_context(what)?,
            Err(errno) => return Err(io::Error::from(errno)).io_context(what),
        }
        sync_directory(&self.path).io_context(what)
    }
}

/// Makes the file at `path` contain `bytes`, without freeing any of its blocks first.
fn write_in_place(path: &Path, bytes: &[u8]) -> Result<()> {
    let what = || format!("writing {}", path.display());
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(path).io_context(what)?;
    file.write_all_at(bytes, 0).io_context(what)?;
    let length = Bytes::from_len(bytes.len()).get();
    if file.metadata().io_context(what)?.len() != length {
        file.set_len(length).io_context(what)?;
    }
    file.sync_all().io_context(what)
}

/// Replaces the record at `path` whole.
///
/// # Errors
/// I/O errors.
pub fn write<R: Record>(path: &Path, record: &R) -> Result<()> {
    replace(path, &encode(record)?)
}

/// Replaces the file at `path` whole: writes another file, syncs it, renames it, and syncs the directory. When this
/// returns, `bytes` are on stable storage.
///
/// # Errors
/// I/O errors; the file is whole, the old or the new one.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = temporary(path);
    write_in_place(&new, bytes)?;
    crash_point("record.written");
    fs::rename(&new, path)
        .and_then(|()| sync_directory(path))
        .io_context(|| format!("writing {}", path.display()))
}

/// Reads the record at `path`.
///
/// # Errors
/// I/O errors; [`ErrorKind::BadData`] if it is malformed.
pub fn read<R: Record>(path: &Path) -> Result<R> {
    decode_at(path, &read_bytes(path)?)
}

pub(super) fn decode_at<R: Record>(path: &Path, bytes: &[u8]) -> Result<R> {
    decode(bytes).map_err(|error| error.context(path.display().to_string()))
}

pub(super) fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("reading {}", path.display());
    let limit = u64::try_from(RECORD_BYTES_MAX).expect("16 MiB fits u64") + 1;
    let mut bytes = Vec::new();
    File::open(path).io_context(what)?.take(limit).read_to_end(&mut bytes).io_context(what)?;
    Ok(bytes)
}

/// Syncs the directory of `path`.
///
/// # Errors
/// I/O errors.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/"))).and_then(|directory| directory.sync_all())
}

/// The other name: that of the spare file, or of a file that is being written.
pub fn temporary(path: &Path) -> PathBuf {
    path.with_extension("new")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::format::state::JobRecord;

    fn record(text: &str) -> JobRecord {
        JobRecord {
            job: "0123456789abcdef0123456789abcdef".to_owned(),
            command: text.to_owned(),
            process: 1,
            started_utc_ns: 1,
            origin: None,
            further_origins: Vec::new(),
            change: None,
            resources: Vec::new(),
            copy: None,
        }
    }

    #[test]
    fn a_record_changes_without_a_new_block_or_inode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let mut file = RecordFile::new(path.clone());
        file.save(&record("first")).unwrap();
        let files = || {
            let mut found: Vec<(u64, u64, u64)> = [path.clone(), temporary(&path)]
                .iter()
                .map(|path| fs::metadata(path).unwrap())
                .map(|metadata| (metadata.ino(), metadata.len(), metadata.blocks()))
                .collect();
            found.sort_unstable();
            found
        };
        let before = files();
        for length in [1, 10_000, 20_000, 3] {
            let record = record(&"x".repeat(length));
            file.save(&record).unwrap();
            assert_eq!(read::<JobRecord>(&path).unwrap(), record);
            assert_eq!(files(), before, "{length}");
        }
        // A record that outgrows its files gets larger ones.
        let long = record(&"x".repeat(100_000));
        file.save(&long).unwrap();
        assert_eq!(read::<JobRecord>(&path).unwrap(), long);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_torn_spare_file_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let mut file = RecordFile::new(path.clone());
        file.save(&record("first")).unwrap();
        fs::write(temporary(&path), "half of").unwrap();
        assert_eq!(read::<JobRecord>(&path).unwrap(), record("first"));
        // A process that takes the record over overwrites the spare file, whatever it contains.
        let mut file = RecordFile::new(path.clone());
        file.save(&record("second")).unwrap();
        assert_eq!(read::<JobRecord>(&path).unwrap(), record("second"));
    }
}
