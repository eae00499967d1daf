//! Opens files below a directory, whatever other processes do to the names on the way (openat2(2)).

use std::fs::File;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// Opens `name` below `root`, on the same mount, without following a symbolic link or waiting for anything.
///
/// # Errors
/// The errno; EXDEV beyond the mount, ELOOP for a symbolic link.
pub fn open_beneath(root: &File, name: &Path, flags: OFlag) -> nix::Result<File> {
    let waits_not = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS;
    let how = OpenHow::new().flags(flags | waits_not).resolve(resolve);
    openat2(root, name, how).map(File::from)
}
