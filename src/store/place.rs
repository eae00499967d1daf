//! Chooses the place of the tail, and determines how much space there is.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{Statvfs, statvfs};
use serde::{Deserialize, Serialize};

use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt as _, Sectors, directory_of};

use super::size;

/// Directory of the tail if `--store` is not given.
pub const DEFAULT_DIRECTORY: &str = "/var/lib/tidemark";

/// The place of the tail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TailPlace {
    /// A file in this directory, without a name unless the store is kept.
    Directory(PathBuf),
    /// A new file at this path.
    NewFile(PathBuf),
    /// This whole block device; its content is lost.
    Device {
        /// Its path.
        path: PathBuf,
        /// Its number.
        number: DeviceNumber,
        /// Its size.
        bytes: Bytes,
    },
}

impl TailPlace {
    /// Interprets the value of `--store`; None means [`DEFAULT_DIRECTORY`].
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] unless the path is a directory, a block device or a file that does not exist
    /// yet; [`ErrorKind::Usage`] for a zram device (memory is the head's part).
    pub fn resolve(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::Directory(PathBuf::from(DEFAULT_DIRECTORY))) };
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Ok(Self::Directory(path.to_owned())),
            Ok(metadata) if metadata.file_type().is_block_device() => {
                Self::device(path, DeviceNumber::from_dev(metadata.rdev()))
            }
            Ok(_) => Err(Error::refused(format!(
                "--store {}: neither a directory nor a block device",
                path.display()
            ))
            .next("name a directory, a block device, or a file that does not exist yet")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = directory_of(path).to_owned();
                match fs::metadata(&parent) {
                    Ok(metadata) if metadata.is_dir() && path.file_name().is_some() => {
                        Ok(Self::NewFile(path.to_owned()))
                    }
                    _ => Err(Error::refused(format!(
                        "--store {}: {} is not a directory",
                        path.display(),
                        parent.display()
                    ))
                    .next("create the directory first, or choose another place")),
                }
            }
            Err(error) => Err(error).io_context(|| format!("examining --store {}", path.display())),
        }
    }

    fn device(path: &Path, number: DeviceNumber) -> Result<Self> {
        let link = fs::read_link(format!("/sys/dev/block/{number}")).unwrap_or_default();
        let name = link.file_name().and_then(|name| name.to_str()).unwrap_or("");
        if name.starts_with("zram") {
            return Err(Error::usage(format!(
                "--store {}: a zram device cannot be the tail",
                path.display()
            ))
            .next("set the memory with --store-ram, and name a disk with --store"));
        }
        Ok(Self::Device { path: path.to_owned(), number, bytes: device_bytes(number)? })
    }

    /// An existing path on the device that the tail will be on: the block device itself, or a directory. The
    /// devices below are found from there.
    #[must_use]
    pub fn anchor(&self) -> PathBuf {
        let mut at = match self {
            Self::Device { path, .. } => return path.clone(),
            Self::Directory(path) => path.clone(),
            Self::NewFile(path) => directory_of(path).to_owned(),
        };
        while !at.exists() {
            if !at.pop() {
                return PathBuf::from("/");
            }
        }
        at
    }

    /// The directory of its file; None for a block device.
    pub(super) fn directory(&self) -> Option<PathBuf> {
        match self {
            Self::Device { .. } => None,
            Self::Directory(path) => Some(path.clone()),
            Self::NewFile(path) => Some(directory_of(path).to_owned()),
        }
    }

    /// Its path, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Device { path, .. } | Self::Directory(path) | Self::NewFile(path) => path,
        }
    }

    /// The space for a tail here: the size of a device, or what a filesystem has free beyond the reserve.
    ///
    /// # Errors
    /// I/O errors with the path.
    pub fn available(&self) -> Result<Bytes> {
        if let Self::Device { bytes, .. } = self {
            return Ok(bytes.align_down(DIRECT_IO_ALIGN));
        }
        let anchor = self.anchor();
        let space =
            statvfs(&anchor).io_context(|| format!("reading the free space of {}", anchor.display()))?;
        Ok(free_beyond_reserve(&space))
    }
}

pub(super) fn free_beyond_reserve(space: &Statvfs) -> Bytes {
    let unit = space.fragment_size();
    let free = Bytes(space.blocks_available().saturating_mul(unit));
    let all = Bytes(space.blocks().saturating_mul(unit));
    free.saturating_sub(size::reserve(all)).align_down(size::STORE_UNIT)
}

/// Size of a block device, from sysfs.
pub(super) fn device_bytes(number: DeviceNumber) -> Result<Bytes> {
    let path = format!("/sys/dev/block/{number}/size");
    let text = fs::read_to_string(&path).io_context(|| format!("reading {path}"))?;
    text.trim().parse::<u64>().ok().and_then(|sectors| Sectors(sectors).checked_bytes()).ok_or_else(|| {
        Error::new(ErrorKind::Kernel, format!("{path} does not contain a size: '{}'", text.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(TailPlace::resolve(None).unwrap(), TailPlace::Directory(PathBuf::from(DEFAULT_DIRECTORY)));
        assert_eq!(
            TailPlace::resolve(Some(dir.path())).unwrap(),
            TailPlace::Directory(dir.path().to_owned())
        );
        let new = TailPlace::resolve(Some(&dir.path().join("new"))).unwrap();
        assert_eq!(new, TailPlace::NewFile(dir.path().join("new")));
        assert_eq!(new.anchor(), dir.path());
        assert!(new.available().unwrap() > Bytes::ZERO);

        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert_eq!(TailPlace::resolve(Some(&file)).unwrap_err().kind(), ErrorKind::Refused);
        let nowhere = dir.path().join("no/where");
        assert_eq!(TailPlace::resolve(Some(&nowhere)).unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!(TailPlace::Directory(nowhere).anchor(), dir.path());
    }
}
