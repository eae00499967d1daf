//! Names and UUIDs of our devices. Names are for users, UUIDs identify the devices.
//!
//! The attached volume, which users and their tools access, has the UUID `TIDEMARK-<volume>-volume-<id>`. The
//! devices of a stack show the same partitions, file systems and physical volumes as the origin, and no other
//! tool may use them. So they have a UUID that other tools leave alone, with or without udev: `LVM-`, 64
//! characters, `-` and a suffix, the form of a private device of lvm2. lvm2 (`_is_usable_uuid` in
//! `lib/activate/dev_manager.c`) and libblkid (`sysfs_devno_is_dm_private` in util-linux `lib/sysfs.c`), and
//! through it mount and btrfs, skip such a device. lvm2 finds its own devices by the ids of group and volume.
//! The 64 characters are never such ids: they are `TIDEMARK-<volume>`, padded with `=`, and followed by role
//! and id.
//!
//! The id is that of the job that created the device (or of the attached volume), so that `recover` can
//! distinguish the devices of a dead job from those of a running one by the kernel's list alone. Invariant:
//! [`DeviceIdentity::parse`] returns what [`DeviceIdentity::uuid`] encoded.
//!
//! The name of a stack's device is `<origin>#<role>`. lvm2 uses no `#` in names ("-real" and "-cow" are its
//! own suffixes); udev and libdevmapper do not escape that character.

use std::fmt;

use crate::sys::dm_ioctl::NAME_BYTES_MAX;

/// Prefix of the UUID of an attached volume.
const VOLUME_PREFIX: &str = "TIDEMARK-";
/// Prefix of lvm2's UUIDs.
const LVM_PREFIX: &str = "LVM-";
/// Bytes between that prefix and the suffix of a private device: two ids of 32.
const LVM_ID_BYTES: usize = 64;
/// Pads these bytes; never part of a volume's name here.
const FILL: char = '=';

/// The attached volume itself: stays when a job ends.
pub const ROLE_VOLUME: &str = "volume";
/// Carries the origin's own table while a stack is in place.
pub const ROLE_REAL: &str = "real";
/// Preserves originals before the first write: `snapshot-origin` over `real`.
pub const ROLE_PRESERVE: &str = "preserve";
/// The snapshot.
pub const ROLE_SNAP: &str = "snap";
/// The COW store's device.
pub const ROLE_COW: &str = "cow";
/// A COW store to be kept: recover leaves it alone.
pub const ROLE_KEPT: &str = "kept";

/// Carries the own table of a volume that has kept snapshots.
pub const ROLE_DATA: &str = "data";
/// Preserves originals for kept snapshots: `snapshot-origin` over [`ROLE_DATA`].
pub const ROLE_KEEP: &str = "keep";
/// Merges a snapshot into the volume that is rolled back to it.
pub const ROLE_MERGE: &str = "merge";
/// The log of such a merge.
pub const ROLE_LOG: &str = "log";
/// The COW store of a kept snapshot.
pub const ROLE_STORE: &str = "store";
/// The kernel's snapshot target of a kept snapshot.
pub const ROLE_VIEW: &str = "view";
/// What users see of a kept snapshot: read-only, over its [`ROLE_VIEW`].
pub const ROLE_SNAPSHOT: &str = "snapshot";
/// What users see of a clone of a kept snapshot: writable, over its [`ROLE_VIEW`].
pub const ROLE_CLONE: &str = "clone";
/// A second name for the device that a view is about to read through.
pub const ROLE_ALIAS: &str = "alias";
/// Shows zeros where a kept snapshot of a subset leaves something out, and its [`ROLE_VIEW`] elsewhere.
pub const ROLE_MASK: &str = "mask";

/// True for the role of a device that stays when the command that created it ends.
#[must_use]
pub fn is_lasting(role: &str) -> bool {
    const LASTING: [&str; 12] = [
        ROLE_VOLUME,
        ROLE_KEPT,
        ROLE_DATA,
        ROLE_KEEP,
        ROLE_MERGE,
        ROLE_LOG,
        ROLE_STORE,
        ROLE_VIEW,
        ROLE_SNAPSHOT,
        ROLE_CLONE,
        ROLE_ALIAS,
        ROLE_MASK,
    ];
    LASTING.contains(&role)
}

/// Longest part of a volume's name in a UUID.
const VOLUME_BYTES_MAX: usize = LVM_ID_BYTES - VOLUME_PREFIX.len();
/// Longest role: the kernel limits the whole UUID to 128 bytes.
const ROLE_BYTES_MAX: usize = 24;

/// Bytes of an id: 32 hexadecimal digits.
const ID_BYTES: usize = 32;

/// The identity of one of our devices, as encoded in its UUID.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceIdentity {
    /// The volume's name, truncated to fit.
    pub volume: String,
    /// One of the `ROLE_` names, or another lower-case word.
    pub role: String,
    /// The job or volume that it belongs to.
    pub id: String,
}

impl DeviceIdentity {
    /// For volume `volume`; characters that a UUID cannot hold are replaced, and a long name is cut.
    ///
    /// # Panics
    /// If `role` is not a lower-case word, or `id` is not from [`new_id`]: a broken invariant.
    #[must_use]
    pub fn new(volume: &str, role: &str, id: &str) -> Self {
        assert!(is_role(role), "role '{role}'");
        assert!(is_id(id), "id '{id}'");
        let volume = volume
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "_.+-".contains(c) { c } else { '_' })
            .take(VOLUME_BYTES_MAX)
            .collect();
        Self { volume, role: role.to_owned(), id: id.to_owned() }
    }

    /// The UUID for the kernel.
    #[must_use]
    pub fn uuid(&self) -> String {
        self.to_string()
    }

    /// Parses a UUID from the kernel; None for a device that is not ours.
    #[must_use]
    pub fn parse(uuid: &str) -> Option<Self> {
        let (rest, id) = uuid.rsplit_once('-')?;
        let (rest, role) = rest.rsplit_once('-')?;
        let volume = match rest.strip_prefix(LVM_PREFIX) {
            Some(filled) if filled.len() == LVM_ID_BYTES => {
                filled.strip_prefix(VOLUME_PREFIX)?.trim_end_matches(FILL)
            }
            Some(_) => return None,
            None if role == ROLE_VOLUME => rest.strip_prefix(VOLUME_PREFIX)?,
            None => return None,
        };
        let identity = Self { volume: volume.to_owned(), role: role.to_owned(), id: id.to_owned() };
        (is_role(role) && is_id(id) && identity.uuid() == uuid).then_some(identity)
    }
}

impl fmt::Display for DeviceIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { volume, role, id } = self;
        if role == ROLE_VOLUME {
            return write!(f, "{VOLUME_PREFIX}{volume}-{role}-{id}");
        }
        let name = format!("{VOLUME_PREFIX}{volume}");
        write!(f, "{LVM_PREFIX}{name:=<LVM_ID_BYTES$}-{role}-{id}")
    }
}

fn is_role(text: &str) -> bool {
    (1..=ROLE_BYTES_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_lowercase())
}

/// True for the UUID of one of our devices.
#[must_use]
pub fn is_ours(uuid: &str) -> bool {
    DeviceIdentity::parse(uuid).is_some()
}

/// A new id.
#[must_use]
pub fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// True for an id of the form that [`new_id`] returns.
#[must_use]
pub fn is_id(text: &str) -> bool {
    text.len() == ID_BYTES && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The name of the device with `role` in the stack of device `name`: "data#real". A name by id if that would
/// be too long for the kernel.
#[must_use]
pub fn stack_device_name(name: &str, role: &str, id: &str) -> String {
    let full = format!("{name}#{role}");
    if full.len() <= NAME_BYTES_MAX { full } else { format!("tidemark#{id}#{role}") }
}

/// The names of the devices below a volume that has kept snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeNames {
    /// Has the role [`ROLE_DATA`].
    pub data: String,
    /// Has the role [`ROLE_KEEP`].
    pub keep: String,
    /// Has the role [`ROLE_MERGE`].
    pub merge: String,
    /// Has the role [`ROLE_LOG`].
    pub log: String,
}

impl VolumeNames {
    /// For `volume`, whose set of snapshots has the id `set`.
    #[must_use]
    pub fn new(volume: &str, set: &str) -> Self {
        Self {
            data: stack_device_name(volume, ROLE_DATA, set),
            keep: stack_device_name(volume, ROLE_KEEP, set),
            merge: stack_device_name(volume, ROLE_MERGE, set),
            log: stack_device_name(volume, ROLE_LOG, set),
        }
    }
}

/// The names of the devices of a kept snapshot: "data@monday", "data@monday#view" and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotNames {
    /// Has the role [`ROLE_SNAPSHOT`].
    pub snapshot: String,
    /// Has the role [`ROLE_VIEW`].
    pub view: String,
    /// Has the role [`ROLE_STORE`].
    pub store: String,
    /// Has the role [`ROLE_ALIAS`].
    pub alias: String,
    /// Has the role [`ROLE_MASK`].
    pub mask: String,
}

impl SnapshotNames {
    /// For snapshot `name`, with the id `id`, of `volume`.
    #[must_use]
    pub fn new(volume: &str, name: &str, id: &str) -> Self {
        let snapshot = format!("{volume}@{name}");
        let of = |role| stack_device_name(&snapshot, role, id);
        Self {
            view: of(ROLE_VIEW),
            store: of(ROLE_STORE),
            alias: of(ROLE_ALIAS),
            mask: of(ROLE_MASK),
            snapshot,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The kernel's field is 129 bytes with the final zero.
    const UUID_BYTES_MAX: usize = 128;

    proptest! {
        #[test]
        fn identities_round_trip(volume in "\\PC{0,140}", role in "volume|[a-z]{1,24}") {
            let identity = DeviceIdentity::new(&volume, &role, &new_id());
            prop_assert!(is_ours(&identity.uuid()));
            prop_assert!(identity.uuid().len() <= UUID_BYTES_MAX);
            prop_assert_eq!(DeviceIdentity::parse(&identity.uuid()), Some(identity));
        }

        #[test]
        fn foreign_uuids_are_not_ours(text in "(LVM-|TIDEMARK-|LVM-TIDEMARK-)?[A-Za-z0-9=-]{0,60}") {
            if let Some(identity) = DeviceIdentity::parse(&text) {
                prop_assert_eq!(identity.uuid(), text);
            }
        }
    }

    #[test]
    fn stack_devices_look_like_private_devices_of_lvm2() {
        let id = new_id();
        for volume in ["data", "vg-lv", &"x".repeat(127), ""] {
            let uuid = DeviceIdentity::new(volume, ROLE_PRESERVE, &id).uuid();
            // lvm2: longer than "LVM-" and two ids; libblkid: text after the last hyphen.
            assert!(uuid.starts_with("LVM-") && uuid.len() > 4 + 64 + 1, "{uuid}");
            assert_eq!(uuid.as_bytes()[4 + 64], b'-', "{uuid}");
            assert!(!uuid.ends_with('-'));
        }
        let volume = DeviceIdentity::new("data", ROLE_VOLUME, &id).uuid();
        assert_eq!(volume, format!("TIDEMARK-data-volume-{id}"));
        assert!(!is_ours(&format!("LVM-{}-real", "x".repeat(64))), "lvm2's own");
    }

    #[test]
    fn names_fit_the_kernel() {
        let id = new_id();
        assert_eq!(stack_device_name("vg-lv", ROLE_REAL, &id), "vg-lv#real");
        assert!(stack_device_name(&"x".repeat(127), ROLE_REAL, &id).len() <= NAME_BYTES_MAX);
    }
}
