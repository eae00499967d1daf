//! What of a store must be released after a crash, and which process still uses it?
//!
//! The kernel drops most of a store by itself: the tail is an unnamed file on a loop device with autoclear.
//! This is not true of the RAM head, nor of a file that is to be kept. So before either is created, a record
//! of it is synced to `/run/tidemark/stores/ID.json`: one JSON line per step, each with the whole record,
//! only ever appended. The last whole line is valid. Space for all lines is allocated when the file is
//! created, so that a step in the middle of a copy can be recorded even if `/run` is full by then. The owner
//! keeps the record locked (flock); the lock dies with the process. Another process may then take the store
//! over ([`adopt`](super::adopt)) or release it ([`leftovers`](super::leftovers)).
//!
//! The record is created under a hidden name, locked and written, and only then renamed to its own name: so a
//! record that can be found has an owner, or had one.
//!
//! Crash argument of the head, by the last line:
//! 1. `nothing`: nothing was created, or all of it was released.
//! 2. `zram-intended` with the devices that existed before: one may have been added and not recorded yet. It
//!    is ours if it is the only new one and has no size; it holds no memory then.
//! 3. `zram` with its index, `brd`: released, unless a live device still has the store's UUID.
//!
//! Crash argument of a file with a name:
//! 1. none is recorded: there is none, or it belongs to the user (its store was kept; see
//!    `CowStore::release`).
//! 2. a path without an inode: the file was about to be created. It is ours if it is empty, as it stays until
//!    its inode is recorded; any other file at this path is not ours.
//! 3. a path with an inode: removed, if it is still that inode.
//!
//! Must not touch a RAM disk or a file that no record names, or whose record is locked.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt};
use crate::sys::block;

use super::plan::StorePlan;

/// Directory of the records.
pub const RECORD_DIR: &str = "/run/tidemark/stores";

/// Longest record that is written or read: a line takes some hundred bytes and twice the longest path.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// Space allocated for a record: more than its lines take, unless paths are very long.
const RECORD_ROOM: Bytes = Bytes::kib(32);

/// Suffix of the hidden name, before the record is locked.
pub(super) const HIDDEN_SUFFIX: &str = ".json-new";

/// Attempts to create a record, while `recover` may remove the hidden file as a leftover.
const CREATE_ATTEMPTS: u32 = 16;
/// Pause between two attempts.
const CREATE_PAUSE: Duration = Duration::from_millis(5);

/// The state of the RAM head, which the kernel does not drop by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "made")]
pub(super) enum HeadRecord {
    /// None, or no longer one.
    Nothing,
    /// A zram device is about to be added; these existed before.
    ZramIntended { before: Vec<u32> },
    /// The zram device with this index.
    Zram { index: u32 },
    /// The brd module is loaded, or about to be.
    Brd,
}

/// A file with a name that is removed unless the store is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NamedFile {
    pub path: PathBuf,
    /// Its identity; None while it is about to be created.
    pub inode: Option<Inode>,
}

/// The identity of a file, independent of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Inode {
    pub filesystem: DeviceNumber,
    pub number: u64,
}

impl Inode {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self { filesystem: DeviceNumber::from_dev(metadata.dev()), number: metadata.ino() }
    }
}

/// The properties of a store that are fixed when it is created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct About {
    /// UUID of its device.
    pub uuid: String,
    /// Name of its device.
    pub device: String,
    /// Size of the origin.
    pub origin_bytes: Bytes,
    /// As planned; the present sizes of its parts are in the kernel.
    pub plan: StorePlan,
}

/// One line of a record, which is the whole record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    pub version: u32,
    pub about: About,
    #[serde(flatten)]
    pub head: HeadRecord,
    pub file: Option<NamedFile>,
    /// The filesystem of the tail's file, once there is one.
    pub filesystem: Option<DeviceNumber>,
}

const VERSION: u32 = 2;

/// A record owned by this process: locked while this value lives.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    facts: Facts,
    file: Flock<File>,
}

impl Record {
    /// Creates the record of store `id` in `dir`.
    pub(super) fn create(dir: &Path, id: &str, about: About) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .io_context(|| format!("making the directory {}", dir.display()))?;
        let facts =
            Facts { version: VERSION, about, head: HeadRecord::Nothing, file: None, filesystem: None };
        let hidden = dir.join(format!("{id}{HIDDEN_SUFFIX}"));
        let path = record_path(dir, id);
        for _ in 0..CREATE_ATTEMPTS {
            let Some(file) = create_locked(&hidden)? else {
                thread::sleep(CREATE_PAUSE);
                continue;
            };
            let mut record = Self { path: hidden.clone(), facts: facts.clone(), file };
            if let Err(error) = record.make_room().and_then(|()| record.append()) {
                let undo = fs::remove_file(&hidden).io_context(|| format!("removing {}", hidden.display()));
                return Err(error.after_undo(undo));
            }
            match renameat2(AT_FDCWD, &hidden, AT_FDCWD, &path, RenameFlags::RENAME_NOREPLACE) {
                Ok(()) => {
                    record.path = path;
                    return Ok(record);
                }
                // Removed by `recover` before it was locked.
                Err(Errno::ENOENT) => {}
                Err(errno) => {
                    let error =
                        Error::io(format!("making the store's record {}", path.display()), errno.into());
                    return Err(match fs::remove_file(&hidden) {
                        Ok(()) => error,
                        Err(undo) => {
                            error.with_failed_undo(Error::io(format!("removing {}", hidden.display()), undo))
                        }
                    });
                }
            }
        }
        Err(Error::refused(format!("making the store's record {}", path.display()))
            .state("another process keeps removing files from the directory")
            .next("wait until no 'tidemark recover' is running"))
    }

    /// Takes over the record of store `id`, whose process died.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if there is none or its process lives; [`ErrorKind::BadData`] if it cannot be
    /// read.
    pub(super) fn take_over(dir: &Path, id: &str) -> Result<Self> {
        let (record, text) = Self::lock_existing(dir, id)?;
        record.make_room()?;
        if !text.ends_with('\n') {
            // The crash cut the last line short: the next line must not become part of it.
            record.write("\n")?;
        }
        Ok(record)
    }

    /// As [`Record::take_over`], for reading: locked, but not changed.
    ///
    /// # Errors
    /// As [`Record::take_over`].
    pub(super) fn examine(dir: &Path, id: &str) -> Result<Self> {
        Self::lock_existing(dir, id).map(|(record, _)| record)
    }

    /// Locks an existing record. Returns it with its text.
    fn lock_existing(dir: &Path, id: &str) -> Result<(Self, String)> {
        let path = record_path(dir, id);
        let gone = || {
            Error::refused(format!("there is no record of the store {id} ({})", path.display()))
                .next("it has been released already; start a new copy")
        };
        let opened = OpenOptions::new().read(true).append(true).open(&path);
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(gone()),
            result => result.io_context(|| format!("opening the store's record {}", path.display()))?,
        };
        let file = lock(file, &path)?.ok_or_else(|| {
            Error::refused(format!("the store {id} is in use: its record {} is locked", path.display()))
                .next("wait for the process that uses it, or end it")
        })?;
        let text = read_locked(&file, &path)?.ok_or_else(gone)?;
        let facts = last_whole_line(&text).map_err(|error| error.context(path.display().to_string()))?;
        let facts = facts.ok_or_else(|| {
            Error::bad_data(format!("the store's record {} has no complete line", path.display()))
                .next("run 'tidemark recover'")
        })?;
        Ok((Self { path, facts, file }, text))
    }

    /// True if the record can be found under its name.
    #[cfg(test)]
    pub(super) fn exists(&self) -> bool {
        self.path.exists()
    }

    /// The present content.
    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Records the state of the head, or what is about to be done to it. Returns once that is on stable
    /// storage (a tmpfs: it outlives the process but not the host, and so do RAM disks).
    pub(super) fn note(&mut self, head: HeadRecord) -> Result<()> {
        self.facts.head = head;
        self.append()
    }

    /// As [`Record::note`], for a file that exists or is about to, and must be removed after a crash. None
    /// once it has been removed or belongs to the user.
    pub(super) fn note_file(&mut self, file: Option<NamedFile>) -> Result<()> {
        self.facts.file = file;
        self.append()
    }

    /// As [`Record::note`], for the filesystem of the tail's file.
    pub(super) fn note_filesystem(&mut self, filesystem: DeviceNumber) -> Result<()> {
        self.facts.filesystem = Some(filesystem);
        self.append()
    }

    /// Allocates [`RECORD_ROOM`] without changing the length. Skipped on a filesystem that cannot do so.
    fn make_room(&self) -> Result<()> {
        let file: &File = &self.file;
        match block::reserve_keeping_size(file, RECORD_ROOM) {
            Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Ok(()),
            result => result
                .io_context(|| format!("allocating space for the store's record {}", self.path.display())),
        }
    }

    fn append(&mut self) -> Result<()> {
        let mut text = serde_json::to_string(&self.facts).map_err(|source| {
            Error::kernel(format!("writing the store's record {}", self.path.display()), source)
        })?;
        text.push('\n');
        self.write(&text)
    }

    fn write(&self, text: &str) -> Result<()> {
        let what = || format!("writing the store's record {}", self.path.display());
        let mut file: &File = &self.file;
        let length = file.metadata().io_context(what)?.len() + Bytes::from_len(text.len()).get();
        if length > RECORD_BYTES_MAX {
            return Err(Error::new(ErrorKind::NoSpace, format!("{}: it is {length} bytes long", what()))
                .next("start a new copy"));
        }
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).io_context(what)
    }

    /// Removes the record: everything that it names has been released.
    pub(super) fn close(self) -> Result<()> {
        fs::remove_file(&self.path)
            .io_context(|| format!("removing the store's record {}", self.path.display()))
    }
}

fn record_path(dir: &Path, id: &str) -> PathBuf {
    dir.join(format!("{id}.json"))
}

/// None if the file exists already, or another process locks it first.
fn create_locked(path: &Path) -> Result<Option<Flock<File>>> {
    let made = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(path);
    let file = match made {
        // Left by a process that died before the rename, or about to be removed.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
        result => result.io_context(|| format!("making the store's record {}", path.display()))?,
    };
    lock(file, path)
}

/// None if another process has locked it.
pub(super) fn lock(file: File, path: &Path) -> Result<Option<Flock<File>>> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => Ok(Some(file)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(Error::io(format!("locking {}", path.display()), errno.into())),
    }
}

/// The text of a locked record. None if the record was removed or renamed before we had the lock: what it
/// names may belong to another store by now.
pub(super) fn read_locked(file: &Flock<File>, path: &Path) -> Result<Option<String>> {
    let what = || format!("reading {}", path.display());
    let mine = Inode::of(&file.metadata().io_context(what)?);
    let found = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => Inode::of(&result.io_context(what)?),
    };
    if found != mine {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    let reader: &File = file;
    reader.take(RECORD_BYTES_MAX).read_to_end(&mut bytes).io_context(what)?;
    // A line cut within a character is also cut short.
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// The last line that is complete. A line cut short by a crash does not count.
///
/// # Errors
/// [`ErrorKind::BadData`] for a record of another version: what it names must not be forgotten.
pub(super) fn last_whole_line(text: &str) -> Result<Option<Facts>> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let Some(end) = text.rfind('\n') else { return Ok(None) };
    let found = text[..end]
        .lines()
        .rev()
        .find_map(|line| serde_json::from_str::<Versioned>(line).ok().map(|found| (found.version, line)));
    match found {
        None => Ok(None),
        Some((VERSION, line)) => serde_json::from_str::<Facts>(line)
            .map(Some)
            .map_err(|source| Error::bad_data("a store's record is malformed").with_source(source)),
        Some((version, _)) => {
            Err(Error::bad_data(format!("a store's record of version {version} instead of {VERSION}"))
                .next("run 'tidemark recover' of the version that wrote it"))
        }
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
pub(super) mod tests;
