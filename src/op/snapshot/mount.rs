//! `tidemark snapshot mount`: mounts a snapshot read-only, or a clone, with the options that its filesystem needs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

use super::list::{State, list, not_valid};
use super::set::{no_snapshot, parse_name};
use crate::base::{Error, ErrorKind, Result, ResultExt as _};
use crate::sys::privilege::require_root;

/// A mounted snapshot.
#[derive(Clone, Debug, Serialize)]
pub struct Mounted {
    /// VOLUME@NAME.
    pub snapshot: String,
    /// The directory.
    pub directory: PathBuf,
    /// The type of the filesystem.
    pub filesystem: String,
    /// The mount options.
    pub options: String,
}

/// Mounts snapshot `name` at `directory`.
///
/// # Errors
/// [`ErrorKind::Refused`] for a snapshot that does not show its instant, and for a filesystem that cannot be mounted
/// beside its origin; [`ErrorKind::External`] if mount(8) fails.
pub fn mount(name: &str, directory: &Path) -> Result<Mounted> {
    require_root("mounting a snapshot")?;
    let (volume, _) = parse_name(name)?;
    let view = list(Some(volume))?.into_iter().find(|view| view.snapshot == name);
    let view = view.ok_or_else(|| no_snapshot(&format!("there is no snapshot {name}")))?;
    let Some(device) = view.path.filter(|_| view.state == State::Valid) else {
        return Err(not_valid(name));
    };
    if !fs::metadata(directory).io_context(|| format!("examining {}", directory.display()))?.is_dir() {
        return Err(Error::usage(format!("{} is not a directory", directory.display())));
    }
    let filesystem = filesystem_on(&device)?;
    let options = options_for(filesystem, name, view.clone_of.is_some())?;
    let status = Command::new("mount")
        .args(["-t", filesystem, "-o", options])
        .arg(&device)
        .arg(directory)
        .status()
        .map_err(|source| Error::new(ErrorKind::External, "starting mount(8)").with_source(source))?;
    if !status.success() {
        return Err(Error::new(ErrorKind::External, format!("mount(8) of {name} failed: {status}"))
            .state("nothing was mounted"));
    }
    Ok(Mounted {
        snapshot: name.to_owned(),
        directory: directory.to_owned(),
        filesystem: filesystem.to_owned(),
        options: options.to_owned(),
    })
}

/// The options for a mount of a filesystem whose origin may be mounted.
pub(super) fn options_for(filesystem: &str, name: &str, is_clone: bool) -> Result<&'static str> {
    Ok(match (filesystem, is_clone) {
        // The log was emptied by the freeze; a journal cannot be replayed on a read-only device.
        ("ext4", false) => "ro,noload",
        // The origin has the same UUID.
        ("xfs", false) => "ro,nouuid,norecovery",
        ("xfs", true) => "rw,nouuid",
        ("btrfs", _) => {
            return Err(Error::refused(format!(
                "{name} is a btrfs: the kernel takes it for a part of its origin, as both have the same UUID"
            ))
            .state("nothing was mounted")
            .next("copy the snapshot's device to another machine, or mount it there"));
        }
        (_, false) => "ro",
        (_, true) => "rw",
    })
}

/// The type of the filesystem on `device`; "auto" for one that needs no options of its own. blkid(8) does not look at
/// our devices, so that no other tool takes one for its origin.
pub(super) fn filesystem_on(device: &Path) -> Result<&'static str> {
    let what = || format!("reading {}", device.display());
    let file = File::open(device).io_context(what)?;
    let is_at = |at: u64, magic: &[u8]| {
        let mut found = [0u8; 8];
        let found = &mut found[..magic.len()];
        // A device that is too short has no such filesystem.
        file.read_exact_at(found, at).is_ok_and(|()| found == magic)
    };
    // The superblocks' magic numbers: fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h, fs/btrfs/ctree.h.
    Ok(match () {
        () if is_at(0x438, &[0x53, 0xef]) => "ext4",
        () if is_at(0, b"XFSB") => "xfs",
        () if is_at(0x10040, b"_BHRfS_M") => "btrfs",
        () => "auto",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_filesystem_has_its_options_and_btrfs_is_refused() {
        assert_eq!(options_for("ext4", "a@1", false).unwrap(), "ro,noload");
        assert_eq!(options_for("ext4", "a@1", true).unwrap(), "rw");
        for is_clone in [false, true] {
            assert!(options_for("xfs", "a@1", is_clone).unwrap().contains("nouuid"));
            assert_eq!(options_for("btrfs", "a@1", is_clone).unwrap_err().kind(), ErrorKind::Refused);
        }
    }
}
