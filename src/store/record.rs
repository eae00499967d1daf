//! Records what of a store must be released after a crash, and which process still uses it.
//!
//! The kernel drops most of a store by itself: the tail is an unnamed file on a loop device with autoclear.
//! This is not true of the RAM head, nor of a file that is to be kept. So before either is created, a
//! [`record`] of it is synced to `/run/tidemark/stores`, and again after each step. The owner
//! keeps the record locked; the lock dies with the process. Another process may then take the store over
//! ([`adopt`](super::adopt)) or release it ([`leftovers`](super::leftovers)).
//!
//! Crash argument of the head, by the record:
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

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::{Bytes, DeviceNumber, Error, Result};
use crate::format::state;
use crate::record::{self, FoundRecord, LockedRecord};

use super::plan::StorePlan;

/// Directory of the records.
pub const RECORD_DIR: &str = "/run/tidemark/stores";

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

/// The record of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    pub about: About,
    #[serde(flatten)]
    pub head: HeadRecord,
    pub file: Option<NamedFile>,
    /// The filesystem of the tail's file, once there is one.
    pub filesystem: Option<DeviceNumber>,
}

impl state::Record for Facts {
    const KIND: &'static str = "store";
}

/// A record owned by this process: locked while this value lives.
#[derive(Debug)]
pub(super) struct Record {
    record: LockedRecord<Facts>,
}

impl Record {
    /// Creates the record of store `id` in `dir`.
    ///
    /// # Errors
    /// As [`LockedRecord::create`].
    pub(super) fn create(dir: &Path, id: &str, about: About) -> Result<Self> {
        let facts = Facts { about, head: HeadRecord::Nothing, file: None, filesystem: None };
        Ok(Self { record: LockedRecord::create(dir, id, facts)? })
    }

    /// Takes over the record of store `id`, whose process died. Changes nothing yet.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if there is none or its process lives;
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) if it cannot be read, or has fields that this
    /// program does not know.
    pub(super) fn take_over(dir: &Path, id: &str) -> Result<Self> {
        let shown = record::path_of(dir, id);
        let found: FoundRecord<Facts> = record::find(dir, id)?.ok_or_else(|| {
            Error::refused(format!("there is no record of the store {id} ({})", shown.display()))
                .next("it has been released already; start a new copy")
        })?;
        if found.lock.is_none() {
            return Err(Error::refused(format!(
                "the store {id} is in use: its record {} is locked",
                shown.display()
            ))
            .next("wait for the process that uses it, or end it"));
        }
        if found.is_newer {
            return Err(Error::bad_data(format!(
                "a newer version of tidemark has written the store's record {}",
                shown.display()
            ))
            .next("use that version"));
        }
        Ok(Self { record: found.take_over().map_err(|error| error.next("run 'tidemark recover'"))? })
    }

    /// The present content.
    pub(super) fn facts(&self) -> &Facts {
        self.record.record()
    }

    /// Records the state of the head, or what is about to be done to it. Returns once that is on stable
    /// storage (a tmpfs: it outlives the process but not the host, and so do RAM disks).
    pub(super) fn note(&mut self, head: HeadRecord) -> Result<()> {
        self.record.record_mut().head = head;
        self.record.save()
    }

    /// As [`Record::note`], for a file that exists or is about to, and must be removed after a crash. None
    /// once it has been removed or belongs to the user.
    pub(super) fn note_file(&mut self, file: Option<NamedFile>) -> Result<()> {
        self.record.record_mut().file = file;
        self.record.save()
    }

    /// As [`Record::note`], for the filesystem of the tail's file.
    pub(super) fn note_filesystem(&mut self, filesystem: DeviceNumber) -> Result<()> {
        self.record.record_mut().filesystem = Some(filesystem);
        self.record.save()
    }

    /// Removes the record: everything that it names has been released.
    pub(super) fn close(self) -> Result<()> {
        self.record.remove(&[])
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
pub(super) mod tests;
