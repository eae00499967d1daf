//! Which filesystems must be frozen for an origin to be quiet, and where can they be reached?
//!
//! A filesystem may be mounted many times; one mount point of each is enough, because a freeze is the
//! superblock's. Filesystems on devices above the origin (partitions, LVM on top) count too.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use crate::base::{DeviceNumber, Error, Result};
use crate::topology::{Mount, Topology, device_number};

/// Filesystem types that cannot be frozen: read-only by nature.
const NEVER_WRITTEN: [&str; 4] = ["iso9660", "squashfs", "erofs", "udf"];

/// Filesystem types that keep more than one device, or hide theirs.
const NEVER_FROZEN: [&str; 3] = ["btrfs", "bcachefs", "zfs"];

/// The filesystems on an origin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frozen {
    /// One mount point of each, in the order of freezing: those mounted last come first, so that a
    /// filesystem in a file on another is frozen before the one that it lies on.
    pub points: Vec<PathBuf>,
    /// The origin's own filesystem, if it has one, is mounted nowhere that we can reach (another
    /// namespace, hidden by another mount): the suspension must freeze it by its device. Never true
    /// together with a mount point of the same filesystem: Linux 6.1 refuses to freeze it twice.
    pub lock_filesystem: bool,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Finds the filesystems on `origin` and the devices above it.
///
/// # Errors
/// I/O errors of reading mountinfo and swaps.
pub fn filesystems_on(origin: DeviceNumber, topology: &Topology) -> Result<Frozen> {
    let mounts = topology.mounts()?;
    let mut found = Frozen::default();
    let swaps = topology.swaps()?;
    for device in topology.above(origin) {
        refuse_unfrozen(device, topology, &mounts)?;
        let of_device: Vec<&Mount> = mounts
            .iter()
            .filter(|mount| {
                Topology::is_mount_of(mount, device) && !NEVER_WRITTEN.contains(&mount.kind.as_str())
            })
            .collect();
        let reachable = of_device.iter().find(|mount| is_reachable(mount));
        if let Some(mount) = reachable {
            found.points.push(mount.point.clone());
        } else if device == origin {
            found.lock_filesystem = true;
        } else if !of_device.is_empty() {
            found.notes.push(format!(
                "the filesystem on {} is mounted out of our reach: the copy shows it as after a power cut",
                topology.name(device)
            ));
        }
        for swap in &swaps {
            if device_number(swap).is_ok_and(|number| number == Some(device)) {
                found.notes.push(format!("{} is swap space: it is copied as it is", swap.display()));
            }
        }
    }
    let order = |point: &PathBuf| mounts.iter().position(|mount| mount.point == *point);
    found.points.sort_by_key(|point| std::cmp::Reverse(order(point)));
    found.points.dedup();
    Ok(found)
}

/// Filesystems that span devices, or that a freeze does not reach through one of them, have no
/// instant that a copy of one device could show.
fn refuse_unfrozen(device: DeviceNumber, topology: &Topology, mounts: &[Mount]) -> Result<()> {
    let mounted = mounts
        .iter()
        .find(|mount| Topology::is_mount_of(mount, device) && NEVER_FROZEN.contains(&mount.kind.as_str()));
    let kind = match mounted {
        Some(mount) => mount.kind.as_str(),
        None if !topology.btrfs_beside(device).is_empty() => "btrfs",
        None => return Ok(()),
    };
    Err(Error::refused(format!(
        "{} holds a mounted {kind}, which cannot be frozen through its device",
        topology.name(device)
    ))
    .state("nothing was changed")
    .next(format!("unmount it for the copy, or use {kind}'s own snapshots and send")))
}

/// The mount point still leads to this very filesystem: nothing is mounted over it.
fn is_reachable(mount: &Mount) -> bool {
    fs::metadata(&mount.point).is_ok_and(|meta| DeviceNumber::from_dev(meta.dev()) == mount.device)
}
