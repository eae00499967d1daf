//! What the devices we make are called: names for people, UUIDs for ourselves.
//!
//! The attached volume, which people and their tools use, has the UUID `TIDEMARK-<volume>-volume-<id>`. The devices of a
//! stack show the same partitions, file systems and physical volumes as the origin. Nobody but us may use them, so they
//! have a UUID that other tools leave alone, with udev or without: `LVM-`, 64 characters, `-` and more, which is that of
//! a private device of lvm2's. lvm2 (`_is_usable_uuid` in `lib/activate/dev_manager.c`) and libblkid
//! (`sysfs_devno_is_dm_private` in util-linux `lib/sysfs.c`), and with it mount and btrfs, pass over it. lvm2 looks for its
//! own devices by the group's and the volume's id, which the 64 characters never are: they are `TIDEMARK-<volume>`, filled
//! up with `=`, and behind them stand role and id.
//!
//! The id is that of the job that made the device (or of the attached volume), so that `recover` can tell the devices of
//! a dead job from those of a living one with nothing but the kernel's list. Invariant: [`DeviceIdentity::parse`] gives
//! back what [`DeviceIdentity::uuid`] wrote.
//!
//! The name of a device of a stack is `<origin>#<role>`. lvm2 makes no name with a `#` ("-real" and "-cow" are its own);
//! udev and libdevmapper leave that character as it is.

use std::fmt;

use crate::sys::dm_ioctl::NAME_BYTES_MAX;

/// How the UUID of an attached volume begins.
const VOLUME_PREFIX: &str = "TIDEMARK-";
/// How lvm2's begin.
const LVM_PREFIX: &str = "LVM-";
/// Bytes of what stands between that and the suffix of a private device: two ids of 32.
const LVM_ID_BYTES: usize = 64;
/// Fills them up; in no volume's name here.
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
/// A COW store that the user wanted kept: recover leaves it alone.
pub const ROLE_KEPT: &str = "kept";

/// Longest part of a volume's name that goes into a UUID.
const VOLUME_BYTES_MAX: usize = LVM_ID_BYTES - VOLUME_PREFIX.len();
/// Longest role: the kernel's limit is 128 bytes for all.
const ROLE_BYTES_MAX: usize = 24;

/// Bytes of an id: 32 hexadecimal digits.
const ID_BYTES: usize = 32;

/// Who a device of ours is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceIdentity {
    /// The volume's name, as far as it fits a UUID.
    pub volume: String,
    /// One of the `ROLE_` names, or another lower-case word.
    pub role: String,
    /// The job or volume that it belongs to.
    pub id: String,
}

impl DeviceIdentity {
    /// For volume `volume`; what a UUID cannot hold of its name is left out.
    ///
    /// # Panics
    /// Where `role` is not a lower-case word or `id` not from [`new_id`]: a broken invariant.
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

    /// As the kernel has it.
    #[must_use]
    pub fn uuid(&self) -> String {
        self.to_string()
    }

    /// From the kernel; None for a device that is not ours.
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

/// True for the UUID of a device of ours.
#[must_use]
pub fn is_ours(uuid: &str) -> bool {
    DeviceIdentity::parse(uuid).is_some()
}

/// A new id.
#[must_use]
pub fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// True for what [`new_id`] makes.
#[must_use]
pub fn is_id(text: &str) -> bool {
    text.len() == ID_BYTES && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The name of a device with `role` of the stack of device `name`: "data#real". Where that would be too
/// long for the kernel, a name by id.
#[must_use]
pub fn beside(name: &str, role: &str, id: &str) -> String {
    let full = format!("{name}#{role}");
    if full.len() <= NAME_BYTES_MAX { full } else { format!("tidemark#{id}#{role}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn identities_round_trip(volume in "\\PC{0,140}", role in "volume|[a-z]{1,24}") {
            let identity = DeviceIdentity::new(&volume, &role, &new_id());
            prop_assert!(is_ours(&identity.uuid()));
            prop_assert!(identity.uuid().len() <= crate::sys::dm_ioctl::UUID_BYTES_MAX);
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
    fn other_tools_take_the_devices_of_a_stack_for_private_ones_of_lvm2() {
        let id = new_id();
        for volume in ["data", "vg-lv", &"x".repeat(127), ""] {
            let uuid = DeviceIdentity::new(volume, ROLE_PRESERVE, &id).uuid();
            // lvm2: longer than "LVM-" and two ids; libblkid: something behind the last hyphen.
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
        assert_eq!(beside("vg-lv", ROLE_REAL, &id), "vg-lv#real");
        assert!(beside(&"x".repeat(127), ROLE_REAL, &id).len() <= NAME_BYTES_MAX);
    }
}
