//! Puts a copy of a file or directory in the place of the present one.
//!
//! 1. A staging directory is made beside the target, on its filesystem, which only root can enter: the target's directory
//!    may belong to a user, who could change names in it meanwhile. A lock on it keeps a second command out.
//! 2. cp(1) copies the source into it, with owners, modes, times, extended attributes and links. All of it is written to
//!    the disk.
//! 3. One rename exchanges the copy and the target.
//! 4. The staging directory is removed, with the former target.
//!
//! After a crash the staging directory holds a part of the copy, or the former target. The next command for this
//! directory removes it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::fcntl::{
    AT_FDCWD, AtFlags, Flock, FlockArg, OFlag, OpenHow, RenameFlags, ResolveFlag, openat2, renameat2,
};
use nix::sys::stat::{UtimensatFlags, fstatat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::syncfs;

use crate::base::{DeviceNumber, Error, ErrorKind, Result, ResultExt as _, directory_of};
use crate::sys::beneath::open_beneath;
use crate::sys::process::{self, crash_point};
use crate::sys::signal;

/// The staging directory.
const STAGING: &str = ".tidemark-rollback";

/// The copy in it.
const COPY: &str = "copy";

/// Interval between two looks at cp(1).
const POLL: Duration = Duration::from_millis(20);

/// What is copied.
pub(super) struct Source {
    /// Its directory.
    directory: File,
    name: OsString,
    /// When it was read and modified last.
    times: [TimeSpec; 2],
}

/// A target whose place is claimed.
pub(super) struct Exchange {
    // Dropped first: it is reached through the target's directory.
    staging: Staging,
    /// The target's directory.
    directory: File,
    path: PathBuf,
    name: OsString,
}

/// The staging directory, removed when this is dropped.
struct Staging {
    path: PathBuf,
    directory: Flock<File>,
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!("removing {}: {error}; remove it", self.path.display());
        }
    }
}

impl Source {
    /// What is at `within` below `root`, reached without symbolic links. It may be one itself.
    ///
    /// # Errors
    /// The errno.
    pub fn find(root: &File, within: &Path) -> io::Result<Self> {
        let directory = within.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory =
            open_beneath(root, directory.unwrap_or(Path::new(".")), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let name = within.file_name().unwrap_or(OsStr::new(".")).to_owned();
        let found = fstatat(&directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let times = [
            TimeSpec::new(found.st_atime, found.st_atime_nsec),
            TimeSpec::new(found.st_mtime, found.st_mtime_nsec),
        ];
        Ok(Self { directory, name, times })
    }
}

impl Exchange {
    /// Claims the place of `path`, whose directory is reached without symbolic links and is on the filesystem of `device`.
    /// Changes nothing but for the staging directory.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if another command works there; I/O errors.
    pub fn prepare(path: &Path, device: DeviceNumber) -> Result<Self> {
        let parent = directory_of(path);
        let what = || format!("opening {}", parent.display());
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let directory = openat2(AT_FDCWD, parent, how).map_err(io::Error::from).io_context(what)?;
        let directory = File::from(directory);
        let meta = directory.metadata().io_context(what)?;
        if DeviceNumber::from_dev(meta.dev()) != device {
            return Err(Error::refused(format!(
                "another filesystem has been mounted at {}",
                parent.display()
            ))
            .next("try again"));
        }
        let name = path.file_name().unwrap_or(OsStr::new("")).to_owned();
        // Reached through the open directory, so it stays the same one whatever is renamed.
        let staging = Staging::make(&process::path_of(&directory).join(STAGING), &parent.join(STAGING))?;
        Ok(Self { staging, directory, path: path.to_owned(), name })
    }

    /// Copies `source` and exchanges.
    ///
    /// # Errors
    /// [`ErrorKind::External`] if cp(1) fails, I/O errors, those of `interrupt`. Then the target is as it was.
    pub fn run(self, source: &Source, interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
        let shown = self.path.display();
        self.copy(source, interrupt)?;
        crash_point("snapshot.only.copied");
        let synced = syncfs(&self.directory).map_err(io::Error::from);
        synced.io_context(|| format!("writing the copy of {shown}"))?;
        let rename = |flags| {
            let renamed =
                renameat2(&*self.staging.directory, COPY, &self.directory, self.name.as_os_str(), flags);
            renamed.map_err(io::Error::from)
        };
        let renamed = match rename(RenameFlags::RENAME_EXCHANGE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => rename(RenameFlags::RENAME_NOREPLACE),
            other => other,
        };
        renamed.io_context(|| format!("replacing {shown}"))?;
        // The exchange of a directory modifies it on XFS (its entry "..": fs/xfs/xfs_inode.c, xfs_cross_rename).
        let [read, modified] = &source.times;
        let no_follow = UtimensatFlags::NoFollowSymlink;
        if let Err(errno) = utimensat(&self.directory, self.name.as_os_str(), read, modified, no_follow) {
            tracing::warn!("setting the times of {shown}: {errno}");
        }
        self.directory.sync_all().io_context(|| format!("replacing {shown}"))?;
        crash_point("snapshot.only.exchanged");
        Ok(())
    }

    fn copy(&self, source: &Source, interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
        let source = process::path_of(&source.directory).join(&source.name);
        let target = process::path_of(&self.staging.directory).join(COPY);
        let mut command = Command::new("cp");
        command.args(["--archive", "--no-target-directory", "--reflink=never", "--"]).arg(source).arg(target);
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let failed = |what: String| Error::new(ErrorKind::External, what);
        let started = signal::with_usr1_unblocked(|| command.spawn());
        let mut child = started.map_err(|source| failed("starting cp(1)".to_owned()).with_source(source))?;
        loop {
            if let Some(status) = child.try_wait().io_context(|| "waiting for cp(1)".to_owned())? {
                let shown = self.path.display();
                return if status.success() {
                    Ok(())
                } else {
                    Err(failed(format!("copying {shown} out of the snapshot: cp(1) failed: {status}"))
                        .state(format!("{shown} is as it was")))
                };
            }
            if let Err(error) = interrupt() {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
            thread::sleep(POLL);
        }
    }
}

impl Staging {
    /// `shown` is the path for the user.
    fn make(path: &Path, shown: &Path) -> Result<Self> {
        let made = || match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        };
        made().io_context(|| format!("creating {}", shown.display()))?;
        let what = || format!("opening {}", shown.display());
        let how =
            OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC);
        let opened = openat2(AT_FDCWD, path, how).map_err(io::Error::from).io_context(what)?;
        let directory = File::from(opened);
        let meta = directory.metadata().io_context(what)?;
        let foreign = |why: &str| {
            Error::refused(format!("{} {why}", shown.display()))
                .state("nothing was changed")
                .next("wait for that command, or look at it and remove it")
        };
        if meta.uid() != 0 || meta.mode() & 0o077 != 0 {
            return Err(foreign("exists, and other users than root can enter it"));
        }
        let directory = Flock::lock(directory, FlockArg::LockExclusiveNonblock)
            .map_err(|_| foreign("is in use by another command"))?;
        let staging = Self { path: path.to_owned(), directory };
        // What a command that died has left: a part of a copy, or what it had replaced.
        for entry in fs::read_dir(path).io_context(what)? {
            let entry = entry.io_context(what)?.path();
            let removed = if entry.is_dir() && !entry.is_symlink() {
                fs::remove_dir_all(&entry)
            } else {
                fs::remove_file(&entry)
            };
            removed.io_context(|| format!("removing what an earlier command left in {}", shown.display()))?;
        }
        Ok(staging)
    }
}
