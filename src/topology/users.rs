//! Who uses the bytes of a device or file, now? Named for the refusal.
//!
//! An exclusive open tells of mounts and of other exclusive users, not of a process that simply writes to a
//! device (a virtual machine does), nor of a loop device. `/proc/*/fd` tells of processes, the kernel's own
//! identity of each backing file ([`loops`](super::loops)) of loop devices, whatever path led to it, `/proc/swaps`
//! of swap files. A device has more names than its own: its partitions, the disk that it is a partition of, the
//! file or device that it shows as a loop device.
//!
//! A host has descriptors and loop devices on file systems whose server is gone, and to ask those is to wait for ever. So
//! of a descriptor `/proc/PID/fdinfo` is read first, for which no file system is asked: does it write, in which mount, which
//! inode? Only one that may be what is looked for is looked at, and by a child process where its file system may have to
//! ask a server. What is not answered then is refused where it may be the file that is looked for. A device
//! node on a file system of a server that is gone is not seen.
//!
//! Must not: write, nor open what it judges (loop devices are opened for reading, to be asked). Best effort
//! where a process hides its descriptors from us: another's user, another namespace of processes.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Topology;
use super::filesystem::LiesOn;
use super::loops::{Attached, Loops, Shows};
use super::mount::{Mount, MountTable};
use crate::base::{DeviceNumber, Error, Result};
use crate::sys::found::Found;
use crate::sys::inquiry;
use crate::sys::loop_device::LoopStatus;

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
    /// The first user, other than this process, of the bytes of the file or device at `path`. None where there
    /// is no such thing, or no user is seen.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) where it cannot be told; I/O errors of looking at `path`,
    /// and of reading /proc.
    pub fn user_of(&self, path: &Path) -> Result<Option<User>> {
        let mounts = MountTable::read(self)?;
        let found = match mounts.look(path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("looking at {}", path.display()), error)),
        };
        let wanted = Identity::of(&found);
        let loops = self.loops();
        let (names, shown_by) = self.names_of(wanted, &loops);
        if let Some(loop_device) = loops.0.iter().find(|it| shown_by.contains(&it.number)) {
            let read_only = loop_device.status().is_some_and(|status| status.read_only);
            return Ok(Some(User::Loop { node: loop_device.node.clone(), read_only }));
        }
        let is_with_server =
            |id| mounts.by_id(id).is_none_or(|mount| !LiesOn::answers_by_itself(&mount.kind));
        if let Some(silent) = loops.0.iter().find(|it| it.shows == Shows::Silent)
            && matches!(wanted, Identity::File { .. })
            && is_with_server(found.mount)
        {
            return Err(untold(path, &format!("shown by {}", silent.node.display())));
        }
        for swap in self.swaps()? {
            match mounts.look(&swap) {
                Ok(found) if names.contains(&Identity::of(&found)) => {
                    return Ok(Some(User::Swap { path: swap }));
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(untold(path, &format!("the swap space {}", swap.display())));
                }
                _ => {}
            }
        }
        self.writer_of(path, &names, &mounts, self.processes()?)
    }

    /// Devices through which the bytes of `device` are reached as well, or a part of them: the disk that it is a
    /// partition of, its partitions, and what lies beneath it as a loop device. Without itself.
    #[must_use]
    pub fn same_bytes(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let (names, _) = self.names_of(Identity::Device(device), &self.loops());
        let devices = names.into_iter().filter_map(|name| match name {
            Identity::Device(other) if other != device => Some(other),
            _ => None,
        });
        devices.collect()
    }

    /// All names of the same bytes, and the loop devices through which somebody else may reach them: all that
    /// show one of the names, but for those that are names themselves.
    fn names_of(&self, wanted: Identity, loops: &Loops) -> (BTreeSet<Identity>, BTreeSet<DeviceNumber>) {
        let backing = |it: &Attached| it.status().map(Identity::of_backing);
        let mut names = BTreeSet::new();
        let mut open = vec![wanted];
        while let Some(name) = open.pop() {
            if !names.insert(name) {
                continue;
            }
            let Identity::Device(device) = name else { continue };
            open.extend(self.disk_of(device).map(Identity::Device));
            open.extend(loops.0.iter().filter(|it| it.number == device).filter_map(backing));
        }
        // Downwards only so far: the other partitions of a disk are others' bytes.
        if let Identity::Device(device) = wanted {
            names.extend(self.partitions(device).into_iter().map(Identity::Device));
        }
        let shows = |it: &&Attached| backing(it).is_some_and(|name| names.contains(&name));
        let is_name = |it: &Attached| names.contains(&Identity::Device(it.number));
        let shown_by = loops.0.iter().filter(shows).filter(|it| !is_name(it)).map(|it| it.number).collect();
        (names, shown_by)
    }

    /// The first of `processes`, other than this one, that has one of `names`, which are those of `path`, open for
    /// writing.
    fn writer_of(
        &self,
        path: &Path,
        names: &BTreeSet<Identity>,
        mounts: &MountTable,
        processes: Vec<u32>,
    ) -> Result<Option<User>> {
        let search = Search::new(names, mounts);
        // Of file systems that may have to ask a server: by mount.
        let mut doubtful: BTreeMap<u64, Vec<Descriptor>> = BTreeMap::new();
        let own = std::process::id();
        let no_births = inquiry::no_births();
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
        drop(no_births);
        for descriptors in doubtful.values() {
            if let Some(process) = search.ask(path, descriptors)? {
                return Ok(Some(self.as_user(process)));
            }
        }
        Ok(None)
    }

    fn as_user(&self, process: u32) -> User {
        let name = fs::read_to_string(self.process(process).join("comm")).unwrap_or_default();
        User::Process { id: process, name: name.trim_end().to_owned() }
    }

    /// True where `process` is seen to have the file or device at `path` open for writing.
    #[must_use]
    pub fn is_writing(&self, process: u32, path: &Path) -> bool {
        let Ok(mounts) = MountTable::read(self) else { return false };
        let Ok(found) = mounts.look(path) else { return false };
        let names = BTreeSet::from([Identity::of(&found)]);
        self.writer_of(path, &names, &mounts, vec![process]).is_ok_and(|user| user.is_some())
    }

    /// The descriptors of a process that write.
    fn writable(&self, process: u32) -> impl Iterator<Item = Descriptor> {
        let node = self.process(process);
        let entries = fs::read_dir(node.join("fd")).into_iter().flatten().flatten();
        entries.filter_map(move |entry| Descriptor::read(process, &node, &entry.file_name()))
    }
}

/// A descriptor that writes, as far as no file system is asked for it.
struct Descriptor {
    process: u32,
    /// `/proc/PID/fd/N`, which leads to the very file.
    path: PathBuf,
    /// The number of its mount.
    mount: u64,
    /// None before Linux 5.14.
    inode: Option<u64>,
}

impl Descriptor {
    /// `node` is the process's in /proc. None where it does not write, or is closed by now.
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

    /// It has a path: no pipe, socket or the like.
    fn has_path(&self) -> bool {
        fs::read_link(&self.path).is_ok_and(|path| path.is_absolute())
    }
}

/// How a descriptor is judged before it is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It leads to something else.
    Other,
    /// It may lead to what is looked for, and its file system answers.
    Look,
    /// It may, and its file system may have to ask a server.
    Doubtful,
}

/// The names that are looked for among descriptors.
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
            Some(mount) if LiesOn::answers_by_itself(&mount.kind) => Verdict::Look,
            Some(_) => Verdict::Doubtful,
            // The kernel's own, or one that was detached while it was in use.
            None if descriptor.has_path() => Verdict::Doubtful,
            None => Verdict::Other,
        }
    }

    fn may_be_file(&self, descriptor: &Descriptor) -> bool {
        match descriptor.inode {
            None => !self.inodes.is_empty(),
            Some(inode) if !self.inodes.contains(&inode) => false,
            // A subvolume's files show a number of their own, on a file system that answers.
            Some(inode) => self.mounts.get(&descriptor.mount).is_none_or(|mount| {
                LiesOn::answers_by_itself(&mount.kind)
                    || self.names.contains(&Identity::File { dev: mount.device, inode })
            }),
        }
    }

    /// The first process that has what is looked for open through one of these descriptors, all of one mount. The first
    /// one tells whether it answers at all.
    fn ask(&self, path: &Path, descriptors: &[Descriptor]) -> Result<Option<u32>> {
        let (first, rest) = descriptors.split_at(1.min(descriptors.len()));
        for descriptors in [first, rest] {
            let paths: Vec<&Path> = descriptors.iter().map(|it| it.path.as_path()).collect();
            let mut is_silent = false;
            for (descriptor, answer) in descriptors.iter().zip(Found::all_in_time(&paths)) {
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
                    Err(untold(path, &format!("open for writing by process {}", it.process)))
                });
            }
        }
        Ok(None)
    }
}

fn untold(path: &Path, what: &str) -> Error {
    let shown = path.display();
    Error::refused(format!("{shown} may be {what}, whose file system does not answer"))
        .state("it was not touched")
        .next("see to the server of that file system, or unmount it (umount -l), and try again")
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
    fn a_child_that_asks_for_us_is_no_user() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (born, is_born) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // As a child that has not closed yet what it inherited.
                let _birth = inquiry::no_births();
                let stdin = Stdio::from(fs::OpenOptions::new().write(true).open(file.path()).unwrap());
                let mut child = Command::new("sleep").arg("0.5").stdin(stdin).spawn().unwrap();
                born.send(()).unwrap();
                child.wait().unwrap();
            });
            is_born.recv().unwrap();
            assert_eq!(Topology::default().user_of(file.path()).unwrap(), None);
        });
    }

    fn attached(minor: u32, backing_rdev: u64, backing_inode: u64) -> Attached {
        Attached {
            number: dev(7, minor),
            node: format!("/dev/loop{minor}").into(),
            shows: Shows::Known(LoopStatus {
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

    /// Who must be asked before `wanted` is overwritten: its names, and the loop devices that are others' ways to it.
    fn asked(wanted: Identity, loops: &[Attached]) -> (Vec<Identity>, Vec<u32>) {
        let (_keep, topology) = machine();
        let (names, shown_by) = topology.names_of(wanted, &Loops(loops.to_vec()));
        (names.into_iter().collect(), shown_by.into_iter().map(|number| number.minor).collect())
    }

    #[test]
    fn the_same_bytes_have_more_names_than_one() {
        let device = |major, minor| Identity::Device(dev(major, minor));
        // A partition is reached through its disk, a disk through its partitions; not one partition through another.
        assert_eq!(asked(device(8, 1), &[]).0, [device(8, 0), device(8, 1)]);
        assert_eq!(asked(device(8, 0), &[]).0, [device(8, 0), device(8, 1), device(8, 2)]);
        // Loop 1 shows file 77; loop 2 shows loop 1; loop 3 shows the disk; loop 4 another file.
        let file = Identity::File { dev: dev(0, 1), inode: 77 };
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
