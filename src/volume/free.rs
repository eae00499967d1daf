//! Which bytes of an origin does nobody need?
//!
//! Asked while the filesystems on the origin are frozen, between the freeze and the instant. A byte
//! that is called free here is neither copied nor preserved, so a mistake loses data, silently. The
//! argument that there is none:
//!
//! 1. *The map is the instant's.* A frozen filesystem writes nothing and allocates nothing until it
//!    is thawed, and it is thawed behind the instant. Whoever thaws it earlier (an administrator, the
//!    watchdog) voids the map: the thaw that finds it thawed already (EINVAL) must fail the copy.
//! 2. *The map is the disk's.* The freeze writes the journal back to its last entry: ext4 empties it
//!    (`ext4_freeze`: `jbd2_journal_flush`), xfs forces its log and pushes everything that it tells of to
//!    its place. What a recovery of the copy replays, if anything (xfs: inodes that were unlinked and
//!    open), names no free block. That holds for a filesystem that is writable. One that is read-only
//!    is frozen without any of this: its journal may not have been replayed (`noload`,
//!    `norecovery`), or it may have been aborted by an error, and then the blocks that its journal or
//!    its disk still refer to are free in memory alone. So a read-only one has no map; it is asked
//!    for while it is frozen, when it cannot be remounted.
//! 3. *What is in doubt is used.* ext4 answers from its buddy bitmaps: blocks that were freed are free
//!    there once their transaction is committed (which the freeze does), preallocated ones are used,
//!    groups without a bitmap are made up with their own metadata, groups whose bitmap is damaged fail
//!    the call. Inodes' tables, the journal, backups of superblock and descriptors are used. xfs
//!    answers from its free-space btree (or the gaps in the reverse map): the log, the blocks that an
//!    allocation group keeps for its own btrees (AGFL), staged copies of shared blocks are used;
//!    extents that are still "busy" are waiting to be discarded, and are free. Only records that say
//!    "free" count, none that is missing.
//! 4. *Nobody else needs it.* A filesystem speaks for its own device, as long as that is, and only
//!    where it alone lies there (see `layers`): an unmounted volume, swap, an external
//!    log, a crypt or RAID device, a loop device over the same bytes, all object. So does a device
//!    whose table changed, or was about to change, between the two looks at it: where the second one,
//!    [`Picture::still_holds`], says so, the map was never good.
//! 5. *Contents of free blocks have no meaning* to these filesystems: none is read before it is written.
//!
//! What nobody can see: a process that writes to the device itself, into what its mounted filesystem
//! calls free. No filesystem survives that either; `--all` is for those who rely on it.
//!
//! Must not log, nor fail a copy: what does not answer has no free bytes, and a note says why.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use crate::base::limits::{FREE_EXTENTS_READ_MAX, FREE_MAP_TIME_MAX};
use crate::base::{Bytes, DeviceNumber, Error, Result, ResultExt as _};
use crate::dm::{Dm, Slot, node};
use crate::extent::free::Largest;
use crate::extent::{Extent, ExtentSet};
use crate::format::filesystem_log;
use crate::sys::fsmap::FreeReader;
use crate::topology::{LoopOver, Loops, Topology};

use super::layers::{Layers, Seen, View};

/// What is free on an origin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreeSpace {
    /// In bytes of the origin; sorted, no two touching; not aligned to chunks.
    pub extents: Vec<Extent>,
    /// Where the filesystems' logs are, in bytes of the origin, in order: what is written most.
    pub logs: Vec<Extent>,
    /// Which filesystem gave no map and why, and who else stood in the way.
    pub notes: Vec<String>,
}

/// A filesystem that can be asked.
struct Source {
    point: PathBuf,
    file: File,
    device: DeviceNumber,
}

/// How devices lie on the origin, as seen before the freeze.
pub struct Picture {
    origin: DeviceNumber,
    kernel: Kernel,
    layers: Layers,
}

/// Everything that can be done before the freeze. It keeps the filesystems in use until the map is read.
pub struct FreeMapper {
    picture: Picture,
    sources: Vec<Source>,
    logs: Vec<Extent>,
    notes: Vec<String>,
    reader: FreeReader,
    largest: Largest,
}

impl FreeMapper {
    /// Opens the filesystems (a mount point of each) and finds out how their devices lie on `origin`.
    /// Nothing is frozen yet.
    ///
    /// # Errors
    /// Where device-mapper cannot be opened. A filesystem that cannot be asked is a note.
    pub fn prepare(origin: DeviceNumber, filesystems: &[PathBuf]) -> Result<Self> {
        let topology = Topology::default();
        let kernel = Kernel { dm: Dm::open()?, loops: topology.loops(), topology };
        let layers = Layers::observe(origin, &kernel);
        let mut notes = layers.objections();
        let mut sources: Vec<Source> = Vec::new();
        let mut devices = BTreeSet::new();
        for point in filesystems {
            match open(point, &layers, &kernel.topology) {
                Ok(source) if devices.insert(source.device) => sources.push(source),
                Ok(_) => {}
                Err(reason) => notes.push(all_is_copied(point, &reason)),
            }
        }
        let logs = sources.iter().map(|source| (source.device, log_of(source.device))).collect();
        let logs = layers.free(&logs).iter().collect();
        let (reader, largest) = (FreeReader::new(), Largest::new(FREE_EXTENTS_READ_MAX));
        let picture = Picture { origin, kernel, layers };
        Ok(Self { picture, sources, logs, notes, reader, largest })
    }

    /// Where the filesystems' logs are, for who does not ask what is free. As [`FreeSpace::logs`].
    #[must_use]
    pub fn into_logs(self) -> Vec<Extent> {
        self.logs
    }

    /// Fails where `file`, opened at `point` in order to freeze it, is another filesystem than the one that will
    /// be asked: it was mounted over that meanwhile, and the one that is asked would go on writing.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused); I/O errors.
    pub fn check_same(&self, point: &Path, file: &File) -> Result<()> {
        let meta = file.metadata().io_context(|| format!("looking at {}", point.display()))?;
        let device = DeviceNumber::from_dev(meta.dev());
        match self.sources.iter().find(|source| source.point == point && source.device != device) {
            None => Ok(()),
            Some(_) => Err(Error::refused(format!(
                "another filesystem was mounted at {} meanwhile",
                point.display()
            ))
            .next("copy again")),
        }
    }

    /// Reads the map. To be called while every one of the filesystems is frozen and the origin still
    /// answers reads; ends within about [`FREE_MAP_TIME_MAX`].
    ///
    /// What it says is good only if the picture holds until the instant: ask it behind that, when nothing
    /// is held any more.
    #[must_use]
    pub fn read(mut self) -> (FreeSpace, Picture) {
        let deadline = Instant::now() + FREE_MAP_TIME_MAX;
        let mut notes = self.notes;
        let mut said = BTreeMap::new();
        for source in &self.sources {
            self.largest.clear();
            match ask(source, &mut self.reader, &mut self.largest, deadline) {
                Ok(complete) => {
                    said.insert(source.device, self.largest.finish().iter().copied().collect::<ExtentSet>());
                    if !complete {
                        notes.push(format!(
                            "{}: there was no time to read all of its free space while it was frozen: the \
                             rest is copied",
                            source.point.display()
                        ));
                    }
                }
                Err(reason) => notes.push(all_is_copied(&source.point, &reason)),
            }
        }
        let extents = self.picture.layers.free(&said).iter().collect();
        (FreeSpace { extents, logs: self.logs, notes }, self.picture)
    }
}

impl Picture {
    /// The second look. False where any device on the origin was changed, came or went since the first, or a loop device
    /// came that does not say what it shows: what the filesystems said is then not known to be true of the origin's bytes.
    #[must_use]
    pub fn still_holds(mut self) -> bool {
        let before = std::mem::replace(&mut self.kernel.loops, self.kernel.topology.loops());
        self.kernel.loops.unknown().is_subset(&before.unknown())
            && Layers::observe(self.origin, &self.kernel) == self.layers
    }
}

fn all_is_copied(point: &Path, reason: &str) -> String {
    format!("{}: {reason}: all of it is copied", point.display())
}

/// Where the log of the filesystem on `device` is, as far as it can be told. Only an order follows from it.
fn log_of(device: DeviceNumber) -> ExtentSet {
    let Some(file) = node::device_path(device).ok().and_then(|path| File::open(path).ok()) else {
        return ExtentSet::new();
    };
    // XFS writes past this cache: what we leave in it, read ahead or not, would be old to the next who reads there.
    let advise = |advice| {
        // Advice is all it is.
        let _ = posix_fadvise(&file, 0, 0, advice);
    };
    advise(PosixFadviseAdvice::POSIX_FADV_RANDOM);
    let mut read = |at: Bytes, length: usize| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, at.get()).ok().map(|()| bytes)
    };
    let found = filesystem_log::find(&mut read);
    advise(PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    found.into_iter().collect()
}

fn open(point: &Path, layers: &Layers, topology: &Topology) -> Result<Source, String> {
    let file = File::open(point).map_err(|error| format!("it cannot be opened: {error}"))?;
    let meta = file.metadata().map_err(|error| format!("it cannot be looked at: {error}"))?;
    let device = DeviceNumber::from_dev(meta.dev());
    if !layers.reach(device) {
        let name = topology.name(device);
        return Err(format!("it lies on {name}, which is not mapped to the origin by linear targets alone"));
    }
    Ok(Source { point: point.to_owned(), file, device })
}

/// True where the whole map was read into `largest`; why there is none.
fn ask(
    source: &Source,
    reader: &mut FreeReader,
    largest: &mut Largest,
    deadline: Instant,
) -> Result<bool, String> {
    let flags =
        fstatvfs(&source.file).map_err(|errno| format!("asking whether it is read-only: {errno}"))?.flags();
    if flags.contains(FsFlags::ST_RDONLY) {
        return Err("it is read-only, so that its journal may not be empty".to_owned());
    }
    let told = reader.read(&source.file, deadline, &mut |extent| largest.push(extent));
    told.map(|told| told.complete).map_err(|reason| reason.to_string())
}

struct Kernel {
    dm: Dm,
    topology: Topology,
    /// As they were at the beginning of a look: each one asks them once.
    loops: Loops,
}

impl View for Kernel {
    fn device_mapper(&self, device: DeviceNumber) -> Option<Seen> {
        let name = self.dm.name_of(device).ok()??;
        let info = self.dm.info(&name).ok()?.filter(|info| info.number == device)?;
        let table = self.dm.table(&name, Slot::Active).ok()??;
        Some(Seen { table, is_changing: info.has_inactive })
    }

    fn holders(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let mut holders = self.topology.holders(device);
        holders.extend(self.topology.partitions(device));
        holders
    }

    fn loops(&self, device: DeviceNumber) -> Vec<LoopOver> {
        self.loops.over(device)
    }

    fn name(&self, device: DeviceNumber) -> String {
        self.topology.name(device)
    }
}
