//! Freeze and thaw of a filesystem (FIFREEZE, FITHAW), and syncfs, through any open file on it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt as _;

// Linux `include/uapi/linux/fs.h`: _IOWR('X', 119, int), _IOWR('X', 120, int).
const FIFREEZE: libc::c_ulong = nix::request_code_readwrite!(b'X', 119, std::mem::size_of::<libc::c_int>());
const FITHAW: libc::c_ulong = nix::request_code_readwrite!(b'X', 120, std::mem::size_of::<libc::c_int>());

/// Writes back all dirty data of the filesystem of `file`.
///
/// # Errors
/// The kernel's errno; EIO for write-back errors since `file` was opened.
pub fn sync_filesystem(file: &File) -> io::Result<()> {
    nix::unistd::syncfs(file).map_err(io::Error::from)
}

/// Writes back the kernel's cache if `file` is a block device, else its whole filesystem.
///
/// # Errors
/// The kernel's errno.
pub fn write_back(file: &File) -> io::Result<()> {
    if file.metadata()?.file_type().is_block_device() { file.sync_all() } else { sync_filesystem(file) }
}

/// Freezes the filesystem of `file`: returns when nothing is dirty and every writer waits.
///
/// # Errors
/// EBUSY if it is frozen already, EOPNOTSUPP if it cannot be frozen, EPERM.
pub fn freeze(file: &File) -> io::Result<()> {
    call(file, FIFREEZE)
}

/// Thaws the filesystem of `file`.
///
/// # Errors
/// EINVAL if it is not frozen (or is only being frozen).
pub fn thaw(file: &File) -> io::Result<()> {
    call(file, FITHAW)
}

fn call(file: &File, code: libc::c_ulong) -> io::Result<()> {
    let unused: libc::c_int = 0;
    // SAFETY: the descriptor is open while `file` is borrowed; both requests take an int pointer that the
    // kernel does not follow, and `unused` outlives the call anyway.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), code, std::ptr::from_ref(&unused)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_header() {
        assert_eq!((FIFREEZE, FITHAW), (0xc004_5877, 0xc004_5878));
    }

    #[test]
    fn thawing_a_filesystem_that_is_not_frozen_fails() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::open(dir.path()).unwrap();
        sync_filesystem(&file).unwrap();
        // EPERM without the right, EINVAL (not frozen) or EOPNOTSUPP with it: never success.
        assert!(thaw(&file).is_err());
    }
}
