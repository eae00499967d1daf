//! What is left out, and where that is while the filesystems are frozen.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::OFlag;

use crate::base::{Bytes, DeviceNumber};
use crate::extent::{Extent, ExtentSet};
use crate::sys::beneath::open_beneath;
use crate::sys::file_map::{FileMapReader, NotOwn};

/// A file that is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OmittedFile {
    pub inode: u64,
    /// Bytes that it used when it was found.
    pub allocated: Bytes,
    /// All of its names, relative to the mount point.
    pub names: Vec<PathBuf>,
}

/// The files of one filesystem that are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OmittedFiles {
    /// Where the filesystem is mounted.
    pub(super) point: PathBuf,
    /// Its device, as in `st_dev`.
    pub(super) device: DeviceNumber,
    /// The largest first.
    pub(super) files: Vec<OmittedFile>,
}

/// What is left out of an origin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Omission {
    /// Files, by filesystem.
    pub filesystems: Vec<OmittedFiles>,
    /// Ranges of the origin that are left out, whatever is there.
    pub ranges: Vec<Extent>,
    /// Ranges of the origin that are copied, also if files that are left out use them.
    pub included: Vec<Extent>,
    /// What is copied although it was to be left out, and why; as text.
    pub notes: Vec<String>,
}

/// Where the files of one filesystem are that are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MappedOmission {
    /// In bytes of the filesystem's device.
    pub extents: ExtentSet,
    /// Why more is copied than was to be; as text.
    pub notes: Vec<String>,
}

impl MappedOmission {
    /// Nothing of the filesystem at `point` is left out.
    #[must_use]
    pub fn refused(point: &Path, reason: &str) -> Self {
        let note = format!("{}: {reason}: nothing of it is left out", point.display());
        Self { extents: ExtentSet::new(), notes: vec![note] }
    }
}

impl Omission {
    /// The number of files that are left out, and the bytes that they used when they were found.
    #[must_use]
    pub fn files(&self) -> (usize, Bytes) {
        let files = || self.filesystems.iter().flat_map(|filesystem| &filesystem.files);
        (files().count(), files().map(|file| file.allocated).sum())
    }

    /// True if files of the filesystem at `point` are left out.
    #[must_use]
    pub fn is_at(&self, point: &Path) -> bool {
        self.filesystems.iter().any(|filesystem| filesystem.point == point && !filesystem.files.is_empty())
    }

    /// Where the files on `device` are. To be called while their filesystem is frozen. Ends soon after `deadline`: a file
    /// that is not mapped by then is copied.
    #[must_use]
    pub fn read(
        &self,
        device: DeviceNumber,
        reader: &mut FileMapReader,
        deadline: Instant,
    ) -> MappedOmission {
        let mut mapped = MappedOmission::default();
        for filesystem in self.filesystems.iter().filter(|filesystem| filesystem.device == device) {
            filesystem.read(reader, deadline, &mut mapped);
        }
        mapped
    }
}

/// Why files were not left out: how many, and their bytes.
#[derive(Default)]
struct Copied {
    late: Tally,
    changed: Tally,
    unmapped: Tally,
    shared: Tally,
}

#[derive(Default)]
struct Tally(usize, Bytes);

impl Tally {
    fn add(&mut self, bytes: Bytes) {
        self.0 += 1;
        self.1 += bytes;
    }
}

impl OmittedFiles {
    fn read(&self, reader: &mut FileMapReader, deadline: Instant, mapped: &mut MappedOmission) {
        let mut copied = Copied::default();
        let mut extents = Vec::new();
        match File::open(&self.point) {
            Ok(root) => {
                for file in &self.files {
                    if Instant::now() >= deadline {
                        copied.late.add(file.allocated);
                        continue;
                    }
                    match self.read_file(&root, file, reader, &mut extents) {
                        Ok(not_own) => {
                            mapped.extents.extend(extents.drain(..));
                            if not_own != NotOwn::default() {
                                copied.shared.add(not_own.shared + not_own.other);
                            }
                        }
                        Err(NotMapped::Changed) => copied.changed.add(file.allocated),
                        Err(NotMapped::Refused) => copied.unmapped.add(file.allocated),
                    }
                    extents.clear();
                }
            }
            Err(_) => self.files.iter().for_each(|file| copied.changed.add(file.allocated)),
        }
        for (Tally(count, bytes), why) in [
            (copied.late, "could not be found in time while the filesystem was frozen"),
            (copied.changed, "were renamed, linked or replaced since they were listed"),
            (copied.unmapped, "did not tell where they are"),
            (copied.shared, "share bytes with others, or have some without a place of their own"),
        ] {
            if count > 0 {
                let point = self.point.display();
                mapped
                    .notes
                    .push(format!("{point}: {count} files that are left out {why}: {bytes} are copied"));
            }
        }
    }

    fn read_file(
        &self,
        root: &File,
        file: &OmittedFile,
        reader: &mut FileMapReader,
        extents: &mut Vec<Extent>,
    ) -> Result<NotOwn, NotMapped> {
        let mut opened = None;
        for name in &file.names {
            let found = open_beneath(root, name, OFlag::O_RDONLY).map_err(|_| NotMapped::Changed)?;
            let meta = found.metadata().map_err(|_| NotMapped::Changed)?;
            let is_same = DeviceNumber::from_dev(meta.dev()) == self.device && meta.ino() == file.inode;
            if !is_same || !meta.is_file() || meta.nlink() != file.names.len() as u64 {
                return Err(NotMapped::Changed);
            }
            opened = Some(found);
        }
        let opened = opened.ok_or(NotMapped::Changed)?;
        reader.read(&opened, &mut |extent| extents.push(extent)).map_err(|_| NotMapped::Refused)
    }
}

enum NotMapped {
    /// It is not the file that was found, or has another name too.
    Changed,
    /// Its filesystem does not tell where it is.
    Refused,
}
