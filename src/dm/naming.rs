//! What the devices we make are called: names for people, UUIDs for ourselves.
//!
//! Every device has the UUID `TIDEMARK-<volume>-<role>-<id>`. The id is that of the job that made it
//! (or of the attached volume), so that `recover` can tell the devices of a dead job from those of a
//! living one with nothing but the kernel's list. Invariant: [`DeviceIdentity::parse`] gives back
//! what [`DeviceIdentity::uuid`] wrote.

use std::fmt;

use crate::sys::dm_ioctl::NAME_BYTES_MAX;

/// What every UUID of ours begins with.
pub const UUID_PREFIX: &str = "TIDEMARK-";

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

/// Longest part of a volume's name that goes into a UUID: the kernel's limit is 128 bytes for all.
const VOLUME_BYTES_MAX: usize = 64;

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
        assert!(!role.is_empty() && role.bytes().all(|byte| byte.is_ascii_lowercase()), "role '{role}'");
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
        let rest = uuid.strip_prefix(UUID_PREFIX)?;
        let (rest, id) = rest.rsplit_once('-')?;
        let (volume, role) = rest.rsplit_once('-')?;
        let word = !role.is_empty() && role.bytes().all(|byte| byte.is_ascii_lowercase());
        (word && is_id(id)).then(|| Self {
            volume: volume.to_owned(),
            role: role.to_owned(),
            id: id.to_owned(),
        })
    }
}

impl fmt::Display for DeviceIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{UUID_PREFIX}{}-{}-{}", self.volume, self.role, self.id)
    }
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

/// The name of a device with `role` beside the device `name`: "data-real". Where that would be too
/// long for the kernel, a name by id.
#[must_use]
pub fn beside(name: &str, role: &str, id: &str) -> String {
    let full = format!("{name}-{role}");
    if full.len() <= NAME_BYTES_MAX { full } else { format!("tidemark-{id}-{role}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn identities_round_trip(volume in "\\PC{0,140}", role in "[a-z]{1,8}") {
            let identity = DeviceIdentity::new(&volume, &role, &new_id());
            prop_assert!(identity.uuid().len() <= crate::sys::dm_ioctl::UUID_BYTES_MAX);
            prop_assert_eq!(DeviceIdentity::parse(&identity.uuid()), Some(identity));
        }

        #[test]
        fn foreign_uuids_are_not_ours(text in "(LVM-|TIDEMARK-)?[A-Za-z0-9-]{0,60}") {
            if let Some(identity) = DeviceIdentity::parse(&text) {
                prop_assert_eq!(identity.uuid(), text);
            }
        }
    }

    #[test]
    fn names_fit_the_kernel() {
        let id = new_id();
        assert_eq!(beside("vg-lv", ROLE_REAL, &id), "vg-lv-real");
        assert!(beside(&"x".repeat(127), ROLE_REAL, &id).len() <= NAME_BYTES_MAX);
    }
}
