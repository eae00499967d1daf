//! What must be given back after a crash, who is still using it, and what does the kernel not know of it?
//!
//! Most of a store the kernel drops by itself: the tail is a file without a name behind a loop device
//! with autoclear. Not so the RAM head, nor a file that was to be kept. So before either is made, a
//! record of it is synced to `/run/tidemark/stores/ID.json`: one JSON line per step, each the whole
//! record, only ever appended; the last whole line holds. The space for all of them is allocated with the file: what is
//! made in the middle of a copy can be noted where `/run` is full by then. Its owner keeps it locked (flock), which dies
//! with the process; another process may then take the store over ([`adopt`](super::adopt)) or give it
//! back ([`leftovers`](super::leftovers)).
//!
//! It is made under a hidden name, locked and written, and only then gets its own: a record that can be
//! found has an owner, or had one.
//!
//! Crash argument of the head, by what the last line says:
//! 1. `nothing`: nothing was made, or all of it was given back.
//! 2. `zram-intended` with the devices there were before: one may have been added and not yet noted.
//!    It is ours if it is the only new one and has no size; it holds no memory then.
//! 3. `zram` with its index, `brd`: given back, unless a live device still has the store's UUID.
//!
//! And of a file with a name:
//! 1. none is noted: there is none, or it is the user's (its store was kept; see `CowStore::release`).
//! 2. a path without an inode: the file was about to be made. It is ours if it is empty, as it is until
//!    its inode is noted; anything else at this path is somebody's.
//! 3. a path with its inode: removed, if it is still that one.
//!
//! Must not: touch a RAM disk or a file that no record names, or one whose record is locked.

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

/// Where records are.
pub const RECORD_DIR: &str = "/run/tidemark/stores";

/// Longest record that is written and read: a line is some hundred bytes and twice the longest path.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// What is allocated for a record: more than its lines take, unless paths are very long.
const RECORD_ROOM: Bytes = Bytes::kib(32);

/// How the name of a record ends that is not locked yet.
pub(super) const HIDDEN: &str = ".json-new";

/// Attempts to make one while a `recover` clears away what it takes for the hidden part of a dead one's.
const CREATE_ATTEMPTS: u32 = 16;
/// Pause between them.
const CREATE_PAUSE: Duration = Duration::from_millis(5);

/// The RAM head: made for the store, and not dropped by the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "made")]
pub(super) enum Made {
    /// Nothing, or nothing any more.
    Nothing,
    /// A zram device is about to be added; these existed before.
    ZramIntended { before: Vec<u32> },
    /// This zram device.
    Zram { index: u32 },
    /// The brd module is (about to be) loaded.
    Brd,
}

/// A file with a name, not (yet) to be kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NamedFile {
    pub path: PathBuf,
    /// Which file it is; None while it is about to be made.
    pub inode: Option<Inode>,
}

/// A file, whatever it is called.
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

/// What the store is, fixed when it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct About {
    /// UUID of its device.
    pub uuid: String,
    /// Name of its device.
    pub device: String,
    /// Size of the origin.
    pub origin_bytes: Bytes,
    /// As planned; how large its parts are now, the kernel says.
    pub plan: StorePlan,
}

/// One line of a record: all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    pub version: u32,
    pub about: About,
    #[serde(flatten)]
    pub head: Made,
    pub file: Option<NamedFile>,
    /// The filesystem that the tail's file is on, once there is one.
    pub filesystem: Option<DeviceNumber>,
}

const VERSION: u32 = 2;

/// A record that is ours: locked while this value lives.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    facts: Facts,
    file: Flock<File>,
}

impl Record {
    /// Begins the record of store `id` in `dir`.
    pub(super) fn create(dir: &Path, id: &str, about: About) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .io_context(|| format!("making the directory {}", dir.display()))?;
        let facts = Facts { version: VERSION, about, head: Made::Nothing, file: None, filesystem: None };
        let hidden = dir.join(format!("{id}{HIDDEN}"));
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
                // Cleared away before it was locked.
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
            .state("another process clears the directory again and again")
            .next("wait until no 'tidemark recover' is running"))
    }

    /// Takes over the record of store `id`, whose process is gone.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where there is none, or its process lives; [`ErrorKind::BadData`] for one
    /// that cannot be read.
    pub(super) fn take_over(dir: &Path, id: &str) -> Result<Self> {
        let (record, text) = Self::lock_existing(dir, id)?;
        record.make_room()?;
        if !text.ends_with('\n') {
            // Cut short by the crash: what comes next must not be taken for a part of it.
            record.write("\n")?;
        }
        Ok(record)
    }

    /// As [`Record::take_over`], to be read: it is locked, and not changed.
    ///
    /// # Errors
    /// As [`Record::take_over`].
    pub(super) fn examine(dir: &Path, id: &str) -> Result<Self> {
        Self::lock_existing(dir, id).map(|(record, _)| record)
    }

    /// And what it holds.
    fn lock_existing(dir: &Path, id: &str) -> Result<(Self, String)> {
        let path = record_path(dir, id);
        let gone = || {
            Error::refused(format!("there is no record of the store {id} ({})", path.display()))
                .next("it was given back already; begin a new copy")
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
            Error::bad_data(format!("the store's record {} does not say anything", path.display()))
                .next("run 'tidemark recover'")
        })?;
        Ok((Self { path, facts, file }, text))
    }

    /// It can be found under its name.
    #[cfg(test)]
    pub(super) fn exists(&self) -> bool {
        self.path.exists()
    }

    /// What it says.
    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Notes what is (about to be) made of the head. Returns once that is on stable storage (a tmpfs: it
    /// outlives the process, not the host, and so do RAM disks).
    pub(super) fn note(&mut self, head: Made) -> Result<()> {
        self.facts.head = head;
        self.append()
    }

    /// As [`Record::note`], for a file that is (about to be) made and must not stay; None for one that is
    /// gone, or is the user's from now on.
    pub(super) fn note_file(&mut self, file: Option<NamedFile>) -> Result<()> {
        self.facts.file = file;
        self.append()
    }

    /// As [`Record::note`], for where the tail's file is.
    pub(super) fn note_filesystem(&mut self, filesystem: DeviceNumber) -> Result<()> {
        self.facts.filesystem = Some(filesystem);
        self.append()
    }

    /// Has [`RECORD_ROOM`] allocated; the length stays. A file system that cannot do so goes without.
    fn make_room(&self) -> Result<()> {
        let file: &File = &self.file;
        match block::reserve_beyond(file, RECORD_ROOM) {
            Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Ok(()),
            result => {
                result.io_context(|| format!("making room for the store's record {}", self.path.display()))
            }
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
                .next("begin a new copy"));
        }
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).io_context(what)
    }

    /// Ends the record: everything it names has been given back.
    pub(super) fn close(self) -> Result<()> {
        fs::remove_file(&self.path)
            .io_context(|| format!("removing the store's record {}", self.path.display()))
    }
}

fn record_path(dir: &Path, id: &str) -> PathBuf {
    dir.join(format!("{id}.json"))
}

/// None where somebody else was faster to lock it.
fn create_locked(path: &Path) -> Result<Option<Flock<File>>> {
    let made = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(path);
    let file = match made {
        // Of a process that died between this and the renaming, or is about to be cleared away.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
        result => result.io_context(|| format!("making the store's record {}", path.display()))?,
    };
    lock(file, path)
}

/// None where it is locked by somebody.
pub(super) fn lock(file: File, path: &Path) -> Result<Option<Flock<File>>> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => Ok(Some(file)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(Error::io(format!("locking {}", path.display()), errno.into())),
    }
}

/// What a locked record holds; None where its owner removed or renamed it before we had the lock: what it
/// names may be somebody else's by now.
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
    // A line cut within a character is a line cut short.
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// A line cut short by a crash does not count; the one before it does.
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
            .map_err(|source| Error::bad_data("a store's record that is not right").with_source(source)),
        Some((version, _)) => {
            Err(Error::bad_data(format!("a store's record of version {version} instead of {VERSION}"))
                .next("run 'tidemark recover' of the version that wrote it"))
        }
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
pub(super) mod tests;
