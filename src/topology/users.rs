//! Finds what uses the bytes of a device or file at present. Refusals name these users.
//!
//! An exclusive open detects mounts and other exclusive users, but not a process that merely writes to a
//! device (as a virtual machine does), nor a loop device. `/proc/*/fd` shows processes; the kernel's identity
//! of each backing file ([`loops`](super::loops)) shows loop devices, whatever path led to the file;
//! `/proc/swaps` shows swap files. The bytes of a device have more names than its own: its partitions, the
//! disk that it is a partition of, the file or device below it if it is a loop device, and those of the other
//! [`paths`](super::paths) to its disk.
//!
//! A host may have descriptors and loop devices on file systems whose server is gone, and a query to one of
//! those never returns. So `/proc/PID/fdinfo` is read first, which involves no file system: does the
//! descriptor write, in which mount, to which inode? Only a descriptor that may match is then examined, and
//! by a child process if its file system may have to ask a server. If such a query does not return, a
//! possible match is refused. A device node on a file system whose server is gone is not found.
//!
//! Must not write, nor open what it judges (loop devices are opened for reading, to be queried). Best effort
//! if a process hides its descriptors: one of another user, or of another PID namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Topology;
use super::filesystem::BackingKind;
use super::loops::{AttachedLoop, LoopBacking, Loops};
use super::mount::{Mount, MountTable};
use crate::base::{DeviceNumber, Error, Result};
use crate::sys::child_probe;
use crate::sys::loop_device::LoopStatus;
use crate::sys::path_stat::Found;

/// A user of a device or file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// A process that has it open for writing.
    Process {
        /// Its id.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A loop device on it.
    Loop {
        /// /dev/loopN.
        node: PathBuf,
        /// True if it only reads.
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
            Self::Loop { node, .. } => format!("detach {0} first (losetup -d {0})", node.display()),
            Self::Swap { path } => format!("swapoff {} first", path.display()),
        }
    }

    /// True if it may change what it uses.
    #[must_use]
    pub fn writes(&self) -> bool {
        !matches!(self, Self::Loop { read_only: true, .. })
    }
}

impl fmt::Display for User {
    /// Continues "/dev/sdb is ".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { id, name } => write!(f, "open for writing by {name} (process {id})"),
            Self::Loop { node, .. } => write!(f, "in use by the loop device {}", node.display()),
            Self::Swap { .. } => f.write_str("swap space"),
        }
    }
}

/// What a name leads to. Every node of a device is the same device; a file is identified by its filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Identity {
    Device(DeviceNumber),
    File { dev: DeviceNumber, inode: u64 },
}

impl Identity {
    fn of(found: &Found) -> Self {
        match found.block_device {
            Some(device) => Self::Device(device),
            None => Self::File { dev: found.dev, inode: found.inode },
        }
    }

    fn of_backing(status: &LoopStatus) -> Self {
        match status.backing_rdev {
            0 => Self::File { dev: DeviceNumber::from_dev(status.backing_dev), inode: status.backing_inode },
            rdev => Self::Device(DeviceNumber::from_dev(rdev)),
        }
    }
}

impl Topology {
    /// The first user, other than this process, of the bytes of the file or device at `path`. None if the
    /// path does not exist or no user is found.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if a user cannot be ruled out; I/O errors of
    /// examining `path` and of reading /proc.
    pub fn user_of(&self, path: &Path) -> Result<Option<User>> {
        let mounts = MountTable::read(self)?;
        let found = match mounts.stat(path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("examining {}", path.display()), error)),
        };
        let wanted = Identity::of(&found);
        let loops = self.loops();
        let (names, shown_by) = self.names_of(wanted, &loops);
        if let Some(loop_device) = loops.0.iter().find(|it| shown_by.contains(&it.number)) {
            let read_only = loop_device.status().is_some_and(|status| status.read_only);
            return Ok(Some(User::Loop { node: loop_device.node.clone(), read_only }));
        }
        let is_with_server =
            |id| mounts.by_id(id).is_none_or(|mount| !BackingKind::answers_locally(&mount.kind));
        if let Some(silent) = loops.0.iter().find(|it| it.backing == LoopBacking::Silent)
            && matches!(wanted, Identity::File { .. })
            && is_with_server(found.mount)
        {
            return Err(cannot_tell(path, &format!("the file of the loop device {}", silent.node.display())));
        }
        for swap in self.swaps()? {
            match mounts.stat(&swap) {
                Ok(found) if names.contains(&Identity::of(&found)) => {
                    return Ok(Some(User::Swap { path: swap }));
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(cannot_tell(path, &format!("the swap space {}", swap.display())));
                }
                _ => {}
            }
        }
        self.writer_of(path, &names, &mounts, self.processes()?)
    }

    /// Other devices that lead to the bytes of `device`, or a part of them: the disk that it is a partition
    /// of, its partitions, the device below it if it is a loop device, and the same by the other paths to its disk.
    #[must_use]
    pub fn same_bytes(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let (names, _) = self.names_of(Identity::Device(device), &self.loops());
        let devices = names.into_iter().filter_map(|name| match name {
            Identity::Device(other) if other != device => Some(other),
            _ => None,
        });
        devices.collect()
    }

    /// All names of the same bytes, and the loop devices through which other users may reach them: all loop
    /// devices on one of the names, except those that are names themselves.
    fn names_of(&self, wanted: Identity, loops: &Loops) -> (BTreeSet<Identity>, BTreeSet<DeviceNumber>) {
        let backing = |it: &AttachedLoop| it.status().map(Identity::of_backing);
        let mut names = BTreeSet::new();
        let mut open = vec![wanted];
        while let Some(name) = open.pop() {
            if !names.insert(name) {
                continue;
            }
            let Identity::Device(device) = name else { continue };
            open.extend(self.disk_of(device).map(Identity::Device));
            open.extend(self.other_paths(device).into_iter().map(Identity::Device));
            open.extend(loops.0.iter().filter(|it| it.number == device).filter_map(backing));
        }
        // Only the partitions of `wanted` itself: other partitions of its disk have other bytes.
        if let Identity::Device(device) = wanted {
            let disks = self.other_paths(device).into_iter().chain([device]);
            names.extend(disks.flat_map(|disk| self.partitions(disk)).map(Identity::Device));
        }
        let is_over_name = |it: &&AttachedLoop| backing(it).is_some_and(|name| names.contains(&name));
        let is_name = |it: &AttachedLoop| names.contains(&Identity::Device(it.number));
        let shown_by =
            loops.0.iter().filter(is_over_name).filter(|it| !is_name(it)).map(|it| it.number).collect();
        (names, shown_by)
    }

    /// The first of `processes`, other than this one, that has one of `names`, which are the names of `path`,
    /// open for writing.
    fn writer_of(
        &self,
        path: &Path,
        names: &BTreeSet<Identity>,
        mounts: &MountTable,
        processes: Vec<u32>,
    ) -> Result<Option<User>> {
        let search = Search::new(names, mounts);
        // Descriptors on file systems that may have to ask a server, by mount.
        let mut doubtful: BTreeMap<u64, Vec<Descriptor>> = BTreeMap::new();
        let own = std::process::id();
        let block_forks = child_probe::block_forks();
        for process in processes.into_iter().filter(|id| *id != own) {
            for descriptor in self.writable(process) {
                match search.verdict(&descriptor) {
                    Verdict::Other => {}
                    Verdict::Look => {
                        if Found::at(&descriptor.path)
                            .is_ok_and(|found| names.contains(&Identity::of(&found)))
                        {
                            return Ok(Some(self.as_user(process)));
                        }
                    }
                    Verdict::Doubtful => doubtful.entry(descriptor.mount).or_default().push(descriptor),
                }
            }
        }
        drop(block_forks);
        for descriptors in doubtful.values() {
            if let Some(process) = search.query(path, descriptors)? {
                return Ok(Some(self.as_user(process)));
            }
        }
        Ok(None)
    }

    fn as_user(&self, process: u32) -> User {
        let name = fs::read_to_string(self.process(process).join("comm")).unwrap_or_default();
        User::Process { id: process, name: name.trim_end().to_owned() }
    }

    /// True if `process` visibly has the file or device at `path` open for writing.
    #[must_use]
    pub fn is_writing(&self, process: u32, path: &Path) -> bool {
        let Ok(mounts) = MountTable::read(self) else { return false };
        let Ok(found) = mounts.stat(path) else { return false };
        let names = BTreeSet::from([Identity::of(&found)]);
        self.writer_of(path, &names, &mounts, vec![process]).is_ok_and(|user| user.is_some())
    }

    /// The descriptors of a process that are open for writing.
    fn writable(&self, process: u32) -> impl Iterator<Item = Descriptor> {
        let node = self.process(process);
        let entries = fs::read_dir(node.join("fd")).into_iter().flatten().flatten();
        entries.filter_map(move |entry| Descriptor::read(process, &node, &entry.file_name()))
    }
}

/// A descriptor that is open for writing, with what is known without asking its file system.
struct Descriptor {
    process: u32,
    /// `/proc/PID/fd/N`, which leads to the very file.
    path: PathBuf,
    /// The id of its mount.
    mount: u64,
    /// None before Linux 5.14.
    inode: Option<u64>,
}

impl Descriptor {
    /// `node` is the directory of the process in /proc. None if the descriptor does not write, or has been
    /// closed.
    fn read(process: u32, node: &Path, number: &OsStr) -> Option<Self> {
        let text = fs::read_to_string(node.join("fdinfo").join(number)).ok()?;
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        // Octal; the access mode is its last two bits (0 for one without access, O_PATH).
        let flags = u32::from_str_radix(field("flags")?.trim(), 8).ok()?;
        let is_writable = flags & 0o3 != 0;
        let inode = field("ino").and_then(|inode| inode.trim().parse().ok());
        let mount = field("mnt_id")?.trim().parse().ok()?;
        is_writable.then(|| Self { process, path: node.join("fd").join(number), mount, inode })
    }

    /// True if it has a path: it is no pipe, socket or the like.
    fn has_path(&self) -> bool {
        fs::read_link(&self.path).is_ok_and(|path| path.is_absolute())
    }
}

/// What is known of a descriptor before it is examined.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It leads to something else.
    Other,
    /// It may match, and its file system answers locally.
    Look,
    /// It may match, and its file system may have to ask a server.
    Doubtful,
}

/// The names that are searched for among descriptors.
struct Search<'a> {
    names: &'a BTreeSet<Identity>,
    mounts: BTreeMap<u64, &'a Mount>,
    inodes: BTreeSet<u64>,
    has_devices: bool,
}

impl<'a> Search<'a> {
    fn new(names: &'a BTreeSet<Identity>, mounts: &'a MountTable) -> Self {
        let inode = |name: &Identity| match name {
            Identity::File { inode, .. } => Some(*inode),
            Identity::Device(_) => None,
        };
        Self {
            names,
            mounts: mounts.all().map(|(_, mount)| (mount.id, mount)).collect(),
            inodes: names.iter().filter_map(inode).collect(),
            has_devices: names.iter().any(|name| matches!(name, Identity::Device(_))),
        }
    }

    fn verdict(&self, descriptor: &Descriptor) -> Verdict {
        let mount = self.mounts.get(&descriptor.mount);
        let shows_devices = mount.is_none_or(|mount| !mount.is_nodev);
        let may_be_it = self.has_devices && shows_devices || self.may_be_file(descriptor);
        match mount {
            _ if !may_be_it => Verdict::Other,
            Some(mount) if BackingKind::answers_locally(&mount.kind) => Verdict::Look,
            Some(_) => Verdict::Doubtful,
            // A mount internal to the kernel, or one that was detached while in use.
            None if descriptor.has_path() => Verdict::Doubtful,
            None => Verdict::Other,
        }
    }

    fn may_be_file(&self, descriptor: &Descriptor) -> bool {
        match descriptor.inode {
            None => !self.inodes.is_empty(),
            Some(inode) if !self.inodes.contains(&inode) => false,
            // Files of a subvolume have a device number of their own, on a file system that answers locally.
            Some(inode) => self.mounts.get(&descriptor.mount).is_none_or(|mount| {
                BackingKind::answers_locally(&mount.kind)
                    || self.names.contains(&Identity::File { dev: mount.device, inode })
            }),
        }
    }

    /// The first process with a matching descriptor among these, which are all of one mount. The first
    /// descriptor is queried alone, to find out whether the file system answers.
    fn query(&self, path: &Path, descriptors: &[Descriptor]) -> Result<Option<u32>> {
        let (first, rest) = descriptors.split_at(1.min(descriptors.len()));
        for descriptors in [first, rest] {
            let paths: Vec<&Path> = descriptors.iter().map(|it| it.path.as_path()).collect();
            let mut is_silent = false;
            for (descriptor, answer) in descriptors.iter().zip(Found::all_with_timeout(&paths)) {
                match answer {
                    Ok(found) if self.names.contains(&Identity::of(&found)) => {
                        return Ok(Some(descriptor.process));
                    }
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => is_silent = true,
                    _ => {}
                }
            }
            if is_silent {
                let file = descriptors.iter().chain(rest).find(|it| self.may_be_file(it));
                return file.map_or(Ok(None), |it| {
                    Err(cannot_tell(path, &format!("open for writing by process {}", it.process)))
                });
            }
        }
        Ok(None)
    }
}

fn cannot_tell(path: &Path, what: &str) -> Error {
    let shown = path.display();
    Error::refused(format!("{shown} may be {what}, whose filesystem does not answer"))
        .state("it was not touched")
        .next("check the server of that filesystem, or unmount it (umount -l), then try again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Bytes;
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

    #[test]
    fn a_query_child_is_no_user() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (born, is_born) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Like a child that has not closed its inherited descriptors yet.
                let _no_forks = child_probe::block_forks();
                let stdin = Stdio::from(fs::OpenOptions::new().write(true).open(file.path()).unwrap());
                let mut child = Command::new("sleep").arg("0.5").stdin(stdin).spawn().unwrap();
                born.send(()).unwrap();
                child.wait().unwrap();
            });
            is_born.recv().unwrap();
            assert_eq!(Topology::default().user_of(file.path()).unwrap(), None);
        });
    }

    fn attached(minor: u32, backing_rdev: u64, backing_inode: u64) -> AttachedLoop {
        AttachedLoop {
            number: dev(7, minor),
            node: format!("/dev/loop{minor}").into(),
            backing: LoopBacking::Known(LoopStatus {
                backing_dev: dev(0, 1).to_dev(),
                backing_inode,
                backing_rdev,
                offset: Bytes::ZERO,
                length: None,
                read_only: false,
                autoclear: false,
                direct_io: false,
            }),
        }
    }

    /// What is checked before `wanted` is overwritten: its names, and the loop devices that lead to it for
    /// other users.
    fn names_and_loops(wanted: Identity, loops: &[AttachedLoop]) -> (Vec<Identity>, Vec<u32>) {
        let (_keep, topology) = machine();
        let (names, shown_by) = topology.names_of(wanted, &Loops(loops.to_vec()));
        (names.into_iter().collect(), shown_by.into_iter().map(|number| number.minor).collect())
    }

    #[test]
    fn all_names_of_the_same_bytes_are_found() {
        let device = |major, minor| Identity::Device(dev(major, minor));
        // A partition is reached through its disk, and a disk through its partitions, but not one partition
        // through another.
        assert_eq!(names_and_loops(device(8, 1), &[]).0, [device(8, 0), device(8, 1)]);
        assert_eq!(names_and_loops(device(8, 0), &[]).0, [device(8, 0), device(8, 1), device(8, 2)]);
        // Loop 1 is on file 77; loop 2 on loop 1; loop 3 on the disk; loop 4 on another file.
        let file = Identity::File { dev: dev(0, 1), inode: 77 };
        let loops = [
            attached(1, 0, 77),
            attached(2, dev(7, 1).to_dev(), 5),
            attached(3, dev(8, 0).to_dev(), 6),
            attached(4, 0, 78),
        ];
        assert_eq!(names_and_loops(file, &loops), (vec![file], vec![1]));
        assert_eq!(names_and_loops(device(7, 1), &loops), (vec![device(7, 1), file], vec![2]));
        assert_eq!(names_and_loops(device(7, 2), &loops), (vec![device(7, 1), device(7, 2), file], vec![]));
        assert_eq!(names_and_loops(device(8, 1), &loops), (vec![device(8, 0), device(8, 1)], vec![3]));
        assert_eq!(names_and_loops(device(8, 16), &loops).1, Vec::<u32>::new());
        // Two loop devices on one file: each leads to the bytes of the other.
        let twice = [attached(1, 0, 77), attached(5, 0, 77)];
        assert_eq!(names_and_loops(device(7, 1), &twice).1, [5]);
    }
}
