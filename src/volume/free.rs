//! Finds the bytes of an origin that are free, and those that the user leaves out ([`subset`](super::subset)).
//!
//! Read while the filesystems on the origin are frozen, between the freeze and the instant. A byte that is
//! reported as free is neither copied nor preserved, so a mistake loses data silently. The argument that
//! there is none:
//!
//! 1. *The map is that of the instant.* A frozen filesystem writes nothing and allocates nothing until it is
//!    thawed, which happens after the instant. An earlier thaw (by an administrator, or by the watchdog)
//!    invalidates the map: our own thaw then finds the filesystem thawed already (EINVAL) and must fail the
//!    copy.
//! 2. *The map is that of the disk.* The freeze writes back the whole journal: ext4 empties it
//!    (`ext4_freeze`: `jbd2_journal_flush`), xfs forces its log and writes back everything that is in it.
//!    What a recovery of the copy replays, if anything (xfs: inodes that were unlinked but open), refers to
//!    no free block. This holds for a writable filesystem. A freeze of a read-only one does none of it: its
//!    journal may not have been replayed (`noload`, `norecovery`), or may have been aborted by an error, and
//!    then blocks to which the journal or the disk still refers are free in memory only. So a read-only
//!    filesystem has no map. Whether it is read-only is checked while it is frozen, when it cannot be
//!    remounted.
//! 3. *In doubt a block is used.* ext4 answers from its buddy bitmaps. Freed blocks are free there once their
//!    transaction is committed (which the freeze does); preallocated ones are used; for a group without a
//!    bitmap, one is built with the group's own metadata; a group with a damaged bitmap fails the call. Inode
//!    tables, the journal, and backups of superblock and descriptors are used. xfs answers from its
//!    free-space btree (or the gaps in the reverse map). The log, the blocks that an allocation group
//!    reserves for its btrees (AGFL), and staged copies of shared blocks are used; extents that are still
//!    "busy" are waiting to be discarded, and are free. Only a record that says "free" counts, never a
//!    missing one.
//! 4. *Nothing else needs it.* A filesystem reports on its own device, up to its own length. The report counts
//!    only if nothing else is stacked there (see `layers`): an unmounted volume, swap, an external log, a
//!    crypt or RAID device, or a loop device over the same bytes makes them used. So does a device whose table
//!    changed, or was about to change, between the two times it is examined: if the second check,
//!    [`DeviceLayout::is_unchanged`], fails, the map was never valid.
//! 5. *Free blocks have no content* for these filesystems: none is read before it is written.
//!
//! What cannot be detected: a process that writes to the device itself, into blocks that its mounted
//! filesystem calls free. No filesystem survives that either; `--all` is for users who rely on it.
//!
//! Must not log, nor fail a copy: a filesystem that does not answer has no free bytes, and a note says why.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use crate::base::limits::FREE_EXTENTS_READ_MAX;
use crate::base::{Bytes, DeviceNumber, Error, Result, ResultExt as _};
use crate::dm::{Dm, Slot, node};
use crate::extent::free::Largest;
use crate::extent::{Extent, ExtentSet};
use crate::format::filesystem_log;
use crate::sys::file_map::FileMapReader;
use crate::sys::fsmap::FreeReader;
use crate::topology::{LoopOver, Loops, Topology};

use super::layers::{Layers, MappedDevice, View};
use super::subset::{MappedOmission, Omission};

/// The free space of an origin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreeSpace {
    /// In bytes of the origin; sorted, no two touching; not aligned to chunks.
    pub extents: Vec<Extent>,
    /// The filesystems' logs, in bytes of the origin, in order: these are written most often.
    pub logs: Vec<Extent>,
    /// Filesystems that gave no map, with the reason, and devices that objected.
    pub notes: Vec<String>,
    /// What the user leaves out, in bytes of the origin; sorted, no two touching; not aligned to chunks. None if
    /// everything is wanted.
    pub omitted: Option<Vec<Extent>>,
    /// Why more is copied than the user wants; as text.
    pub omission_notes: Vec<String>,
}

/// What is to be found out while the filesystems are frozen.
#[derive(Clone, Debug, Default)]
pub struct MapRequest {
    /// What is free.
    pub free: bool,
    /// Where that is.
    pub omission: Option<Arc<Omission>>,
}

/// A filesystem whose map will be read.
struct Source {
    point: PathBuf,
    file: File,
    device: DeviceNumber,
}

/// The devices on the origin, as found before the freeze.
pub struct DeviceLayout {
    origin: DeviceNumber,
    kernel: KernelView,
    layers: Layers,
}

/// Until when the maps are read.
#[derive(Clone, Copy, Debug)]
pub struct MapDeadlines {
    /// What is free.
    pub free: Instant,
    /// Where what is left out is.
    pub omission: Instant,
}

/// Everything that is done before the freeze. Keeps the filesystems open until the map is read.
pub struct FreeMapper {
    layout: DeviceLayout,
    sources: Vec<Source>,
    logs: Vec<Extent>,
    notes: Vec<String>,
    reader: FreeReader,
    largest: Largest,
    is_free_wanted: bool,
    omission: Option<(Arc<Omission>, FileMapReader)>,
}

impl FreeMapper {
    /// Opens the filesystems (one mount point each) and finds how their devices are stacked on `origin`.
    /// Nothing is frozen yet.
    ///
    /// # Errors
    /// If device-mapper cannot be opened; [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for files to be left out
    /// of a filesystem of which it is not known where on the origin it is. One whose free space is not known only causes a
    /// note.
    pub fn prepare(origin: DeviceNumber, filesystems: &[PathBuf], request: MapRequest) -> Result<Self> {
        let topology = Topology::default();
        let kernel = KernelView { dm: Dm::open()?, loops: topology.loops(), topology };
        let layers = Layers::observe(origin, &kernel);
        let mut notes = layers.objections();
        let mut sources: Vec<Source> = Vec::new();
        let mut devices = BTreeSet::new();
        for point in filesystems {
            match open(point, &layers, &kernel.topology) {
                Ok(source) if devices.insert(source.device) => sources.push(source),
                Ok(_) => {}
                Err(reason) if request.omission.as_ref().is_some_and(|omission| omission.is_at(point)) => {
                    return Err(not_left_out(point, &reason));
                }
                Err(reason) => notes.push(all_is_copied(point, &reason)),
            }
        }
        let logs = sources.iter().map(|source| (source.device, log_of(source.device))).collect();
        let logs = layers.free(&logs).iter().collect();
        let (reader, largest) = (FreeReader::new(), Largest::new(FREE_EXTENTS_READ_MAX));
        let layout = DeviceLayout { origin, kernel, layers };
        let is_free_wanted = request.free;
        let omission = request.omission.map(|omission| (omission, FileMapReader::new()));
        Ok(Self { layout, sources, logs, notes, reader, largest, is_free_wanted, omission })
    }

    /// The filesystems' logs, for a copy that does not need the free space. As [`FreeSpace::logs`].
    #[must_use]
    pub fn into_logs(self) -> Vec<Extent> {
        self.logs
    }

    /// Fails if `file`, opened at `point` to be frozen, belongs to another filesystem than the one whose map
    /// will be read. That would mean that another one was mounted over it meanwhile; the one with the map
    /// would not be frozen.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused); I/O errors.
    pub fn check_same(&self, point: &Path, file: &File) -> Result<()> {
        let meta = file.metadata().io_context(|| format!("examining {}", point.display()))?;
        let device = DeviceNumber::from_dev(meta.dev());
        match self.sources.iter().find(|source| source.point == point && source.device != device) {
            None => Ok(()),
            Some(_) => {
                Err(Error::refused(format!("another filesystem has been mounted at {}", point.display()))
                    .next("copy again"))
            }
        }
    }

    /// Reads the map. To be called while all of the filesystems are frozen and the origin still serves reads.
    /// Ends soon after the deadlines: what is not read by then counts as used, and is not left out.
    ///
    /// The result is valid only if the layout stays the same until the instant: check it after that, when
    /// nothing is held any more.
    #[must_use]
    pub fn read(mut self, deadlines: MapDeadlines) -> (FreeSpace, DeviceLayout) {
        let mut found =
            if self.is_free_wanted { self.read_free(deadlines.free) } else { FreeSpace::default() };
        found.logs = std::mem::take(&mut self.logs);
        if let Some((omission, reader)) = self.omission.take() {
            self.read_omitted((&omission, reader), deadlines.omission, &mut found);
        }
        (found, self.layout)
    }

    fn read_free(&mut self, deadline: Instant) -> FreeSpace {
        let mut notes = std::mem::take(&mut self.notes);
        let mut reported = BTreeMap::new();
        for source in &self.sources {
            self.largest.clear();
            match read_map(source, &mut self.reader, &mut self.largest, deadline) {
                Ok(complete) => {
                    reported
                        .insert(source.device, self.largest.finish().iter().copied().collect::<ExtentSet>());
                    if !complete {
                        notes.push(format!(
                            "{}: not all of its free space could be read while it was frozen: the \
                             rest is copied",
                            source.point.display()
                        ));
                    }
                }
                Err(reason) => notes.push(all_is_copied(&source.point, &reason)),
            }
        }
        let extents = self.layout.layers.free(&reported).iter().collect();
        FreeSpace { extents, notes, ..FreeSpace::default() }
    }

    fn read_omitted(
        &self,
        (omission, mut reader): (&Omission, FileMapReader),
        deadline: Instant,
        found: &mut FreeSpace,
    ) {
        let mut reported = BTreeMap::new();
        found.omission_notes.clone_from(&omission.notes);
        for source in &self.sources {
            let mapped = match check_writable(source) {
                Ok(()) => omission.read(source.device, &mut reader, deadline),
                Err(reason) => MappedOmission::refused(&source.point, &reason),
            };
            found.omission_notes.extend(mapped.notes);
            reported.insert(source.device, mapped.extents);
        }
        let mut omitted = self.layout.layers.free(&reported);
        omission.included.iter().for_each(|extent| omitted.remove(*extent));
        omitted.extend(omission.ranges.iter().copied());
        found.omitted = Some(omitted.iter().collect());
        let included: ExtentSet = omission.included.iter().copied().collect();
        found.extents = found.extents.iter().flat_map(|extent| included.gaps_in(*extent)).collect();
    }
}

impl DeviceLayout {
    /// The second check. False if any device on the origin changed, appeared or disappeared since the first,
    /// or if a loop device appeared whose backing is not known: then the reported free space may not be that
    /// of the origin's bytes.
    #[must_use]
    pub fn is_unchanged(&mut self) -> bool {
        let before = std::mem::replace(&mut self.kernel.loops, self.kernel.topology.loops());
        self.kernel.loops.unknown().is_subset(&before.unknown())
            && Layers::observe(self.origin, &self.kernel) == self.layers
    }
}

fn not_left_out(point: &Path, reason: &str) -> Error {
    Error::refused(format!("files on {} cannot be left out: {reason}", point.display()))
        .state("nothing was changed")
        .next("name files of other filesystems, or bytes: bytes:START+LENGTH")
}

fn all_is_copied(point: &Path, reason: &str) -> String {
    format!("{}: {reason}: all of it is copied", point.display())
}

/// The log of the filesystem on `device`, as far as known. It only affects the order of copying.
fn log_of(device: DeviceNumber) -> ExtentSet {
    let Some(file) = node::device_path(device).ok().and_then(|path| File::open(path).ok()) else {
        return ExtentSet::new();
    };
    // XFS writes bypass this cache: a page left in it, by readahead or not, would be stale for the next
    // reader.
    let advise = |advice| {
        // Only a hint, so errors do not matter.
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
    let meta = file.metadata().map_err(|error| format!("it cannot be examined: {error}"))?;
    let device = DeviceNumber::from_dev(meta.dev());
    if !layers.contains(device) {
        let name = topology.name(device);
        return Err(format!("it is on {name}, which is not mapped to the origin by linear targets alone"));
    }
    Ok(Source { point: point.to_owned(), file, device })
}

/// True if the filesystem of `file` is read-only.
///
/// # Errors
/// The errno.
pub(super) fn is_read_only(file: &File) -> nix::Result<bool> {
    Ok(fstatvfs(file)?.flags().contains(FsFlags::ST_RDONLY))
}

/// The error says why a filesystem has no map.
fn check_writable(source: &Source) -> Result<(), String> {
    match is_read_only(&source.file) {
        Ok(false) => Ok(()),
        Ok(true) => Err("it is read-only, so its journal may not be empty".to_owned()),
        Err(errno) => Err(format!("checking whether it is read-only: {errno}")),
    }
}

/// True if the whole map was read into `largest`; the error says why there is none.
fn read_map(
    source: &Source,
    reader: &mut FreeReader,
    largest: &mut Largest,
    deadline: Instant,
) -> Result<bool, String> {
    check_writable(source)?;
    let read = reader.read(&source.file, deadline, &mut |extent| largest.push(extent));
    read.map(|read| read.complete).map_err(|reason| reason.to_string())
}

struct KernelView {
    dm: Dm,
    topology: Topology,
    /// The loop devices at the start of a check: each check queries them once.
    loops: Loops,
}

impl View for KernelView {
    fn device_mapper(&self, device: DeviceNumber) -> Option<MappedDevice> {
        let name = self.dm.name_of(device).ok()??;
        let info = self.dm.info(&name).ok()?.filter(|info| info.number == device)?;
        let table = self.dm.table(&name, Slot::Active).ok()??;
        Some(MappedDevice { table, is_changing: info.has_inactive })
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
