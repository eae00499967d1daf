//! Finds the filesystems that must be frozen to make one or more origins quiet, and a mount point of each.
//!
//! A filesystem may have many mounts; one mount point is enough, as a freeze affects the superblock.
//! Filesystems on devices above the origin count too, however they are stacked: partitions, LVM, md, loop
//! devices on the origin or on a file of a filesystem on it. The topmost is frozen first, as its writeback
//! passes through those below.
//!
//! The result is valid only for the moment: mounts can come, go or move. So it is computed again right before
//! and right after the freeze ([`FreezeSet::recheck`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::base::{DeviceNumber, Error, Result};
use crate::topology::{Mount, MountTable, Topology, View};

/// Filesystem types that are read-only by nature and need no freeze.
const NEVER_WRITTEN: [&str; 4] = ["iso9660", "squashfs", "erofs", "udf"];

/// Filesystem types that use more than one device, or do not show theirs.
const NEVER_FROZEN: [&str; 3] = ["btrfs", "bcachefs", "zfs"];

/// Filesystem types that other machines may write too, bypassing the tables of this one.
const SHARED: [&str; 3] = ["gfs2", "ocfs2", "gpfs"];

/// The filesystems on one or more origins that are frozen for the same instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreezeSet {
    /// One mount point of each, in the order of freezing.
    pub points: Vec<PathBuf>,
    /// The `st_dev` of each, in the same order.
    pub devices: Vec<DeviceNumber>,
    /// How many devices each is above the lowest origin, in the same order: by the longest path, so none lies on another
    /// of the same height.
    pub heights: Vec<usize>,
    /// The height of each origin, counted in the same way. One that lies on no other has 0.
    pub origins: BTreeMap<DeviceNumber, usize>,
    /// Origins whose own filesystem, if any, has no mount that we can reach (it is in another namespace, or
    /// under another mount): the suspension must freeze it through the device. Never an origin whose
    /// filesystem has a mount point in the list, as Linux 6.1 refuses to freeze it twice.
    pub frozen_by_suspension: BTreeSet<DeviceNumber>,
    /// Filesystems above the origins that are mounted out of reach: these are not frozen.
    pub not_frozen: Vec<String>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

impl FreezeSet {
    /// Fails unless the same filesystems are to be frozen now. `when` says when they may have changed.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused); as [`filesystems_on`].
    pub fn recheck(&self, origins: &[DeviceNumber], when: &str) -> Result<Self> {
        let topology = Topology::default();
        let now = filesystems_on(origins, &topology)?;
        let key = |frozen: &Self| {
            let devices: BTreeSet<DeviceNumber> = frozen.devices.iter().copied().collect();
            (devices, frozen.frozen_by_suspension.clone(), frozen.not_frozen.clone())
        };
        if key(self) == key(&now) {
            return Ok(now);
        }
        let names: Vec<String> = origins.iter().map(|origin| topology.name(*origin)).collect();
        Err(Error::refused(format!(
            "the mounts of {} changed {when}: they were {}, and are now {}",
            names.join(", "),
            self.list(),
            now.list()
        ))
        .state("nothing of it is frozen")
        .next("copy again, and do not change mounts meanwhile; a hook must not mount or unmount anything on the origin"))
    }

    /// Fails unless `file`, opened at `point`, belongs to the filesystem that is to be frozen there.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused), I/O errors.
    pub fn check_file(&self, point: &Path, file: &File) -> Result<()> {
        let meta =
            file.metadata().map_err(|error| Error::io(format!("examining {}", point.display()), error))?;
        let device = DeviceNumber::from_dev(meta.dev());
        let planned = self.points.iter().zip(&self.devices).find(|(known, _)| *known == point);
        if planned.is_none_or(|(_, known)| *known == device) {
            return Ok(());
        }
        Err(Error::refused(format!("another filesystem has been mounted at {}", point.display()))
            .state("nothing is frozen")
            .next("copy again"))
    }

    /// The height of the filesystem at `point`; None if it is not one of these.
    #[must_use]
    pub fn height_of(&self, point: &Path) -> Option<usize> {
        self.points.iter().position(|known| known == point).map(|at| self.heights[at])
    }

    fn list(&self) -> String {
        let all: Vec<String> = self.points.iter().map(|point| point.display().to_string()).collect();
        if all.is_empty() { "nothing".to_owned() } else { all.join(", ") }
    }
}

/// Finds the filesystems on `origins` and on the devices above them. If an origin lies on another one, the filesystems
/// on the upper one come first.
///
/// # Errors
/// I/O errors of reading mountinfo and swaps.
pub fn filesystems_on(origins: &[DeviceNumber], topology: &Topology) -> Result<FreezeSet> {
    let own = topology.own_view()?;
    let mounts: Vec<PlacedMount<'_>> = own.mounts.iter().map(PlacedMount::new).collect();
    let mut other_namespaces = OtherNamespaces { topology, table: None };
    let mut found = FreezeSet::default();
    let swaps: Vec<(PathBuf, DeviceNumber)> = swap_devices(&own, topology.swaps()?);
    // The topmost first; at the same height the latest mount first.
    let mut points: Vec<(usize, usize, PathBuf, DeviceNumber)> = Vec::new();
    let heights = topology.heights_above(origins);
    let reachable = reachable(&own, heights.keys().flat_map(|device| of_device(&mounts, *device)));
    for (device, height) in heights {
        if origins.contains(&device) {
            found.origins.insert(device, height);
        }
        refuse_unfrozen(device, topology, &mounts)?;
        let of_device = of_device(&mounts, device);
        let of_device: Vec<&Mount> =
            of_device.filter(|mount| !NEVER_WRITTEN.contains(&mount.kind.as_str())).collect();
        if let Some(mount) = of_device.iter().find(|mount| reachable.contains(&mount.id)) {
            let order = own.mounts.iter().position(|other| other.point == mount.point).unwrap_or_default();
            points.push((height, order, mount.point.clone(), mount.device));
        } else if origins.contains(&device) {
            found.frozen_by_suspension.insert(device);
        } else if !of_device.is_empty() || other_namespaces.open(device)?.is_some() {
            found.not_frozen.push(format!(
                "the filesystem on {} is mounted out of reach (in another mount namespace, or under another mount) \
                 and is not frozen: the copy shows it as after a power cut",
                topology.name(device)
            ));
        }
        for (path, _) in swaps.iter().filter(|(_, number)| *number == device) {
            found.notes.push(format!("{} is swap space: it is copied as it is", path.display()));
        }
    }
    points.sort_by(|one, other| other.cmp(one));
    for (height, _, point, device) in points {
        if !found.devices.contains(&device) {
            found.points.push(point);
            found.devices.push(device);
            found.heights.push(height);
        }
    }
    Ok(found)
}

/// A mount with the device that its source names. That is looked up once for all devices: it costs a system call, and
/// writers may wait meanwhile.
struct PlacedMount<'a> {
    mount: &'a Mount,
    source: Option<DeviceNumber>,
}

impl<'a> PlacedMount<'a> {
    fn new(mount: &'a Mount) -> Self {
        Self { mount, source: mount.source_device() }
    }
}

/// The mounts whose filesystem is on `device`, as [`Mount::is_of`].
fn of_device<'a>(mounts: &[PlacedMount<'a>], device: DeviceNumber) -> impl Iterator<Item = &'a Mount> {
    let is_of =
        move |placed: &&PlacedMount<'a>| placed.mount.device == device || placed.source == Some(device);
    mounts.iter().filter(is_of).map(|placed| placed.mount)
}

/// Refuses filesystems that use several devices, that cannot be frozen through one of them, or that other
/// machines write: a copy of one device cannot show one instant of these.
fn refuse_unfrozen(device: DeviceNumber, topology: &Topology, mounts: &[PlacedMount<'_>]) -> Result<()> {
    if let Some(mount) = of_device(mounts, device).find(|mount| SHARED.contains(&mount.kind.as_str())) {
        return Err(Error::refused(format!(
            "{} holds a mounted {}, a filesystem that other machines may write: their writes do not pass \
             through this one, and no copy would be exact",
            topology.name(device),
            mount.kind
        ))
        .state("nothing was changed")
        .next("unmount it on all machines, then copy it"));
    }
    let mounted = of_device(mounts, device).find(|mount| NEVER_FROZEN.contains(&mount.kind.as_str()));
    let kind = match mounted {
        Some(mount) => mount.kind.as_str(),
        None if !topology.btrfs_devices(device).is_empty() => "btrfs",
        None => return Ok(()),
    };
    Err(Error::refused(format!(
        "{} holds a mounted {kind}, which cannot be frozen through its device",
        topology.name(device)
    ))
    .state("nothing was changed")
    .next(format!("unmount it for the copy, or use {kind}'s own snapshots and send")))
}

/// The id of one mount of each filesystem of `mounts` whose mount point leads to it: nothing is mounted over that. None of
/// a filesystem without one.
///
/// Writers may wait meanwhile, and a server on the way to a mount point may be gone. So points that need the fewest
/// servers are tried first, one of each filesystem at a time, and no other one is tried after one that is found.
fn reachable<'a>(own: &View, mounts: impl Iterator<Item = &'a Mount>) -> BTreeSet<u64> {
    let mut candidates: BTreeMap<DeviceNumber, VecDeque<&Mount>> = BTreeMap::new();
    mounts.for_each(|mount| candidates.entry(mount.device).or_default().push_back(mount));
    for of_one in candidates.values_mut() {
        of_one.make_contiguous().sort_by_key(|mount| own.servers_on_the_way(&mount.point));
    }
    let mut reachable = BTreeSet::new();
    loop {
        let tried: Vec<&Mount> = candidates.values_mut().filter_map(VecDeque::pop_front).collect();
        if tried.is_empty() {
            return reachable;
        }
        let points: Vec<&Path> = tried.iter().map(|mount| mount.point.as_path()).collect();
        for (mount, found) in tried.iter().zip(own.stat_all(&points)) {
            if found.is_ok_and(|found| found.dev == mount.device) {
                reachable.insert(mount.id);
                candidates.remove(&mount.device);
            }
        }
    }
}

fn swap_devices(own: &View, swaps: Vec<PathBuf>) -> Vec<(PathBuf, DeviceNumber)> {
    let device = |path: PathBuf| {
        let number = own.stat(&path).ok()?.block_device?;
        Some((path, number))
    };
    swaps.into_iter().filter_map(device).collect()
}

/// Opens a directory of a filesystem on `device` that is mounted in another mount namespace, through a
/// process in that namespace.
///
/// # Errors
/// I/O errors of reading the list of processes.
pub fn open_in_other_namespace(device: DeviceNumber) -> Result<Option<File>> {
    Ok(open_in(&MountTable::read(&Topology::default())?, device))
}

fn open_in(table: &MountTable, device: DeviceNumber) -> Option<File> {
    table.of(device).find_map(|(view, mount)| {
        // The owner of that namespace controls what is at this path, so the open must not block.
        view.stat(&mount.point).ok().filter(|found| found.dev == device)?;
        let path = view.path(&mount.point);
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
        let meta = file.metadata().ok()?;
        (DeviceNumber::from_dev(meta.dev()) == device).then_some(file)
    })
}

/// The mounts of all namespaces, read once, and only if needed.
struct OtherNamespaces<'a> {
    topology: &'a Topology,
    table: Option<MountTable>,
}

impl OtherNamespaces<'_> {
    fn open(&mut self, device: DeviceNumber) -> Result<Option<File>> {
        let table = match &mut self.table {
            Some(table) => table,
            None => self.table.insert(MountTable::read(self.topology)?),
        };
        Ok(open_in(table, device))
    }
}
