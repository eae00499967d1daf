//! Opens a device by its number, without waiting for a node from udev.
//!
//! devtmpfs has `/dev/dm-N` as soon as the device exists. If it does not (in a container's /dev), we create a
//! node under /run/tidemark/nodes. Names in /dev/mapper are managed by udev; we create and remove them only
//! if udevd does not run.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, mknod};

use crate::base::{DeviceNumber, Result, ResultExt};

use super::udev;

/// Directory of our own nodes.
pub const NODE_DIR: &str = "/run/tidemark/nodes";

/// A path that opens the device with this number, whatever its name is.
///
/// # Errors
/// I/O errors if no node exists and none can be created.
pub fn device_path(number: DeviceNumber) -> Result<PathBuf> {
    let sysfs = PathBuf::from(format!("/sys/dev/block/{number}"));
    if let Ok(link) = fs::read_link(&sysfs)
        && let Some(name) = link.file_name()
    {
        let path = Path::new("/dev").join(name);
        if is_node_of(&path, number) {
            return Ok(path);
        }
    }
    let path = Path::new(NODE_DIR).join(format!("{}-{}", number.major, number.minor));
    if is_node_of(&path, number) {
        return Ok(path);
    }
    fs::create_dir_all(NODE_DIR).io_context(|| format!("creating the directory {NODE_DIR}"))?;
    remove_if_present(&path)?;
    mknod(&path, SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, number.to_dev())
        .io_context(|| format!("creating the device node {}", path.display()))?;
    Ok(path)
}

/// True if `path` is the block device with this number.
#[must_use]
pub fn is_node_of(path: &Path, number: DeviceNumber) -> bool {
    fs::metadata(path)
        .is_ok_and(|meta| meta.file_type().is_block_device() && DeviceNumber::from_dev(meta.rdev()) == number)
}

/// /dev/mapper/NAME. udev and libdevmapper escape characters outside their whitelist as `\xNN`.
#[must_use]
pub fn mapper_path(name: &str) -> PathBuf {
    let mut text = String::from("/dev/mapper/");
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    PathBuf::from(text)
}

/// Creates /dev/mapper/NAME if udevd does not run. Best effort: our own code opens devices by number.
pub(super) fn create_mapper_link(name: &str, number: DeviceNumber) {
    let path = mapper_path(name);
    if udev::is_running() || is_node_of(&path, number) {
        return;
    }
    let result = remove_if_present(&path).and_then(|()| {
        let target = device_path(number)?;
        symlink(&target, &path).io_context(|| format!("creating the link {}", path.display()))
    });
    if let Err(error) = result {
        tracing::debug!("no {} for the device {number}: {error}", path.display());
    }
}

/// Removes /dev/mapper/NAME if udevd does not run, and our own node of a removed device.
pub(super) fn remove_mapper_link(name: &str, number: Option<DeviceNumber>) {
    let mut paths = Vec::new();
    if !udev::is_running() {
        paths.push(mapper_path(name));
    }
    if let Some(number) = number {
        paths.push(Path::new(NODE_DIR).join(format!("{}-{}", number.major, number.minor)));
    }
    for path in paths {
        if let Err(error) = remove_if_present(&path) {
            tracing::debug!("{error}");
        }
    }
}

fn remove_if_present(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).io_context(|| format!("removing {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_mangled_as_udev_does() {
        assert_eq!(mapper_path("vg0-my--lv"), Path::new("/dev/mapper/vg0-my--lv"));
        assert_eq!(mapper_path("a b"), Path::new("/dev/mapper/a\\x20b"));
    }
}
