//! Detects that other machines use the volume too. Their writes bypass the tables of this machine, so no copy would
//! be exact, nor the volume's own snapshot.
//!
//! A volume group that lvmlockd shares between machines is recognized by what its locks leave in this kernel
//! while it is started: with sanlock a volume `lvmlock` of the group, with dlm a lock space of its name. Only
//! the other machines know whether they have this volume active. Not detected: the lock type `idm`, whose
//! locks are in the disks, and a group that other machines use without locks.

use std::path::Path;

use super::lvm_lock::volume_group;
use crate::base::{Error, Result};
use crate::dm::{DeviceInfo, Dm};

/// The lock spaces of dlm.
const DLM: &str = "/sys/kernel/dlm";

/// Refuses a volume of a shared group.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused); the kernel's.
pub(super) fn refuse_shared(dm: &Dm, device: &DeviceInfo) -> Result<()> {
    let Some(group) = volume_group(device) else { return Ok(()) };
    let by = if dm.info(&lock_volume(&group))?.is_some() {
        "sanlock"
    } else if Path::new(DLM).join(format!("lvm_{group}")).exists() {
        "dlm"
    } else {
        return Ok(());
    };
    Err(Error::refused(format!(
        "the volume group {group} of {} is shared with other machines (lvmlockd, {by}): their writes do not \
         pass through this one, and no copy would be exact",
        device.name
    ))
    .state("nothing was changed")
    .next(
        "make the group local for the copy: deactivate it on the other machines, then 'vgchange --lock-type none'",
    ))
}

/// The device-mapper name of the volume in which sanlock keeps a group's leases.
fn lock_volume(group: &str) -> String {
    format!("{}-lvmlock", group.replace('-', "--"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_volume_is_named_as_lvm_names_it() {
        assert_eq!(lock_volume("my-vg"), "my--vg-lvmlock");
    }
}
