//! A cold origin: a device or file that is not written. Needs no device-mapper; the instant is the beginning of the
//! copy.
//!
//! Three checks ensure that the origin is not written: one when the plan is made, an exclusive open of the device
//! while it is read, and a comparison, before and after, of what a write changes ([`Witness`]). If the origin was
//! written during the copy, the copy fails.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt as _, Sectors};
use crate::topology::Topology;

/// A cold origin, open for reading.
pub struct ColdOrigin {
    file: File,
    shown: String,
    before: Witness,
}

/// What changes if the origin is written.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Witness {
    /// Size in bytes, modification time and change time of a file.
    File { size: u64, modified: (i64, i64), changed: (i64, i64) },
    /// Writes completed and sectors written, from the device's statistics.
    Device { writes: u64, sectors: Sectors },
    /// The kernel keeps no statistics of this device, or it never changes.
    None,
}

impl ColdOrigin {
    /// Opens a kept snapshot, which never changes.
    ///
    /// # Errors
    /// I/O errors.
    pub fn open_snapshot(path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path);
        let file = file.io_context(|| format!("opening {shown}"))?;
        Ok(Self { file, shown, before: Witness::None })
    }

    /// Opens `path`. `device` is its number if it is a block device, which is then opened exclusively.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if it is in use, I/O errors.
    pub fn open(path: &Path, device: Option<DeviceNumber>) -> Result<Self> {
        let shown = path.display().to_string();
        let exclusive = if device.is_some() { libc::O_EXCL } else { 0 };
        let open = |flags| {
            OpenOptions::new().read(true).custom_flags(flags | exclusive | libc::O_CLOEXEC).open(path)
        };
        // Not every filesystem supports direct I/O (EINVAL). Buffered reads are correct too, only slower.
        let file = open(libc::O_DIRECT).or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => open(0),
            _ => Err(error),
        });
        let file = file.map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => Error::refused(format!("{shown} is in use"))
                .with_source(error)
                .state("nothing was changed")
                .next(
                    "find its users with lsblk and fuser; to copy a device while it is mounted, attach it \
                     first",
                ),
            _ => Error::io(format!("opening {shown}"), error),
        })?;
        let before = Witness::of(&file, device)?;
        Ok(Self { file, shown, before })
    }

    /// Checks that it has the size of the plan.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if it does not; I/O errors.
    pub fn check_size(&self, planned: Bytes) -> Result<()> {
        let size = (&self.file).seek(SeekFrom::End(0));
        let size = size.io_context(|| format!("finding the size of {}", self.shown))?;
        if size == planned.get() {
            return Ok(());
        }
        Err(Error::refused(format!(
            "{} has {size} bytes, and had {} when the copy was planned",
            self.shown,
            planned.get()
        ))
        .state("nothing was copied")
        .next("run the command again"))
    }

    /// A descriptor for the copier.
    ///
    /// # Errors
    /// I/O errors.
    pub fn descriptor(&self) -> Result<OwnedFd> {
        Ok(self
            .file
            .try_clone()
            .io_context(|| format!("duplicating the descriptor of {}", self.shown))?
            .into())
    }

    /// Checks that the origin was not written since it was opened.
    ///
    /// # Errors
    /// [`ErrorKind::External`] if it was written, I/O errors.
    pub fn check_unchanged(&self, device: Option<DeviceNumber>) -> Result<()> {
        if self.before == Witness::None || Witness::of(&self.file, device)? == self.before {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::External,
            format!("{} was written to while it was being copied", self.shown),
        )
        .next("stop its writers and copy again; to copy a device while it is in use, attach it first"))
    }
}

impl Witness {
    fn of(file: &File, device: Option<DeviceNumber>) -> Result<Self> {
        let Some(device) = device else {
            let meta = file.metadata().io_context(|| "examining the origin".to_owned())?;
            return Ok(Self::File {
                size: meta.size(),
                modified: (meta.mtime(), meta.mtime_nsec()),
                changed: (meta.ctime(), meta.ctime_nsec()),
            });
        };
        Ok(match Topology::default().disk_stat(device) {
            Some(stat) => Self::Device { writes: stat.writes, sectors: stat.sectors_written },
            None => Self::None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_written_meanwhile_is_noticed() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        let cold = ColdOrigin::open(file.path(), None).unwrap();
        cold.check_unchanged(None).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        file.as_file_mut().write_all(&[2; 512]).unwrap();
        file.as_file().sync_all().unwrap();
        let error = cold.check_unchanged(None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::External);
    }
}
