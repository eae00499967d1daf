//! Determines what backs a file system: devices, memory, another machine.

use std::fs;
use std::path::Path;

use super::filesystem::BackingKind;
use super::{Mount, Topology};
use crate::base::DeviceNumber;

/// The backing of a filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FilesystemBacking {
    /// These block devices.
    Devices(Vec<DeviceNumber>),
    /// Memory, or another machine.
    Elsewhere,
    /// A filesystem of this kind, which does not report its backing (overlay, zfs, fuse).
    Unknown(String),
}

impl Topology {
    /// The backing of the filesystem of `path`, whose `st_dev` is `st_dev`. Some filesystems (btrfs) show an
    /// anonymous number there; then the mount's source names one device, and sysfs the others.
    #[must_use]
    pub fn filesystem_backing(&self, st_dev: DeviceNumber, path: &Path) -> FilesystemBacking {
        if self.node(st_dev).exists() {
            return FilesystemBacking::Devices(vec![st_dev]);
        }
        let mut best: Option<Mount> = None;
        for mount in self.mounts().unwrap_or_default() {
            let deeper = best
                .as_ref()
                .is_none_or(|best| mount.point.components().count() >= best.point.components().count());
            if path.starts_with(&mount.point) && deeper {
                best = Some(mount);
            }
        }
        let Some(mount) = best else { return FilesystemBacking::Unknown("unknown".to_owned()) };
        match mount.source_device() {
            Some(device) => {
                let mut devices = self.btrfs_devices(device);
                devices.push(device);
                FilesystemBacking::Devices(devices)
            }
            None => match BackingKind::of(&mount.kind) {
                BackingKind::Memory | BackingKind::OtherMachines => FilesystemBacking::Elsewhere,
                _ => FilesystemBacking::Unknown(mount.kind),
            },
        }
    }

    /// The devices of the mounted btrfs that `device` belongs to, including `device`; empty if it belongs to
    /// none.
    #[must_use]
    pub fn btrfs_devices(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let Ok(filesystems) = fs::read_dir(self.root.join("sys/fs/btrfs")) else { return Vec::new() };
        filesystems
            .flatten()
            .map(|entry| self.numbers_in(&entry.path().join("devices")))
            .find(|devices| devices.contains(&device))
            .unwrap_or_default()
    }
}
