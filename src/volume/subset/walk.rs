//! Finds the files that are left out, before anything is frozen.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};
use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, SFlag, fstatat};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, FsType, XFS_SUPER_MAGIC, fstatfs};

use super::omission::OmittedFile;
use super::{Omission, OmittedFiles, Selector, Subset};
use crate::base::limits::OMITTED_FILES_MAX;
use crate::base::{Bytes, DeviceNumber, Error, Result, ResultExt as _};
use crate::sys::beneath::open_beneath;
use crate::topology::check_answers;
use crate::volume::FreezeSet;
use crate::volume::free::is_read_only;

/// Size of the unit of `st_blocks`.
const STAT_BLOCK: u64 = 512;

/// `*` stops at `/`; a dot at the start of a name is a character like any other.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// Finds what `subset` leaves out of an origin of `size` bytes, on which the filesystems of `mounted` are. Paths on the
/// devices `others` do not concern it: they are of other origins of its group.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if a path does not exist, is not on the origin, or is on a
/// filesystem of which files cannot be left out, and if no file is included;
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage), I/O errors, those of `interrupt`.
pub fn find(
    subset: &Subset,
    size: Bytes,
    (mounted, others): (&FreezeSet, &[DeviceNumber]),
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Omission> {
    let mut omission = Omission {
        ranges: subset.ranges_left_out(size)?,
        included: subset.ranges_included().collect(),
        ..Omission::default()
    };
    if !subset.names_files() {
        return Ok(omission);
    }
    if mounted.points.is_empty() {
        return Err(Error::refused("files are named, and no filesystem of the origin is mounted")
            .state("nothing was changed")
            .next("mount it, or name bytes: bytes:START+LENGTH"));
    }
    let include = Chooser::new(&subset.include, mounted, others)?;
    let exclude = Chooser::new(&subset.exclude, mounted, others)?;
    let mut included_count = 0;
    for (point, device) in mounted.points.iter().zip(&mounted.devices) {
        let root = File::open(point).io_context(|| format!("opening {}", point.display()))?;
        if let Err(reason) = check_filesystem(&root, point) {
            if include.names(*device) || exclude.names(*device) {
                return Err(reason);
            }
            omission.notes.push(format!("{reason}: all of it is copied"));
            continue;
        }
        let mut walk = Walk::new(point, *device, &include, &exclude);
        walk.is_list = subset.is_list_of_files();
        walk.run(&root, interrupt)?;
        included_count += walk.included_count;
        let (files, notes) = walk.finish();
        omission.filesystems.push(files);
        omission.notes.extend(notes);
    }
    omission.notes.extend(mounted.not_frozen.iter().cloned());
    if subset.is_list_of_files() && included_count == 0 {
        let named: Vec<String> = subset.include.iter().map(ToString::to_string).collect();
        return Err(Error::refused(format!("no file of the origin is {}", named.join(" or ")))
            .state("nothing was changed")
            .next("name a file of the origin by its path, or by a pattern in quotes: '*.db'"));
    }
    Ok(omission)
}

/// Fails unless it is known where the filesystem's files are.
fn check_filesystem(root: &File, point: &Path) -> Result<()> {
    let refused = |why: &str| {
        Err(Error::refused(format!("files on {} cannot be left out: {why}", point.display()))
            .state("nothing was changed")
            .next("omit the option for it, or name bytes: bytes:START+LENGTH"))
    };
    let kind = fstatfs(root).map_err(std::io::Error::from);
    let kind = kind.io_context(|| format!("examining {}", point.display()))?.filesystem_type();
    // Of other filesystems it is not known that an extent's address is one on the device.
    if ![EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC].map(|FsType(magic)| magic).contains(&kind.0) {
        return refused("only ext2, ext3, ext4 and xfs tell where their files are");
    }
    if is_read_only(root)
        .map_err(std::io::Error::from)
        .io_context(|| format!("examining {}", point.display()))?
    {
        return refused("it is mounted read-only, so its journal may hold what is not on the disk yet");
    }
    Ok(())
}

/// Selectors of files, resolved.
struct Chooser {
    /// Files and directories named by an existing path.
    inodes: BTreeSet<(DeviceNumber, u64)>,
    /// Patterns of paths.
    paths: Vec<Pattern>,
    /// Patterns of names.
    names: Vec<Pattern>,
}

impl Chooser {
    fn new(selectors: &[Selector], mounted: &FreezeSet, others: &[DeviceNumber]) -> Result<Self> {
        let mut chooser = Self { inodes: BTreeSet::new(), paths: Vec::new(), names: Vec::new() };
        let pattern = |text: &str| Pattern::new(text).expect("checked when it was parsed");
        for selector in selectors {
            match selector {
                Selector::Range(_) => {}
                Selector::Name(text) => chooser.names.push(pattern(text)),
                Selector::Path(path) => {
                    check_answers(path)?;
                    let text = path.to_string_lossy();
                    match std::fs::metadata(path) {
                        Ok(meta) => {
                            let device = DeviceNumber::from_dev(meta.dev());
                            if !mounted.devices.contains(&device) {
                                if others.contains(&device) {
                                    continue;
                                }
                                return Err(not_on_the_origin(path, mounted));
                            }
                            chooser.inodes.insert((device, meta.ino()));
                        }
                        Err(_) if text.contains(['*', '?', '[']) => chooser.paths.push(pattern(&text)),
                        Err(cause) => {
                            return Err(Error::refused(format!("{} cannot be examined", path.display()))
                                .with_source(cause)
                                .state("nothing was changed")
                                .next("name a file or directory by the path at which it is mounted now"));
                        }
                    }
                }
            }
        }
        Ok(chooser)
    }

    /// True if a path of the filesystem on `device` was named.
    fn names(&self, device: DeviceNumber) -> bool {
        self.inodes.iter().any(|(named, _)| *named == device)
    }

    /// True if the file or directory `relative` of the filesystem at `point` is named.
    fn chooses(&self, inode: (DeviceNumber, u64), point: &Path, relative: &Path) -> bool {
        if self.inodes.contains(&inode) {
            return true;
        }
        let matches =
            |pattern: &Pattern, text: &OsStr| pattern.matches_with(&text.to_string_lossy(), MATCHING);
        let is_path = || {
            let path = if relative.as_os_str().is_empty() { point.to_owned() } else { point.join(relative) };
            self.paths.iter().any(|pattern| matches(pattern, path.as_os_str()))
        };
        let is_name = |name| self.names.iter().any(|pattern| matches(pattern, name));
        (!self.paths.is_empty() && is_path()) || relative.file_name().is_some_and(is_name)
    }
}

fn not_on_the_origin(path: &Path, mounted: &FreezeSet) -> Error {
    let points: Vec<String> = mounted.points.iter().map(|point| point.display().to_string()).collect();
    Error::refused(format!(
        "{} is not on the origin, whose filesystems are at {}",
        path.display(),
        points.join(", ")
    ))
    .state("nothing was changed")
    .next("name a file or directory on these")
}

/// A walk through one filesystem.
struct Walk<'a> {
    point: &'a Path,
    device: DeviceNumber,
    include: &'a Chooser,
    exclude: &'a Chooser,
    /// Only files that are included are wanted.
    is_list: bool,
    /// Directories to be read: the path relative to the mount point, and whether it is included and excluded.
    open: Vec<(PathBuf, bool, bool)>,
    /// The largest files with one name that are left out: allocated bytes, inode, name.
    single: BinaryHeap<Reverse<(Bytes, u64, PathBuf)>>,
    /// Files with several names, by inode.
    linked: BTreeMap<u64, Linked>,
    included_count: usize,
    /// Files that are left out, but not listed, as there are too many: number and bytes.
    unlisted: (usize, Bytes),
    unread: usize,
}

/// A file with several names.
struct Linked {
    allocated: Bytes,
    link_count: u64,
    /// Those under which it is left out; None as soon as one is found under which it is not.
    names: Option<Vec<PathBuf>>,
}

impl<'a> Walk<'a> {
    fn new(point: &'a Path, device: DeviceNumber, include: &'a Chooser, exclude: &'a Chooser) -> Self {
        Self {
            point,
            device,
            include,
            exclude,
            is_list: false,
            open: vec![(PathBuf::new(), false, false)],
            single: BinaryHeap::new(),
            linked: BTreeMap::new(),
            included_count: 0,
            unlisted: (0, Bytes::ZERO),
            unread: 0,
        }
    }

    fn run(&mut self, root: &File, interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
        while let Some((directory, is_included, is_excluded)) = self.open.pop() {
            interrupt()?;
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let name = if directory.as_os_str().is_empty() { Path::new(".") } else { &directory };
            let opened = open_beneath(root, name, flags);
            match opened.and_then(|opened| self.read(opened, &directory, is_included, is_excluded)) {
                Ok(()) => {}
                // Another filesystem is mounted there, or it was removed since.
                Err(Errno::EXDEV | Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(_) => self.unread += 1,
            }
        }
        Ok(())
    }

    fn read(
        &mut self,
        opened: File,
        directory: &Path,
        is_included: bool,
        is_excluded: bool,
    ) -> nix::Result<()> {
        let meta = opened.metadata().map_err(|_| Errno::EIO)?;
        let own = (DeviceNumber::from_dev(meta.dev()), meta.ino());
        let is_included = is_included || self.include.chooses(own, self.point, directory);
        let is_excluded = is_excluded || self.exclude.chooses(own, self.point, directory);
        let at = opened.try_clone().map_err(|_| Errno::EMFILE)?;
        for entry in &mut Dir::from_fd(opened.into())?.into_iter() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let relative = directory.join(name);
            let kind = entry.file_type();
            if kind == Some(Type::Directory) {
                self.open.push((relative, is_included, is_excluded));
            } else if kind == Some(Type::File) || kind.is_none() {
                let Ok(found) = fstatat(&at, name, AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
                match SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) {
                    SFlag::S_IFDIR => self.open.push((relative, is_included, is_excluded)),
                    SFlag::S_IFREG => self.file(&found, relative, is_included, is_excluded),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn file(&mut self, found: &FileStat, relative: PathBuf, is_included: bool, is_excluded: bool) {
        let own = (DeviceNumber::from_dev(found.st_dev), found.st_ino);
        if own.0 != self.device {
            return;
        }
        let is_included = is_included || self.include.chooses(own, self.point, &relative);
        let is_excluded = is_excluded || self.exclude.chooses(own, self.point, &relative);
        let is_left_out = is_excluded || (self.is_list && !is_included);
        self.included_count += usize::from(is_included && !is_excluded);
        let allocated = Bytes(u64::try_from(found.st_blocks).unwrap_or_default().saturating_mul(STAT_BLOCK));
        let link_count: u64 = found.st_nlink;
        if link_count > 1 {
            let linked = self.linked.entry(found.st_ino).or_insert(Linked {
                allocated,
                link_count,
                names: Some(Vec::new()),
            });
            match &mut linked.names {
                Some(names) if is_left_out => names.push(relative),
                names => *names = None,
            }
        } else if is_left_out && allocated > Bytes::ZERO {
            self.single.push(Reverse((allocated, found.st_ino, relative)));
            if self.single.len() > OMITTED_FILES_MAX {
                let Some(Reverse((bytes, _, _))) = self.single.pop() else { return };
                self.unlisted = (self.unlisted.0 + 1, self.unlisted.1 + bytes);
            }
        }
    }

    /// The files that are left out, and notes on those that were to be and are not.
    fn finish(self) -> (OmittedFiles, Vec<String>) {
        let point = self.point.display();
        let mut notes = Vec::new();
        let single = self.single.into_iter().map(|Reverse((allocated, inode, name))| OmittedFile {
            inode,
            allocated,
            names: vec![name],
        });
        let mut files: Vec<OmittedFile> = single.collect();
        let mut partly = (0, Bytes::ZERO);
        for (inode, linked) in self.linked {
            match linked.names {
                Some(names) if names.len() as u64 == linked.link_count => {
                    files.push(OmittedFile { inode, allocated: linked.allocated, names });
                }
                // Another name is elsewhere: not seen, or not left out.
                Some(names) if !names.is_empty() => partly = (partly.0 + 1, partly.1 + linked.allocated),
                _ => {}
            }
        }
        files.sort_by_key(|file| (Reverse(file.allocated), file.inode));
        let unlisted = (self.unlisted.0 + files.len().saturating_sub(OMITTED_FILES_MAX), self.unlisted.1);
        files.truncate(OMITTED_FILES_MAX);
        if unlisted.0 > 0 {
            notes.push(format!(
                "{point}: {} small files that are left out ({}) are copied: only the {OMITTED_FILES_MAX} largest \
                 can be looked for while it is frozen",
                unlisted.0, unlisted.1
            ));
        }
        if partly.0 > 0 {
            notes.push(format!(
                "{point}: {} files ({}) are copied, as they have a name that was not seen or is not left out",
                partly.0, partly.1
            ));
        }
        if self.unread > 0 {
            notes.push(format!(
                "{point}: {} directories could not be read: what is below is copied",
                self.unread
            ));
        }
        (OmittedFiles { point: self.point.to_owned(), device: self.device, files }, notes)
    }
}
