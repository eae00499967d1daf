//! What a file system lies on: devices, memory, another machine.

use std::fs;
use std::path::Path;

use super::filesystem::LiesOn;
use super::{Mount, Topology};
use crate::base::DeviceNumber;

/// What a filesystem lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ground {
    /// These block devices.
    Devices(Vec<DeviceNumber>),
    /// Memory, or another machine.
    Elsewhere,
    /// A filesystem of this kind that does not say (overlay, zfs, fuse).
    Unknown(String),
}

impl Topology {
    /// What the filesystem of `path`, whose `st_dev` is `st_dev`, lies on. Some (btrfs) show an
    /// anonymous number there; their mount's source names a device, and sysfs the others.
    #[must_use]
    pub fn ground(&self, st_dev: DeviceNumber, path: &Path) -> Ground {
        if self.node(st_dev).exists() {
            return Ground::Devices(vec![st_dev]);
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
        let Some(mount) = best else { return Ground::Unknown("unknown".to_owned()) };
        match mount.source_device() {
            Some(device) => {
                let mut devices = self.btrfs_beside(device);
                devices.push(device);
                Ground::Devices(devices)
            }
            None => match LiesOn::of(&mount.kind) {
                LiesOn::Memory | LiesOn::OtherMachines => Ground::Elsewhere,
                _ => Ground::Unknown(mount.kind),
            },
        }
    }

    /// The other devices of the mounted btrfs that `device` is a part of, itself included; none where
    /// it is no part of one.
    #[must_use]
    pub fn btrfs_beside(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let Ok(filesystems) = fs::read_dir(self.root.join("sys/fs/btrfs")) else { return Vec::new() };
        filesystems
            .flatten()
            .map(|entry| self.numbers_in(&entry.path().join("devices")))
            .find(|devices| devices.contains(&device))
            .unwrap_or_default()
    }
}
