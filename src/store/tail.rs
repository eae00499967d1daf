//! Creates and enlarges the disk tail.
//!
//! A file through a loop device with direct I/O, or a whole block device. Invariants:
//! - Space is allocated in the filesystem before the loop device shows it: a full filesystem makes a growth
//!   fail, never a write to the store.
//! - A file that is not kept has no name: `O_TMPFILE` if the filesystem supports it, else unlinked at once.
//!   With the loop device's autoclear flag, nothing of it outlives its last user.
//! - A kept file has its name from the start, and mode 0600, as it holds the origin's data. The record names
//!   it from before it is created until it belongs to the user.
//! - A tail that another process created is used as it is. Its file can be opened only if it has a name, so
//!   an unnamed one is followed by a further tail instead of being enlarged. That one must be on the same
//!   filesystem: nothing has checked that what is mounted at the same path now is not on the origin.
//!
//! Must not change the settings of the backing block device, nor settings of a loop device that outlive the
//! attachment (queue settings do, and would reach the next user of the same number).

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;

use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt, directory_of};
use crate::sys::loop_device::{self, LoopDevice};
use crate::sys::process::crash_point;

use super::head::load_module;
use super::place::{DEFAULT_DIRECTORY, TailPlace, device_bytes, free_beyond_reserve};
use super::record::{Inode, NamedFile, Record};
use super::size;

/// Zeros written at a time if the filesystem cannot allocate space.
const ZERO_STEP: usize = 1 << 20;

/// A tail that this process uses.
#[derive(Debug)]
pub(super) struct Tail {
    pub number: DeviceNumber,
    /// Space that is allocated and visible on the device.
    pub bytes: Bytes,
    backing: Backing,
    description: String,
}

#[derive(Debug)]
enum Backing {
    File {
        file: File,
        name: Option<PathBuf>,
        device: LoopDevice,
    },
    Device,
    /// An unnamed file of a process that died; the store's table keeps its loop device open.
    Adopted,
}

impl Tail {
    /// Creates a tail of `bytes` at `place`. With `keep_as`, a file in a directory gets this name, and a file
    /// at a given path keeps its name; `record` has the name by then. Adds warnings for the user to
    /// `warnings`.
    pub(super) fn make(
        place: &TailPlace,
        bytes: Bytes,
        keep_as: Option<&str>,
        record: &mut Record,
        warnings: &mut Vec<String>,
    ) -> Result<Self> {
        let (directory, name) = match place {
            TailPlace::Device { path, number, .. } => {
                return Self::on_device(path, *number, bytes);
            }
            TailPlace::Directory(path) => {
                if path == Path::new(DEFAULT_DIRECTORY) {
                    make_default_directory(path)?;
                }
                (path.clone(), keep_as.map(|name| path.join(name)))
            }
            TailPlace::NewFile(path) => (directory_of(path).to_owned(), keep_as.map(|_| path.clone())),
        };
        let file = match &name {
            Some(path) => create_named(path, record)?,
            None => create_nameless(&directory, record)?,
        };
        let description = name.as_ref().unwrap_or(&directory).display().to_string();
        let result = filesystem_of(&file, &description)
            .and_then(|filesystem| record.note_filesystem(filesystem))
            .and_then(|()| Self::on_file(file, name.clone(), bytes, description, warnings));
        result.map_err(|error| match name.map(|path| fs::remove_file(&path).map_err(|e| (path, e))) {
            Some(Err((path, undo))) => {
                error.with_failed_undo(Error::io(format!("removing {}", path.display()), undo))
            }
            _ => error.next("choose another place with --store, or a smaller --store-size"),
        })
    }

    /// Creates a further tail of at most `wanted` bytes, or less to keep the filesystem's reserve. It follows
    /// one that cannot be enlarged any more.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if there is no space; [`ErrorKind::Refused`] if `directory` is not on the
    /// filesystem that it was on when the store was created.
    pub(super) fn make_further(directory: &Path, wanted: Bytes, record: &mut Record) -> Result<Self> {
        let description = directory.display().to_string();
        let what = || format!("enlarging the store in {description} by {wanted}");
        let file = create_nameless(directory, record)?;
        if record.facts().filesystem != Some(filesystem_of(&file, &description)?) {
            return Err(Error::refused(format!("{}: another filesystem is mounted there now", what()))
                .next("mount the one that was there when the copy began"));
        }
        let space = fstatvfs(&file).io_context(what)?;
        let bytes = wanted.min(free_beyond_reserve(&space)).align_down(size::STORE_UNIT);
        if bytes == Bytes::ZERO {
            return Err(no_space(&what()));
        }
        let mut warnings = Vec::new();
        let tail = Self::on_file(file, None, bytes, description.clone(), &mut warnings)?;
        for warning in warnings {
            tracing::debug!("{warning}");
        }
        Ok(tail)
    }

    fn on_file(
        file: File,
        name: Option<PathBuf>,
        bytes: Bytes,
        description: String,
        warnings: &mut Vec<String>,
    ) -> Result<Self> {
        let what = || format!("allocating {bytes} for the store in {description}");
        // Check first: a doomed allocation would fill the filesystem for everything else until it fails.
        let space = fstatvfs(&file).io_context(what)?;
        let free = Bytes(space.blocks_available().saturating_mul(space.fragment_size()));
        if free < bytes {
            return Err(Error::new(ErrorKind::NoSpace, format!("{}: only {free} is free", what())));
        }
        allocate(&file, Bytes::ZERO, bytes).io_context(what)?;
        let (device, number) = attach(&file, DIRECT_IO_ALIGN, &description, warnings)?;
        Ok(Self { number, bytes, backing: Backing::File { file, name, device }, description })
    }

    /// A tail that another process created and that the store's table maps: the loop device `number`, with
    /// its first `mapped` bytes in use. `named` is its file, if that has a name; `place` is for messages. If
    /// the tail `is_last`, space that an enlargement added but could not map is used too.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if it is not what the record describes.
    pub(super) fn adopt(
        place: &TailPlace,
        number: DeviceNumber,
        mapped: Bytes,
        is_last: bool,
        named: Option<&NamedFile>,
    ) -> Result<Self> {
        if let TailPlace::Device { path, number: planned, .. } = place {
            let description = path.display().to_string();
            debug_assert_eq!(*planned, number, "the layout was checked");
            return Ok(Self { number, bytes: mapped, backing: Backing::Device, description });
        }
        let description = place.path().display().to_string();
        let path = loop_path(number)?;
        let what = || format!("examining the store's loop device {}", path.display());
        let status = loop_device::status(&path)
            .io_context(what)?
            .ok_or_else(|| Error::refused(format!("{} has no file", path.display())))?;
        if !status.autoclear {
            return Err(Error::refused(format!(
                "{} was not set up by Tidemark: it has no autoclear flag",
                path.display()
            )));
        }
        // Space is allocated before the loop device shows it.
        let shown = device_bytes(number)?.align_down(DIRECT_IO_ALIGN);
        if shown < mapped {
            return Err(Error::refused(format!("{} has {shown} instead of {mapped}", path.display())));
        }
        let bytes = if is_last { shown } else { mapped };
        let Some(named) = named else {
            return Ok(Self { number, bytes, backing: Backing::Adopted, description });
        };
        let name = named.path.clone();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&name)
            .io_context(|| format!("opening the store {}", name.display()))?;
        let metadata = file.metadata().io_context(|| format!("examining the store {}", name.display()))?;
        let backing_inode =
            Inode { filesystem: DeviceNumber::from_dev(status.backing_dev), number: status.backing_inode };
        if named.inode != Some(Inode::of(&metadata)) || named.inode != Some(backing_inode) {
            return Err(Error::refused(format!("{} is not the store's file", name.display())));
        }
        let device = LoopDevice::open(&path).io_context(what)?;
        Ok(Self { number, bytes, backing: Backing::File { file, name: Some(name), device }, description })
    }

    /// Device-mapper opens the device exclusively when the table is loaded; this check gives a better
    /// message.
    pub(super) fn on_device(path: &Path, number: DeviceNumber, bytes: Bytes) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
            .open(path)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => Error::refused(format!("the store {} is in use", path.display()))
                    .with_source(error)
                    .next("name a block device that is neither mounted nor part of another device"),
                _ => Error::io(format!("opening the store {}", path.display()), error),
            })?;
        let found = file
            .metadata()
            .io_context(|| format!("examining the store {}", path.display()))
            .map(|metadata| DeviceNumber::from_dev(metadata.rdev()))?;
        if found != number {
            return Err(Error::refused(format!("{} was replaced by another device", path.display())));
        }
        Ok(Self { number, bytes, backing: Backing::Device, description: path.display().to_string() })
    }

    /// False for a tail of fixed size.
    pub(super) fn can_grow(&self) -> bool {
        matches!(self.backing, Backing::File { .. })
    }

    /// Allocates up to `wanted` bytes, or less to keep the filesystem's reserve, and shows them on the loop
    /// device. Returns the new size.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if nothing could be added.
    pub(super) fn grow(&mut self, wanted: Bytes) -> Result<Bytes> {
        let what = || format!("enlarging the store in {} to {wanted}", self.description);
        let Backing::File { file, device, .. } = &self.backing else {
            return Err(Error::new(ErrorKind::NoSpace, what()).state("its size is fixed"));
        };
        let space = fstatvfs(file).io_context(what)?;
        let target = wanted.min(self.bytes + free_beyond_reserve(&space)).align_down(size::STORE_UNIT);
        if target <= self.bytes {
            return Err(no_space(&what()));
        }
        extend(file, self.bytes, target, what)?;
        device.refresh_size().io_context(what)?;
        self.bytes = target;
        Ok(target)
    }

    /// Releases a tail that nothing maps any more. With `keep`, a named file stays, synced and owned by the
    /// user, and its path is returned; otherwise it is removed. (A block device always stays.)
    pub(super) fn release(self, keep: bool, record: &mut Record) -> Result<Option<PathBuf>> {
        let Backing::File { file, name, device } = self.backing else { return Ok(None) };
        drop(device);
        match name {
            Some(path) if keep => {
                file.sync_all().io_context(|| format!("syncing the store {}", path.display()))?;
                File::open(directory_of(&path))
                    .and_then(|directory| directory.sync_all())
                    .io_context(|| format!("syncing the directory of {}", path.display()))?;
                crash_point("store.keep.before");
                record.note_file(None)?;
                crash_point("store.keep.after");
                Ok(Some(path))
            }
            Some(path) => {
                fs::remove_file(&path).io_context(|| format!("removing the store {}", path.display()))?;
                Ok(None)
            }
            None => Ok(None),
        }
    }
}

fn no_space(what: &str) -> Error {
    Error::new(ErrorKind::NoSpace, format!("{what}: the filesystem has no space beyond its reserve"))
}

fn filesystem_of(file: &File, description: &str) -> Result<DeviceNumber> {
    let metadata = file.metadata().io_context(|| format!("examining the store in {description}"))?;
    Ok(DeviceNumber::from_dev(metadata.dev()))
}

/// The path of the loop device with this number.
pub(super) fn loop_path(number: DeviceNumber) -> Result<PathBuf> {
    let link = format!("/sys/dev/block/{number}");
    let target = fs::read_link(&link).io_context(|| format!("reading {link}"))?;
    match target.file_name().and_then(|name| name.to_str()).filter(|name| name.starts_with("loop")) {
        Some(name) => Ok(Path::new("/dev").join(name)),
        None => Err(Error::refused(format!("the device {number} is not a loop device"))),
    }
}

/// Makes the loop device with this number show the present size of its file.
pub(super) fn refresh_loop(number: DeviceNumber) -> io::Result<()> {
    let path = loop_path(number).map_err(io::Error::other)?;
    LoopDevice::open(&path)?.refresh_size()
}

/// Creates the directory that stores are in unless another one is named.
pub(super) fn make_default_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .io_context(|| format!("making the directory {}", path.display()))
        .map_err(|error| error.next("choose another place with --store"))
}

/// A new, empty file. The record has its name before and its inode after it is created.
fn create_named(path: &Path, record: &mut Record) -> Result<File> {
    record.note_file(Some(NamedFile { path: path.to_owned(), inode: None }))?;
    crash_point("store.named.before");
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = match made {
        Ok(file) => file,
        Err(error) => {
            let error = Error::io(format!("making the store {}", path.display()), error);
            return Err(error.after_undo(record.note_file(None)));
        }
    };
    crash_point("store.named.after");
    let metadata = file.metadata().io_context(|| format!("examining the store {}", path.display()))?;
    record.note_file(Some(NamedFile { path: path.to_owned(), inode: Some(Inode::of(&metadata)) }))?;
    crash_point("store.named.noted");
    Ok(file)
}

fn create_nameless(directory: &Path, record: &mut Record) -> Result<File> {
    let what = || format!("making a file for the store in {}", directory.display());
    let nameless =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(directory);
    match nameless {
        // The filesystem has no unnamed files (the last two errors: kernels without O_TMPFILE).
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOENT | libc::EISDIR)
            ) => {}
        other => return other.io_context(what),
    }
    let path = directory.join(format!(".tidemark-{}", uuid::Uuid::new_v4()));
    let file = create_named(&path, record)?;
    fs::remove_file(&path).io_context(what)?;
    record.note_file(None)?;
    Ok(file)
}

/// Allocates `from..to` after the present end of `file`, or leaves it as it is. The loop device still shows the old
/// size, so nothing uses the new space yet.
pub(super) fn extend(file: &File, from: Bytes, to: Bytes, what: impl Fn() -> String) -> Result<()> {
    let undo = || file.set_len(from.get()).io_context(|| "releasing a part of it".to_owned());
    allocate(file, from, to).map_err(|error| Error::io(what(), error).after_undo(undo()))
}

/// Allocates `from..to`, by writing zeros if the filesystem cannot allocate.
pub(super) fn allocate(file: &File, from: Bytes, to: Bytes) -> io::Result<()> {
    let offset = |bytes: Bytes| i64::try_from(bytes.get()).map_err(io::Error::other);
    match fallocate(file.as_fd(), FallocateFlags::empty(), offset(from)?, offset(to.saturating_sub(from))?) {
        Ok(()) => return Ok(()),
        Err(nix::errno::Errno::EOPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    let zeros = vec![0u8; ZERO_STEP];
    let mut at = from;
    while at < to {
        let length = Bytes::from_len(ZERO_STEP).min(to - at);
        file.write_all_at(&zeros[..length.as_len()], at.get())?;
        at += length;
    }
    Ok(())
}

/// Attaches `file` to a loop device that goes with its last user. `block`: its logical block; all devices on it have
/// blocks at least as large. Adds warnings for the user to `warnings`.
pub(super) fn attach(
    file: &File,
    block: Bytes,
    description: &str,
    warnings: &mut Vec<String>,
) -> Result<(LoopDevice, DeviceNumber)> {
    let what = || format!("attaching the store in {description} to a loop device");
    if fstatfs(file).is_ok_and(|status| status.filesystem_type() == TMPFS_MAGIC) {
        warnings.push(format!("the store's tail in {description} is on a tmpfs: it takes memory"));
    }
    let block = u32::try_from(block.get()).expect("a block fits u32");
    let attach_direct = || LoopDevice::attach(file, block, true);
    let device = attach_direct().or_else(|error| match error.raw_os_error() {
        Some(libc::ENOENT) if load_module("loop", &[]) => attach_direct(),
        // Kernels from 6.15 on refuse direct I/O in cases in which earlier ones silently use buffered I/O.
        Some(libc::EINVAL) => LoopDevice::attach(file, block, false),
        _ => Err(error),
    });
    let device = device.io_context(what)?;
    if !device.status().io_context(what)?.direct_io {
        warnings.push(format!(
            "the filesystem of {description} has no direct I/O: the store's tail goes through the page \
             cache, which is slower and takes memory"
        ));
    }
    let number = DeviceNumber::from_dev(device.rdev().io_context(what)?);
    Ok((device, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> (tempfile::TempDir, Record) {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::create(dir.path(), "a", crate::store::record::tests::about("a")).unwrap();
        (dir, record)
    }

    fn may_attach() -> bool {
        nix::unistd::geteuid().is_root() && Path::new(crate::sys::loop_device::CONTROL_PATH).exists()
    }

    #[test]
    fn a_tail_has_its_space_and_leaves_nothing() {
        if !may_attach() {
            return;
        }
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let place = TailPlace::Directory(dir.path().to_owned());
        let (_records, mut record) = record();
        let mut tail = Tail::make(&place, Bytes::mib(4), None, &mut record, &mut Vec::new()).unwrap();
        assert_eq!(record.facts().file, None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the file has a name");
        assert_eq!(device_bytes(tail.number).unwrap(), Bytes::mib(4));
        assert_eq!(tail.grow(Bytes::mib(9)).unwrap(), Bytes::mib(9));
        assert_eq!(device_bytes(tail.number).unwrap(), Bytes::mib(9));
        let Backing::File { file, .. } = &tail.backing else { panic!("a file") };
        assert!(file.metadata().unwrap().blocks() * 512 >= Bytes::mib(9).get(), "not allocated");
        assert_eq!(tail.release(true, &mut record).unwrap(), None);
    }

    #[test]
    fn a_kept_tail_stays_under_its_name_and_a_discarded_one_goes() {
        if !may_attach() {
            return;
        }
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("kept");
        for keep in [false, true] {
            let place = TailPlace::NewFile(path.clone());
            let (_records, mut record) = record();
            let tail =
                Tail::make(&place, Bytes::mib(1), Some("unused"), &mut record, &mut Vec::new()).unwrap();
            let inode = Some(Inode::of(&fs::metadata(&path).unwrap()));
            assert_eq!(record.facts().file, Some(NamedFile { path: path.clone(), inode }));
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            assert_eq!(tail.release(keep, &mut record).unwrap(), keep.then(|| path.clone()));
            assert_eq!(path.exists(), keep);
            // A kept file belongs to the user from here on.
            assert_eq!(record.facts().file.is_none(), keep);
        }
        // An existing file is never overwritten.
        let (_records, mut record) = record();
        let place = TailPlace::NewFile(path);
        let error = Tail::make(&place, Bytes::mib(1), Some("x"), &mut record, &mut Vec::new());
        assert_eq!(error.unwrap_err().errno(), Some(libc::EEXIST));
        assert_eq!(record.facts().file, None, "a foreign file is in the record");
    }

    #[test]
    fn a_further_tail_is_on_the_same_filesystem_and_leaves_its_reserve() {
        if !may_attach() {
            return;
        }
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let place = TailPlace::Directory(dir.path().to_owned());
        let (_records, mut record) = record();
        let refused = Tail::make_further(dir.path(), Bytes::mib(3), &mut record).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused, "no tail was made here yet");
        let first = Tail::make(&place, Bytes::mib(1), None, &mut record, &mut Vec::new()).unwrap();
        let mut make_further = Tail::make_further(dir.path(), Bytes::mib(3), &mut record).unwrap();
        assert_ne!(first.number, make_further.number);
        assert_eq!(make_further.grow(Bytes::mib(5)).unwrap(), Bytes::mib(5));
        let elsewhere = Path::new("/dev/shm");
        if elsewhere.is_dir() {
            let error = Tail::make_further(elsewhere, Bytes::mib(3), &mut record).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_tail_of_a_dead_process_is_adopted_by_its_device() {
        if !may_attach() {
            return;
        }
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (_records, mut record) = record();
        let path = dir.path().join("kept");
        let place = TailPlace::NewFile(path.clone());
        let mut tail = Tail::make(&place, Bytes::mib(2), Some("x"), &mut record, &mut Vec::new()).unwrap();
        tail.grow(Bytes::mib(3)).unwrap();
        let named = record.facts().file.clone();
        let adopt =
            |mapped, last, named: Option<&NamedFile>| Tail::adopt(&place, tail.number, mapped, last, named);
        // Space that was added but never mapped counts only for the last tail: other tails follow the rest.
        assert_eq!(adopt(Bytes::mib(2), false, None).unwrap().bytes, Bytes::mib(2));
        let last = adopt(Bytes::mib(2), true, None).unwrap();
        assert_eq!((last.bytes, last.can_grow()), (Bytes::mib(3), false));
        let mut by_name = adopt(Bytes::mib(2), true, named.as_ref()).unwrap();
        assert_eq!(by_name.grow(Bytes::mib(4)).unwrap(), Bytes::mib(4));
        assert_eq!(device_bytes(tail.number).unwrap(), Bytes::mib(4));

        let refused = |result: Result<Tail>| result.unwrap_err().kind() == ErrorKind::Refused;
        assert!(refused(adopt(Bytes::mib(5), true, None)), "larger than the device");
        let no_loop = DeviceNumber { major: 1, minor: 3 };
        assert!(Tail::adopt(&place, no_loop, Bytes::mib(1), true, None).is_err(), "not a loop device");
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "another").unwrap();
        assert!(refused(adopt(Bytes::mib(2), true, named.as_ref())), "another file of that name");
        assert_eq!(fs::read(&path).unwrap(), b"another");
    }

    #[test]
    fn a_filesystem_that_is_too_small_is_no_space() {
        if !may_attach() {
            return;
        }
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let place = TailPlace::Directory(dir.path().to_owned());
        let free = place.available().unwrap();
        let (_records, mut record) = record();
        let mut tail = Tail::make(&place, Bytes::mib(1), None, &mut record, &mut Vec::new()).unwrap();
        let error = Tail::make(&place, free * 4, None, &mut record, &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        assert_eq!(error.errno(), None, "it was tried, and filled the disk for a moment");
        assert!(tail.grow(Bytes::mib(1)).is_err(), "no growth is no success");
        assert_eq!(tail.bytes, Bytes::mib(1));
    }
}
