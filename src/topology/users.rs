//! Who uses the bytes of a device or file, now? Named for the refusal.
//!
//! An exclusive open tells of mounts and of other exclusive users, not of a process that simply writes to a
//! device (a virtual machine does), nor of a loop device. `/proc/*/fd` tells of processes, the kernel's own
//! identity of each backing file (`LOOP_GET_STATUS64`) of loop devices, whatever path led to it, `/proc/swaps`
//! of swap files. A device has more names than its own: its partitions, the disk that it is a partition of, the
//! file or device that it shows as a loop device.
//!
//! Must not: write, nor open what it judges (loop devices are opened for reading, to be asked). Best effort
//! where a process hides its descriptors from us: another's user, another namespace of processes.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::{Topology, device_number};
use crate::base::{DeviceNumber, Result};
use crate::sys::loop_device::{self, LoopStatus};

/// Most descriptors looked at.
const DESCRIPTORS_MAX: usize = 1 << 20;

/// Names of one device's bytes at most: far above any real chain of loop devices.
const NAMES_MAX: usize = 1024;

/// Whoever uses a device or file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// A process that has it open for writing.
    Process {
        /// Its id.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A loop device that shows it.
    Loop {
        /// /dev/loopN.
        node: PathBuf,
        /// It only reads.
        read_only: bool,
    },
    /// The kernel, as swap space.
    Swap {
        /// As the kernel names it.
        path: PathBuf,
    },
}

impl User {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Process { id, .. } => format!("end process {id} first"),
            Self::Loop { node, .. } => format!("take {0} out of use first (losetup -d {0})", node.display()),
            Self::Swap { path } => format!("swapoff {} first", path.display()),
        }
    }

    /// It may change what it uses.
    #[must_use]
    pub fn writes(&self) -> bool {
        !matches!(self, Self::Loop { read_only: true, .. })
    }
}

impl fmt::Display for User {
    /// Goes on from "/dev/sdb is ".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { id, name } => write!(f, "open for writing by {name} (process {id})"),
            Self::Loop { node, .. } => write!(f, "what the loop device {} shows", node.display()),
            Self::Swap { .. } => f.write_str("swap space"),
        }
    }
}

/// What a name leads to. A device is the same through every node of it; a file is what its filesystem says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Identity {
    Device(DeviceNumber),
    File { dev: u64, inode: u64 },
}

impl Identity {
    fn of(meta: &fs::Metadata) -> Self {
        if meta.file_type().is_block_device() {
            Self::Device(DeviceNumber::from_dev(meta.rdev()))
        } else {
            Self::File { dev: meta.dev(), inode: meta.ino() }
        }
    }

    fn of_backing(status: &LoopStatus) -> Self {
        match status.backing_rdev {
            0 => Self::File { dev: status.backing_dev, inode: status.backing_inode },
            rdev => Self::Device(DeviceNumber::from_dev(rdev)),
        }
    }
}

/// A loop device in use.
struct Attached {
    number: DeviceNumber,
    node: PathBuf,
    status: LoopStatus,
}

impl Topology {
    /// The first user, other than this process, of the bytes of the file or device at `path`. None where there
    /// is no such thing, or nobody is seen.
    ///
    /// # Errors
    /// I/O errors of reading /proc/swaps.
    pub fn user_of(&self, path: &Path) -> Result<Option<User>> {
        let Ok(meta) = fs::metadata(path) else { return Ok(None) };
        let loops = self.attached_loops();
        let (names, shown_by) = self.names_of(Identity::of(&meta), &loops);
        if let Some(loop_device) = loops.iter().find(|it| shown_by.contains(&it.number)) {
            let read_only = loop_device.status.read_only;
            return Ok(Some(User::Loop { node: loop_device.node.clone(), read_only }));
        }
        for path in self.swaps()? {
            if fs::metadata(&path).is_ok_and(|swap| names.contains(&Identity::of(&swap))) {
                return Ok(Some(User::Swap { path }));
            }
        }
        Ok(self.writer_of(&names))
    }

    /// Devices through which the bytes of `device` are reached as well, or a part of them: the disk that it is a
    /// partition of, its partitions, and what lies beneath it as a loop device. Without itself.
    #[must_use]
    pub fn same_bytes(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let (names, _) = self.names_of(Identity::Device(device), &self.attached_loops());
        let devices = names.into_iter().filter_map(|name| match name {
            Identity::Device(other) if other != device => Some(other),
            _ => None,
        });
        devices.collect()
    }

    /// All names of the same bytes, and the loop devices through which somebody else may reach them: all that
    /// show one of the names, but for those that are names themselves.
    fn names_of(&self, wanted: Identity, loops: &[Attached]) -> (BTreeSet<Identity>, BTreeSet<DeviceNumber>) {
        let mut names = BTreeSet::new();
        let mut open = vec![wanted];
        while let Some(name) = open.pop() {
            if names.len() >= NAMES_MAX || !names.insert(name) {
                continue;
            }
            let Identity::Device(device) = name else { continue };
            open.extend(self.disk_of(device).map(Identity::Device));
            let beneath = loops.iter().find(|it| it.number == device);
            open.extend(beneath.map(|it| Identity::of_backing(&it.status)));
        }
        // Downwards only so far: the other partitions of a disk are others' bytes.
        if let Identity::Device(device) = wanted {
            names.extend(self.partitions(device).into_iter().map(Identity::Device));
        }
        let shows = |it: &&Attached| names.contains(&Identity::of_backing(&it.status));
        let is_name = |it: &Attached| names.contains(&Identity::Device(it.number));
        let shown_by = loops.iter().filter(shows).filter(|it| !is_name(it)).map(|it| it.number).collect();
        (names, shown_by)
    }

    /// The disk that a partition is on.
    fn disk_of(&self, device: DeviceNumber) -> Option<DeviceNumber> {
        let node = self.node(device);
        node.join("partition").exists().then(|| super::number_file(&node.join("../dev"))).flatten()
    }

    /// Loop devices that cannot be asked (no node for it here) are left out.
    fn attached_loops(&self) -> Vec<Attached> {
        let Ok(entries) = fs::read_dir(self.root.join("sys/block")) else { return Vec::new() };
        let found =
            entries.flatten().filter(|entry| entry.path().join("loop").exists()).filter_map(|entry| {
                let number = super::number_file(&entry.path().join("dev"))?;
                let node = PathBuf::from(self.name(number));
                // A node of that name can be another device's.
                device_number(&node).ok().flatten().filter(|it| *it == number)?;
                let status = loop_device::status(&node).ok().flatten()?;
                Some(Attached { number, node, status })
            });
        found.collect()
    }

    /// The first process, other than this one, that has one of `names` open for writing.
    fn writer_of(&self, names: &BTreeSet<Identity>) -> Option<User> {
        let own = std::process::id();
        let mut left = DESCRIPTORS_MAX;
        let processes = fs::read_dir(self.root.join("proc")).ok()?.flatten();
        let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let id = ids.filter(|id| *id != own).find(|id| self.writes_one_of(*id, names, &mut left))?;
        let name = fs::read_to_string(self.process(id).join("comm")).unwrap_or_default();
        Some(User::Process { id, name: name.trim_end().to_owned() })
    }

    /// True where `process` has the file or device at `path` open for writing.
    #[must_use]
    pub fn is_writing(&self, process: u32, path: &Path) -> bool {
        let mut left = DESCRIPTORS_MAX;
        fs::metadata(path)
            .is_ok_and(|meta| self.writes_one_of(process, &BTreeSet::from([Identity::of(&meta)]), &mut left))
    }

    fn process(&self, id: u32) -> PathBuf {
        self.root.join("proc").join(id.to_string())
    }

    /// `left`: descriptors that may still be looked at.
    fn writes_one_of(&self, process: u32, names: &BTreeSet<Identity>, left: &mut usize) -> bool {
        let process = self.process(process);
        let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
        descriptors.flatten().any(|descriptor| {
            let Some(rest) = left.checked_sub(1) else { return false };
            *left = rest;
            let is_it =
                fs::metadata(descriptor.path()).is_ok_and(|meta| names.contains(&Identity::of(&meta)));
            is_it && is_writable(&process.join("fdinfo").join(descriptor.file_name()))
        })
    }
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
    use crate::topology::tests::{dev, machine};
    use std::process::{Command, Stdio};

    #[test]
    fn a_writer_is_named_and_a_reader_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let user = || Topology::default().user_of(file.path()).unwrap();
        assert_eq!(user(), None);
        let spawn = |writes: bool| {
            let file = fs::OpenOptions::new().read(true).write(writes).open(file.path()).unwrap();
            Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().unwrap()
        };
        let mut reader = spawn(false);
        assert_eq!(user(), None);
        let mut writer = spawn(true);
        let found = user();
        for child in [&mut reader, &mut writer] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let Some(User::Process { id, .. }) = found else { panic!("{found:?}") };
        assert_eq!(id, writer.id());
    }

    fn attached(minor: u32, backing_rdev: u64, backing_inode: u64) -> Attached {
        Attached {
            number: dev(7, minor),
            node: format!("/dev/loop{minor}").into(),
            status: LoopStatus {
                backing_dev: 1,
                backing_inode,
                backing_rdev,
                read_only: false,
                autoclear: false,
                direct_io: false,
            },
        }
    }

    /// Who must be asked before `wanted` is overwritten: its names, and the loop devices that are others' ways to it.
    fn asked(wanted: Identity, loops: &[Attached]) -> (Vec<Identity>, Vec<u32>) {
        let (_keep, topology) = machine();
        let (names, shown_by) = topology.names_of(wanted, loops);
        (names.into_iter().collect(), shown_by.into_iter().map(|number| number.minor).collect())
    }

    #[test]
    fn the_same_bytes_have_more_names_than_one() {
        let device = |major, minor| Identity::Device(dev(major, minor));
        // A partition is reached through its disk, a disk through its partitions; not one partition through another.
        assert_eq!(asked(device(8, 1), &[]).0, [device(8, 0), device(8, 1)]);
        assert_eq!(asked(device(8, 0), &[]).0, [device(8, 0), device(8, 1), device(8, 2)]);
        // Loop 1 shows file 77; loop 2 shows loop 1; loop 3 shows the disk; loop 4 another file.
        let file = Identity::File { dev: 1, inode: 77 };
        let loops = [
            attached(1, 0, 77),
            attached(2, dev(7, 1).to_dev(), 5),
            attached(3, dev(8, 0).to_dev(), 6),
            attached(4, 0, 78),
        ];
        assert_eq!(asked(file, &loops), (vec![file], vec![1]));
        assert_eq!(asked(device(7, 1), &loops), (vec![device(7, 1), file], vec![2]));
        assert_eq!(asked(device(7, 2), &loops), (vec![device(7, 1), device(7, 2), file], vec![]));
        assert_eq!(asked(device(8, 1), &loops), (vec![device(8, 0), device(8, 1)], vec![3]));
        assert_eq!(asked(device(8, 16), &loops).1, Vec::<u32>::new());
        // Two loop devices over one file: each is a way to the other's bytes.
        let twice = [attached(1, 0, 77), attached(5, 0, 77)];
        assert_eq!(asked(device(7, 1), &twice).1, [5]);
    }
}
