//! Finds the mounted file systems, in all mount namespaces, and whether they answer without a server.
//!
//! Facts come from `/proc/PID/mountinfo` (proc_pid_mountinfo(5)), whose paths are bytes, and from
//! `/proc/swaps`. The table also has mounts that are covered by another mount: what is seen at a mount point
//! must be compared by number.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Topology;
use super::filesystem::BackingKind;
use crate::base::{DeviceNumber, Error, Result, ResultExt as _};
use crate::sys::path_stat::Found;

/// One line of mountinfo, with the fields that are needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The id of the mount, as in fdinfo; unique on the machine.
    pub id: u64,
    /// `st_dev` of its files.
    pub device: DeviceNumber,
    /// The root of the mount within the filesystem: "/", or another directory for a bind mount.
    pub root: PathBuf,
    /// The mount point.
    pub point: PathBuf,
    /// True if device nodes in it cannot be opened.
    pub is_nodev: bool,
    /// "ext4".
    pub kind: String,
    /// The source of the mount: a device's path for most.
    pub source: PathBuf,
    /// The superblock's options as listed, with escapes.
    pub options: String,
}

impl Mount {
    pub(super) fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(' ');
        let id = fields.next()?.parse().ok()?;
        let device = fields.nth(1)?.parse().ok()?;
        let root = unescape(fields.next()?);
        let point = unescape(fields.next()?);
        let is_nodev = fields.next()?.split(',').any(|option| option == "nodev");
        let mut after = line.split_once(" - ")?.1.split(' ');
        let kind = after.next()?.to_owned();
        let source = unescape(after.next()?);
        let options = after.next().unwrap_or_default().to_owned();
        Some(Self { id, device, root, point, is_nodev, kind, source, options })
    }

    /// True if its filesystem is on `device`.
    #[must_use]
    pub fn is_of(&self, device: DeviceNumber) -> bool {
        self.device == device || self.source_device() == Some(device)
    }

    /// The block device that the source names. If the superblock has the number of a device, that number is
    /// enough; if not (btrfs, a FUSE server on a disk), the source is examined. The source is text from the
    /// mounting process, and may be a path that leads to another server. So a source outside /dev is examined
    /// only for file systems whose source the kernel has opened itself.
    #[must_use]
    pub fn source_device(&self) -> Option<DeviceNumber> {
        let is_opened_by_kernel =
            BackingKind::of(&self.kind) == BackingKind::Devices && self.source.is_absolute();
        if is_opened_by_kernel || self.source.starts_with("/dev") {
            Found::at(&self.source).ok()?.block_device
        } else {
            None
        }
    }
}

/// The mounts that the processes of one mount namespace see.
#[derive(Clone, Debug)]
pub struct View {
    /// The root directory of one of those processes.
    pub root: PathBuf,
    /// In the order in which they were mounted.
    pub mounts: Vec<Mount>,
}

impl View {
    /// The path by which this process reaches that process's `path`.
    #[must_use]
    pub fn path(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Looks up `path` in this view. If a mount on the way may have to ask a server, a child process does it,
    /// with a time limit.
    ///
    /// # Errors
    /// The errno of statx(2); [`io::ErrorKind::TimedOut`].
    pub fn stat(&self, path: &Path) -> io::Result<Found> {
        let at = self.path(path);
        if self.is_local(path) { Found::at(&at) } else { Found::with_timeout(&at) }
    }

    /// As [`View::stat`], for several paths: one child process looks up all that need one.
    #[must_use]
    pub fn stat_all(&self, paths: &[&Path]) -> Vec<io::Result<Found>> {
        let remote: Vec<PathBuf> =
            paths.iter().filter(|path| !self.is_local(path)).map(|path| self.path(path)).collect();
        let remote: Vec<&Path> = remote.iter().map(PathBuf::as_path).collect();
        let mut answers = Found::all_with_timeout(&remote).into_iter();
        let local = |path: &&Path| Found::at(&self.path(path));
        let none = || Err(io::ErrorKind::Other.into());
        let of_one = |path: &&Path| {
            if self.is_local(path) { local(path) } else { answers.next().unwrap_or_else(none) }
        };
        paths.iter().map(of_one).collect()
    }

    fn is_local(&self, path: &Path) -> bool {
        self.servers_on_the_way(path) == 0
    }

    /// How many mounts on the way to `path` may have to ask a server.
    #[must_use]
    pub fn servers_on_the_way(&self, path: &Path) -> usize {
        let mut on_the_way = self.mounts.iter().filter(|mount| path.starts_with(&mount.point)).peekable();
        // There is none if the process's root directory is within a mount, which may be of any kind.
        let unknown = usize::from(on_the_way.peek().is_none());
        unknown + on_the_way.filter(|mount| !BackingKind::answers_locally(&mount.kind)).count()
    }
}

/// The mounts of every mount namespace that has a process, at present.
#[derive(Clone, Debug)]
pub struct MountTable {
    /// Our own comes first.
    views: Vec<View>,
}

impl MountTable {
    /// Reads the table.
    ///
    /// # Errors
    /// I/O errors of reading our own mounts, or the list of processes.
    pub fn read(topology: &Topology) -> Result<Self> {
        let proc = topology.root.join("proc");
        let mut views = vec![topology.own_view()?];
        let namespace = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
        let mut known: BTreeSet<PathBuf> = namespace(&proc.join("self")).into_iter().collect();
        for id in topology.processes()? {
            let process = topology.process(id);
            // The process has ended, or we may not examine it.
            let Some(namespace) = namespace(&process).filter(|namespace| !known.contains(namespace)) else {
                continue;
            };
            if let Ok(mounts) = mounts_in(&process) {
                known.insert(namespace);
                views.push(View { root: process.join("root"), mounts });
            }
        }
        Ok(Self { views })
    }

    fn own(&self) -> &View {
        self.views.first().expect("the table is read with our own view first")
    }

    /// All mounts with their views, our own first.
    pub fn all(&self) -> impl Iterator<Item = (&View, &Mount)> {
        self.views.iter().flat_map(|view| view.mounts.iter().map(move |mount| (view, mount)))
    }

    /// The mount with this id.
    #[must_use]
    pub fn by_id(&self, id: u64) -> Option<&Mount> {
        self.all().map(|(_, mount)| mount).find(|mount| mount.id == id)
    }

    /// The mounts of the file system whose superblock has this number.
    pub fn of(&self, number: DeviceNumber) -> impl Iterator<Item = (&View, &Mount)> {
        self.all().filter(move |(_, mount)| mount.device == number)
    }

    /// Looks up `path` for this process, as [`View::stat`].
    ///
    /// # Errors
    /// As [`View::stat`].
    pub fn stat(&self, path: &Path) -> io::Result<Found> {
        self.own().stat(path)
    }
}

impl Topology {
    /// The mounts of our mount namespace, in the order in which they were mounted.
    ///
    /// # Errors
    /// I/O errors of reading mountinfo.
    pub fn mounts(&self) -> Result<Vec<Mount>> {
        mounts_in(&self.root.join("proc/self"))
    }

    /// The mounts that this process sees.
    ///
    /// # Errors
    /// I/O errors of reading mountinfo.
    pub fn own_view(&self) -> Result<View> {
        Ok(View { root: PathBuf::from("/"), mounts: self.mounts()? })
    }

    /// The ids of all processes.
    ///
    /// # Errors
    /// I/O errors of reading /proc.
    pub(super) fn processes(&self) -> Result<Vec<u32>> {
        let proc = self.root.join("proc");
        let entries = fs::read_dir(&proc).io_context(|| format!("reading {}", proc.display()))?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }

    pub(super) fn process(&self, id: u32) -> PathBuf {
        self.root.join("proc").join(id.to_string())
    }

    /// Swap areas: files and devices, as the kernel names them.
    ///
    /// # Errors
    /// I/O errors of reading /proc/swaps.
    pub fn swaps(&self) -> Result<Vec<PathBuf>> {
        let file = self.root.join("proc/swaps");
        match fs::read(&file) {
            Ok(bytes) => {
                let text = escaped_text(&bytes);
                let first = |line: &str| unescape(line.split_whitespace().next().unwrap_or_default());
                Ok(text.lines().skip(1).map(first).collect())
            }
            // A kernel without swap has no such file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::io(format!("reading {}", file.display()), error)),
        }
    }
}

/// The mounts that a process sees; `node` is its directory in /proc.
fn mounts_in(node: &Path) -> Result<Vec<Mount>> {
    let file = node.join("mountinfo");
    let bytes = fs::read(&file).io_context(|| format!("reading {}", file.display()))?;
    Ok(escaped_text(&bytes).lines().filter_map(Mount::parse).collect())
}

/// The kernel's text about paths, which are bytes. Bytes that are not UTF-8 become octal escapes like the
/// kernel's own, which [`unescape`] undoes.
fn escaped_text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|byte| format!("\\{byte:03o}")));
    }
    text
}

/// Undoes the octal escapes (`\040`) of mountinfo and swaps.
pub(super) fn unescape(field: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::super::tests::machine;
    use super::*;

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape("/a\\040b\\134"), Path::new("/a b\\"));
        assert_eq!(unescape("/a\\9"), Path::new("/a\\9"));
    }

    #[test]
    fn a_mount_point_is_bytes() {
        use std::os::unix::ffi::OsStrExt as _;
        let (keep, topology) = machine();
        let file = keep.path().join("proc/self/mountinfo");
        let mut lines = fs::read(&file).unwrap();
        lines.extend(b"40 35 8:16 / /mnt/\xff\\040b rw - ext4 /dev/\xfe rw\n");
        fs::write(&file, lines).unwrap();
        let mounts = topology.mounts().unwrap();
        assert_eq!(mounts[0].point, Path::new("/mnt/my disk"));
        assert_eq!(mounts[1].point.as_os_str().as_bytes(), b"/mnt/\xff b");
        assert_eq!(mounts[1].source.as_os_str().as_bytes(), b"/dev/\xfe");
        fs::write(keep.path().join("proc/swaps"), b"Filename Type\n/swap\xff file 1\n").unwrap();
        assert_eq!(topology.swaps().unwrap()[0].as_os_str().as_bytes(), b"/swap\xff");
    }
}
