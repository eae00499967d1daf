//! The order in which the filesystems and volumes of a group are held.
//!
//! A write to a volume may become a write to a filesystem below it, if a loop device leads from the one to the other. So
//! what is higher is held first: its filesystems are frozen, then it is suspended, and only then the filesystems below are
//! frozen. In any other order a suspension would wait for writes that wait for a thaw. Volumes of which none lies on
//! another are suspended after all filesystems are frozen, so that the writers of all wait for the shortest time.

use std::path::PathBuf;

use crate::base::DeviceNumber;
use crate::volume::FreezeSet;

/// One step of holding a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// These filesystems are frozen.
    Filesystems(Vec<PathBuf>),
    /// The member of this index is suspended.
    Member(usize),
}

/// The order for the volumes `members`. Begins with filesystems, even if there are none.
pub(super) fn hold_order(frozen: &FreezeSet, members: &[DeviceNumber]) -> Vec<Held> {
    let height_of = |member: &DeviceNumber| frozen.origins.get(member).copied().unwrap_or_default();
    let mut left: Vec<(usize, &PathBuf)> = frozen.heights.iter().copied().zip(&frozen.points).collect();
    let mut levels: Vec<usize> = members.iter().map(height_of).collect();
    levels.sort_unstable();
    levels.dedup();
    let mut order = Vec::new();
    for level in levels.into_iter().rev() {
        let above = left.iter().take_while(|(height, _)| *height >= level).count();
        let frozen: Vec<PathBuf> = left.drain(..above).map(|(_, point)| point.clone()).collect();
        if order.is_empty() || !frozen.is_empty() {
            order.push(Held::Filesystems(frozen));
        }
        let of_level = members.iter().enumerate().filter(|(_, member)| height_of(member) == level);
        order.extend(of_level.map(|(index, _)| Held::Member(index)));
    }
    order
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn number(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 253, minor }
    }

    fn set(points: &[(&str, usize)], origins: &[(u32, usize)]) -> FreezeSet {
        FreezeSet {
            points: points.iter().map(|(point, _)| PathBuf::from(point)).collect(),
            devices: points.iter().map(|_| number(9)).collect(),
            heights: points.iter().map(|(_, height)| *height).collect(),
            origins: origins
                .iter()
                .map(|(minor, height)| (number(*minor), *height))
                .collect::<BTreeMap<_, _>>(),
            ..FreezeSet::default()
        }
    }

    fn filesystems(points: &[&str]) -> Held {
        Held::Filesystems(points.iter().map(PathBuf::from).collect())
    }

    #[test]
    fn volumes_beside_each_other_are_suspended_after_all_filesystems_are_frozen() {
        let frozen = set(&[("/a/loop", 2), ("/a", 0), ("/b", 0)], &[(1, 0), (2, 0)]);
        let order = hold_order(&frozen, &[number(1), number(2)]);
        assert_eq!(order, [filesystems(&["/a/loop", "/a", "/b"]), Held::Member(0), Held::Member(1)]);
        assert_eq!(hold_order(&set(&[], &[(1, 0)]), &[number(1)]), [filesystems(&[]), Held::Member(0)]);
    }

    #[test]
    fn an_upper_volume_is_suspended_before_the_filesystem_below_it_is_frozen() {
        // /b is on volume 2, which is on a file of /a, which is on volume 1.
        let frozen = set(&[("/b", 2), ("/a", 0)], &[(1, 0), (2, 2)]);
        let order = hold_order(&frozen, &[number(1), number(2)]);
        assert_eq!(order, [filesystems(&["/b"]), Held::Member(1), filesystems(&["/a"]), Held::Member(0)]);
        // Nothing is mounted on the upper volume: programs write to it.
        let order = hold_order(&set(&[("/a", 0)], &[(1, 0), (2, 2)]), &[number(1), number(2)]);
        assert_eq!(order, [filesystems(&[]), Held::Member(1), filesystems(&["/a"]), Held::Member(0)]);
    }
}
