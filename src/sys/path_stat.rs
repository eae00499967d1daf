//! Finds what is at a path, as far as the kernel knows without querying a server.
//!
//! Linux `include/uapi/linux/stat.h`, statx(2). Calls that may have to wait for a server are made by a child
//! process, see [`child_probe`].

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::child_probe::{self, Question, WORDS, Words};
use crate::base::DeviceNumber;

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// `st_dev`: the device of its file system.
    pub dev: DeviceNumber,
    /// `st_ino`.
    pub inode: u64,
    /// The number of the block device, if it is one.
    pub block_device: Option<DeviceNumber>,
    /// True for a regular file.
    pub is_file: bool,
    /// The id of the mount, as in mountinfo (Linux 5.8); 0 if the kernel does not report it.
    pub mount: u64,
}

impl Found {
    /// Asks in this thread, which waits if `path` leads through the file system of a dead server.
    ///
    /// # Errors
    /// The errno of statx(2).
    pub fn at(path: &Path) -> io::Result<Self> {
        StatQuestion::new(path, Cached)?.ask().map(StatQuestion::answer).map_err(io::Error::from_raw_os_error)
    }

    /// Asks in a child process, for at most [`child_probe::TIMEOUT`].
    ///
    /// # Errors
    /// The errno of statx(2); [`io::ErrorKind::TimedOut`].
    pub fn with_timeout(path: &Path) -> io::Result<Self> {
        child_probe::ask_one(StatQuestion::new(path, Cached)?, child_probe::TIMEOUT)
    }

    /// Asks the server, if there is one, even if the kernel has the answer cached. In a child process, for at
    /// most [`child_probe::TIMEOUT_FOR_NAMED`].
    ///
    /// # Errors
    /// As [`Found::with_timeout`].
    pub fn refreshed(path: &Path) -> io::Result<Self> {
        child_probe::ask_one(StatQuestion::new(path, Server)?, child_probe::TIMEOUT_FOR_NAMED)
    }

    /// Queries all `paths` in a child process, for at most [`child_probe::TIMEOUT`] each.
    #[must_use]
    pub fn all_with_timeout(paths: &[&Path]) -> Vec<io::Result<Self>> {
        match paths.iter().map(|path| StatQuestion::new(path, Cached)).collect::<io::Result<Vec<_>>>() {
            Ok(questions) => child_probe::ask(&questions),
            Err(error) => paths.iter().map(|_| Err(error.kind().into())).collect(),
        }
    }
}

/// The sizes of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilesystemSizes {
    /// Number of blocks.
    pub blocks: u64,
    /// Bytes per block.
    pub block_bytes: u64,
    /// Number of inodes.
    pub files: u64,
}

impl FilesystemSizes {
    /// The sizes of the file system of `path`. Asks in a child process, for at most [`child_probe::TIMEOUT`].
    ///
    /// # Errors
    /// The errno of statfs(2); [`io::ErrorKind::TimedOut`].
    pub fn with_timeout(path: &Path) -> io::Result<Self> {
        child_probe::ask_one(StatfsQuestion(terminated(path)?), child_probe::TIMEOUT)
    }
}

fn terminated(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Where an answer comes from.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// The kernel's cache.
    Cached,
    /// The server, if there is one.
    Server,
}

use Source::{Cached, Server};

/// The question for [`Found`].
#[derive(Debug)]
pub(super) struct StatQuestion {
    path: CString,
    sync: libc::c_int,
}

impl StatQuestion {
    pub(super) fn new(path: &Path, source: Source) -> io::Result<Self> {
        let sync = match source {
            Cached => libc::AT_STATX_DONT_SYNC,
            Server => libc::AT_STATX_FORCE_SYNC,
        };
        Ok(Self { path: terminated(path)?, sync })
    }

    pub(super) fn path(&self) -> &CStr {
        &self.path
    }
}

// SAFETY: `ask` makes one system call. libc's statx() is that call alone, or the call and its emulation by
// fstatat(); both are async-signal-safe.
unsafe impl Question for StatQuestion {
    type Answer = Found;

    fn ask(&self) -> Result<Words, i32> {
        let flags = libc::AT_NO_AUTOMOUNT | self.sync;
        let wanted = libc::STATX_TYPE | libc::STATX_INO | libc::STATX_MNT_ID;
        // SAFETY: zeros are a valid `struct statx`, which consists of numbers.
        let mut answer: libc::statx = unsafe { std::mem::zeroed() };
        // SAFETY: the path ends with a zero; the kernel writes one `struct statx` to the pointer, which is to a live
        // local.
        let result =
            unsafe { libc::statx(libc::AT_FDCWD, self.path.as_ptr(), flags, wanted, &raw mut answer) };
        if result < 0 {
            return Err(nix::errno::Errno::last_raw());
        }
        let number = |major: u32, minor: u32| u64::from(major) << 32 | u64::from(minor);
        let mount = if answer.stx_mask & libc::STATX_MNT_ID == 0 { 0 } else { answer.stx_mnt_id };
        Ok([
            number(answer.stx_dev_major, answer.stx_dev_minor),
            answer.stx_ino,
            number(answer.stx_rdev_major, answer.stx_rdev_minor),
            u64::from(answer.stx_mode),
            mount,
            0,
        ])
    }

    fn answer([dev, inode, rdev, mode, mount, _]: Words) -> Found {
        let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0);
        let number = |word: u64| DeviceNumber { major: low(word >> 32), minor: low(word) };
        let kind = low(mode) & libc::S_IFMT;
        Found {
            dev: number(dev),
            inode,
            block_device: (kind == libc::S_IFBLK).then(|| number(rdev)),
            is_file: kind == libc::S_IFREG,
            mount,
        }
    }
}

/// The question for [`FilesystemSizes`].
struct StatfsQuestion(CString);

// SAFETY: `ask` makes one system call.
unsafe impl Question for StatfsQuestion {
    type Answer = FilesystemSizes;

    fn ask(&self) -> Result<Words, i32> {
        // SAFETY: zeros are a valid `struct statfs`, which consists of numbers.
        let mut answer: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the path ends with a zero; the kernel writes one `struct statfs` to the pointer, which is to a live
        // local.
        if unsafe { libc::statfs(self.0.as_ptr(), &raw mut answer) } < 0 {
            return Err(nix::errno::Errno::last_raw());
        }
        let mut words = [0; WORDS];
        words[..3].copy_from_slice(&[answer.f_blocks, answer.f_frsize.unsigned_abs(), answer.f_files]);
        Ok(words)
    }

    fn answer([blocks, block_bytes, files, ..]: Words) -> FilesystemSizes {
        FilesystemSizes { blocks, block_bytes, files }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn the_result_agrees_with_stat() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let meta = file.as_file().metadata().unwrap();
        for found in [Found::at, Found::with_timeout, Found::refreshed].map(|lookup| lookup(file.path())) {
            let found = found.unwrap();
            assert_eq!((found.dev, found.inode), (DeviceNumber::from_dev(meta.dev()), meta.ino()));
            assert!(found.is_file && found.block_device.is_none());
            assert_eq!(Some(found.mount), crate::sys::process::mount_of(file.as_file()));
        }
        assert_eq!(Found::with_timeout(Path::new("/no/where")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(FilesystemSizes::with_timeout(file.path()).unwrap().blocks > 0);
    }
}
