//! What is at a path, as far as the kernel knows without asking a server?
//!
//! Linux `include/uapi/linux/stat.h`, statx(2). What cannot be known so is asked of a child process, see
//! [`inquiry`].

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::inquiry::{self, Question, WORDS, Words};
use crate::base::DeviceNumber;

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// `st_dev`: the device of its file system.
    pub dev: DeviceNumber,
    /// `st_ino`.
    pub inode: u64,
    /// The block device that it stands for; None for everything else.
    pub block_device: Option<DeviceNumber>,
    /// It is a regular file.
    pub is_file: bool,
    /// The mount's number, as in mountinfo (Linux 5.8); 0 where the kernel does not tell.
    pub mount: u64,
}

impl Found {
    /// Asks from this thread: where the way to `path` leads through the file system of a server, it may wait for that.
    ///
    /// # Errors
    /// The errno of statx(2).
    pub fn at(path: &Path) -> io::Result<Self> {
        WhatIsAt::new(path, Known)?.ask().map(WhatIsAt::answer).map_err(io::Error::from_raw_os_error)
    }

    /// Asks from a child process, for [`inquiry::PATIENCE`] at most.
    ///
    /// # Errors
    /// The errno of statx(2); [`io::ErrorKind::TimedOut`].
    pub fn in_time(path: &Path) -> io::Result<Self> {
        inquiry::ask_one(WhatIsAt::new(path, Known)?, inquiry::PATIENCE)
    }

    /// Has the server asked, where there is one, even if the kernel knows what it would say; from a child process, for
    /// [`inquiry::PATIENCE_FOR_NAMED`] at most.
    ///
    /// # Errors
    /// As [`Found::in_time`].
    pub fn asked_anew(path: &Path) -> io::Result<Self> {
        inquiry::ask_one(WhatIsAt::new(path, Anew)?, inquiry::PATIENCE_FOR_NAMED)
    }

    /// Asks for all `paths` from a child process, for [`inquiry::PATIENCE`] each at most.
    #[must_use]
    pub fn all_in_time(paths: &[&Path]) -> Vec<io::Result<Self>> {
        match paths.iter().map(|path| WhatIsAt::new(path, Known)).collect::<io::Result<Vec<_>>>() {
            Ok(questions) => inquiry::ask(&questions),
            Err(error) => paths.iter().map(|_| Err(error.kind().into())).collect(),
        }
    }
}

/// Sizes of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Of all blocks.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// All inodes.
    pub files: u64,
}

impl Figures {
    /// Those of the file system that `path` is in. Asks from a child process, for [`inquiry::PATIENCE`] at most.
    ///
    /// # Errors
    /// The errno of statfs(2); [`io::ErrorKind::TimedOut`].
    pub fn in_time(path: &Path) -> io::Result<Self> {
        inquiry::ask_one(FiguresOf(terminated(path)?), inquiry::PATIENCE)
    }
}

fn terminated(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Whose word is taken.
#[derive(Clone, Copy)]
enum Word {
    /// The kernel's.
    Known,
    /// The server's, where there is one.
    Anew,
}

use Word::{Anew, Known};

/// [`Found`].
struct WhatIsAt {
    path: CString,
    sync: libc::c_int,
}

impl WhatIsAt {
    fn new(path: &Path, word: Word) -> io::Result<Self> {
        let sync = match word {
            Known => libc::AT_STATX_DONT_SYNC,
            Anew => libc::AT_STATX_FORCE_SYNC,
        };
        Ok(Self { path: terminated(path)?, sync })
    }
}

// SAFETY: `ask` makes one system call. libc's statx() is that call alone, or the call and its emulation by fstatat();
// both are async-signal-safe.
unsafe impl Question for WhatIsAt {
    type Answer = Found;

    fn ask(&self) -> Result<Words, i32> {
        let flags = libc::AT_NO_AUTOMOUNT | self.sync;
        let wanted = libc::STATX_TYPE | libc::STATX_INO | libc::STATX_MNT_ID;
        // SAFETY: zeros are a valid `struct statx`, which consists of numbers.
        let mut answer: libc::statx = unsafe { std::mem::zeroed() };
        // SAFETY: the path ends with a zero; the kernel writes one `struct statx` to the pointer, which is to a live local.
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

/// [`Figures`].
struct FiguresOf(CString);

// SAFETY: `ask` makes one system call.
unsafe impl Question for FiguresOf {
    type Answer = Figures;

    fn ask(&self) -> Result<Words, i32> {
        // SAFETY: zeros are a valid `struct statfs`, which consists of numbers.
        let mut answer: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the path ends with a zero; the kernel writes one `struct statfs` to the pointer, which is to a live local.
        if unsafe { libc::statfs(self.0.as_ptr(), &raw mut answer) } < 0 {
            return Err(nix::errno::Errno::last_raw());
        }
        let mut words = [0; WORDS];
        words[..3].copy_from_slice(&[answer.f_blocks, answer.f_frsize.unsigned_abs(), answer.f_files]);
        Ok(words)
    }

    fn answer([blocks, block_bytes, files, ..]: Words) -> Figures {
        Figures { blocks, block_bytes, files }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn it_is_what_stat_says() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let meta = file.as_file().metadata().unwrap();
        for found in [Found::at, Found::in_time, Found::asked_anew].map(|look| look(file.path())) {
            let found = found.unwrap();
            assert_eq!((found.dev, found.inode), (DeviceNumber::from_dev(meta.dev()), meta.ino()));
            assert!(found.is_file && found.block_device.is_none());
            assert_eq!(Some(found.mount), crate::sys::process::mount_of(file.as_file()));
        }
        assert_eq!(Found::in_time(Path::new("/no/where")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(Figures::in_time(file.path()).unwrap().blocks > 0);
    }
}
