//! Whether a snapshot of a subset holds files: none of their bytes is left out.
//!
//! The extents are those in the snapshot itself, which is mounted and never changes: so they are exact, whatever became
//! of the files on the volume.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{SFlag, fstatat};

use crate::base::Result;
use crate::extent::ExtentSet;
use crate::sys::beneath::open_beneath;
use crate::sys::file_map::FileMapReader;

/// The first file at or below `within`, on the filesystem mounted at `root`, that uses a byte of `left_out`, or of
/// which it is not known; None if all of them are held. Names that cannot be read are for the copy to report.
///
/// # Errors
/// Those of `interrupt`.
pub(super) fn first_left_out(
    root: &File,
    within: &Path,
    left_out: &ExtentSet,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Option<PathBuf>> {
    let mut reader = FileMapReader::new();
    let mut open = vec![within.to_owned()];
    while let Some(path) = open.pop() {
        interrupt()?;
        match kind_of(root, &path) {
            Ok(SFlag::S_IFREG) if !is_held(root, &path, left_out, &mut reader) => return Ok(Some(path)),
            Ok(SFlag::S_IFDIR) => open.extend(entries(root, &path).unwrap_or_default()),
            _ => {}
        }
    }
    Ok(None)
}

fn kind_of(root: &File, path: &Path) -> nix::Result<SFlag> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = open_beneath(root, parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let name = path.file_name().unwrap_or(OsStr::new("."));
    let found = fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    Ok(SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()))
}

fn entries(root: &File, path: &Path) -> nix::Result<Vec<PathBuf>> {
    let directory = open_beneath(root, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let mut found = Vec::new();
    for entry in &mut Dir::from_fd(directory.into())?.into_iter() {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            found.push(path.join(name));
        }
    }
    Ok(found)
}

/// True only if the whole file has a known place, and none of it is left out.
fn is_held(root: &File, path: &Path, left_out: &ExtentSet, reader: &mut FileMapReader) -> bool {
    let Ok(file) = open_beneath(root, path, OFlag::O_RDONLY) else { return false };
    let mut is_held = true;
    let read = reader.read_all(&file, &mut |extent| {
        is_held &= left_out.intersection_with(extent).next().is_none();
    });
    read.is_ok() && is_held
}
