//! Who has a device open for writing? Found in /proc, named for the refusal.
//!
//! An exclusive open tells of mounts and of other exclusive users, not of a process that simply
//! writes to the device, and leases are for files; /proc tells. Best effort where a process hides
//! its descriptors from us.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Most descriptors looked at.
const DESCRIPTORS_MAX: usize = 1 << 20;

/// A process that writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Writer {
    /// Its process id.
    pub(super) process: u32,
    /// Its name.
    pub(super) name: String,
}

/// The first process, other than this one, that has the file or device at `path` open for writing.
#[must_use]
pub(super) fn writer_of(path: &Path) -> Option<Writer> {
    let wanted = identity(&fs::metadata(path).ok()?);
    let own = std::process::id();
    let mut looked_at = 0;
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            looked_at += 1;
            if process == own || looked_at > DESCRIPTORS_MAX {
                break;
            }
            let is_it = fs::metadata(descriptor.path()).is_ok_and(|meta| identity(&meta) == wanted);
            if is_it && is_writable(&entry.path().join("fdinfo").join(descriptor.file_name())) {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                return Some(Writer { process, name: name.trim_end().to_owned() });
            }
        }
    }
    None
}

/// A device is the same through every node of it; a file is what its filesystem says.
fn identity(meta: &fs::Metadata) -> (bool, u64, u64) {
    if meta.file_type().is_block_device() { (true, meta.rdev(), 0) } else { (false, meta.dev(), meta.ino()) }
}

/// `flags:` in fdinfo is octal; the access mode is its last two bits.
fn is_writable(fdinfo: &Path) -> bool {
    let Ok(text) = fs::read_to_string(fdinfo) else { return false };
    text.lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok())
        .is_some_and(|flags| flags & 0o3 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_writer_is_named_and_a_reader_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(writer_of(file.path()), None);
        let spawn = |writes: bool| {
            let file = fs::OpenOptions::new().read(true).write(writes).open(file.path()).unwrap();
            Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().unwrap()
        };
        let mut reader = spawn(false);
        assert_eq!(writer_of(file.path()), None);
        let mut writer = spawn(true);
        let found = writer_of(file.path());
        for child in [&mut reader, &mut writer] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(found.map(|found| found.process), Some(writer.id()));
    }
}
