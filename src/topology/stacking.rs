//! Finds the devices above and below a device, through all levels.

use std::collections::{BTreeMap, BTreeSet};

use super::{FilesystemBacking, Topology};
use crate::base::DeviceNumber;

/// Highest stack of devices. Beyond it a device keeps the height at which it was first found, so that a walk
/// ends even if devices form a circle.
const STACK_HEIGHT_MAX: usize = 64;

impl Topology {
    /// Every device below `device`, and itself: slaves, the disk of a partition, the device below the file of
    /// a loop device.
    #[must_use]
    pub fn stack(&self, device: DeviceNumber) -> BTreeSet<DeviceNumber> {
        self.stack_to(device, &|_| false)
    }

    /// As [`Topology::stack`], without what is beneath a device for which `ends` is true.
    pub(super) fn stack_to(
        &self,
        device: DeviceNumber,
        ends: &dyn Fn(DeviceNumber) -> bool,
    ) -> BTreeSet<DeviceNumber> {
        let mut seen = BTreeSet::new();
        let mut open = vec![device];
        while let Some(at) = open.pop() {
            if seen.insert(at) && !ends(at) {
                open.extend(self.directly_beneath(at));
            }
        }
        seen
    }

    fn directly_beneath(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let node = self.node(device);
        let mut beneath = self.numbers_in(&node.join("slaves"));
        beneath.extend(self.disk_of(device));
        if let Some(shown) = self.attached_loop(device) {
            beneath.extend(shown.device_beneath());
            if let Some(number) = shown.filesystem_beneath()
                && let FilesystemBacking::Devices(devices) =
                    self.filesystem_backing(number, &self.backing_path(device).unwrap_or_default())
            {
                beneath.extend(devices);
            }
        }
        beneath
    }

    /// The rotating disks beneath `device`, or `device` itself: those with no other device beneath them. Reads from two
    /// places of one of them cost its heads a way each time.
    #[must_use]
    pub fn rotating_disks(&self, device: DeviceNumber) -> BTreeSet<DeviceNumber> {
        let is_disk =
            |disk: &DeviceNumber| self.is_rotational(*disk) && self.directly_beneath(*disk).is_empty();
        self.stack(device).into_iter().filter(is_disk).collect()
    }

    /// Every device above one of `devices`, and these: partitions, holders, loop devices on them or on files of
    /// their filesystems, and so on. Each with its height, by the longest path from any of `devices`.
    #[must_use]
    pub fn heights_above(&self, devices: &[DeviceNumber]) -> BTreeMap<DeviceNumber, usize> {
        let loops = self.loops();
        let mut heights = BTreeMap::new();
        let mut open: Vec<(DeviceNumber, usize)> = devices.iter().map(|device| (*device, 0)).collect();
        while let Some((at, height)) = open.pop() {
            let is_known =
                heights.get(&at).is_some_and(|known| *known >= height || height > STACK_HEIGHT_MAX);
            if is_known {
                continue;
            }
            heights.insert(at, height);
            let next = self.holders(at).into_iter().chain(self.partitions(at));
            let shown_by = loops.over(at).into_iter().map(|over| over.device);
            let next = next.chain(shown_by).chain(loops.over_files_in(at));
            open.extend(next.map(|above| (above, height + 1)));
        }
        heights
    }

    /// Every device above `device`, and itself: the keys of [`Topology::heights_above`].
    #[must_use]
    pub fn above(&self, device: DeviceNumber) -> BTreeSet<DeviceNumber> {
        self.heights_above(&[device]).into_keys().collect()
    }
}
