//! What the kernel has of a set of snapshots. Changes nothing.
//!
//! A device counts only if name *and* UUID are those of the set: another set, of a volume that had the name before or
//! is seen in another mount namespace, has devices of the same names.

use std::time::Duration;

use crate::base::{DeviceNumber, Error, ErrorKind, Result};
use crate::dm::naming::{ROLE_DATA, ROLE_KEEP, ROLE_MERGE, ROLE_VIEW, ROLE_VOLUME};
use crate::dm::{DeviceIdentity, DeviceInfo, Dm, Slot, SnapshotStatus, Table};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord};

/// Longest time that the volume may be suspended while its table is replaced by one that shows the same.
pub const RESTORE_BUDGET: Duration = Duration::from_secs(2);

/// How a volume relates to the layers of its snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It leads to them, directly or through a copy in progress.
    Led,
    /// It exists, and does not lead to them: what is written to it is not preserved.
    Bypassed,
    /// It does not exist.
    Absent,
}

/// The device `name` with role `role` of the set or snapshot `id`; None if there is none.
///
/// # Errors
/// [`ErrorKind::Refused`] if the name belongs to another device; the kernel's.
pub fn find(dm: &Dm, volume: &str, (name, role, id): (&str, &str, &str)) -> Result<Option<DeviceInfo>> {
    match dm.info(name)? {
        Some(info) if info.uuid == DeviceIdentity::new(volume, role, id).uuid() => Ok(Some(info)),
        Some(_) => Err(Error::refused(format!("the device {name} is not that of these snapshots"))
            .state("nothing was changed")
            .next("if another mount namespace or host uses the volume, use Tidemark there")),
        None => Ok(None),
    }
}

/// The device that preserves originals.
///
/// # Errors
/// As [`find`].
pub fn keep(dm: &Dm, record: &SnapshotSetRecord) -> Result<Option<DeviceInfo>> {
    find(dm, &record.volume, (&record.volume_names().keep, ROLE_KEEP, &record.id))
}

/// The device that merges a snapshot into the volume while it is rolled back.
///
/// # Errors
/// As [`find`].
pub fn merge(dm: &Dm, record: &SnapshotSetRecord) -> Result<Option<DeviceInfo>> {
    find(dm, &record.volume, (&record.volume_names().merge, ROLE_MERGE, &record.id))
}

/// The device with the volume's own table.
///
/// # Errors
/// As [`find`].
pub fn data(dm: &Dm, record: &SnapshotSetRecord) -> Result<Option<DeviceInfo>> {
    find(dm, &record.volume, (&record.volume_names().data, ROLE_DATA, &record.id))
}

/// The view of a snapshot.
///
/// # Errors
/// As [`find`].
pub fn view(dm: &Dm, record: &SnapshotSetRecord, snapshot: &SnapshotRecord) -> Result<Option<DeviceInfo>> {
    find(dm, &record.volume, (&record.names(snapshot).view, ROLE_VIEW, &snapshot.id))
}

/// How the volume relates to the layers.
///
/// # Errors
/// The kernel's.
pub fn place(dm: &Dm, record: &SnapshotSetRecord) -> Result<Place> {
    let merge = merge(dm, record)?.map(|merge| merge.number);
    for layer in [merge, keep(dm, record)?.filter(|keep| keep.has_active).map(|keep| keep.number)] {
        if let Some(layer) = layer
            && is_used(dm, layer, merge)?
        {
            return Ok(Place::Led);
        }
    }
    let is_volume =
        |info: DeviceInfo| DeviceIdentity::parse(&info.uuid).is_some_and(|it| it.role == ROLE_VOLUME);
    Ok(if dm.info(record.volume.as_str())?.is_some_and(is_volume) { Place::Bypassed } else { Place::Absent })
}

/// True if an active table maps to `device`, other than that of `merge`, which does so whether or not the volume leads
/// to it.
fn is_used(dm: &Dm, device: DeviceNumber, merge: Option<DeviceNumber>) -> Result<bool> {
    for (_, number) in dm.list()?.into_iter().filter(|(_, number)| Some(*number) != merge) {
        // Skip a device that disappears, or whose table we cannot read.
        if let Ok(Some(table)) = dm.table(number, Slot::Active)
            && table.maps_to(device)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The id of the set to whose layers `table`, a volume's, leads; None if it leads to none.
///
/// # Errors
/// The kernel's.
pub fn set_under(dm: &Dm, table: &Table) -> Result<Option<String>> {
    for ours in dm.list_ours()?.into_iter().filter(|ours| table.maps_to(ours.number)) {
        if let Some(identity) =
            DeviceIdentity::parse(&ours.uuid).filter(|it| it.role == ROLE_KEEP || it.role == ROLE_MERGE)
        {
            return Ok(Some(identity.id));
        }
    }
    Ok(None)
}

/// Refuses a volume that leads to the layers of another set than `record`: it was renamed, or its record is not visible
/// here.
///
/// # Errors
/// [`ErrorKind::Refused`]; the kernel's.
pub fn refuse_other_set(dm: &Dm, volume: &str, record: Option<&SnapshotSetRecord>) -> Result<()> {
    let table = dm.active_table(volume)?;
    match set_under(dm, &table)? {
        Some(id) if record.is_none_or(|record| record.id != id) => {
            Err(Error::refused(format!("{volume} has snapshots whose record is not found under this name"))
                .state("nothing was changed")
                .next(
                    "if the volume was renamed, give it its former name ('dmsetup info' shows it in the UUID); if it was \
                     attached in another mount namespace, use Tidemark there",
                ))
        }
        _ => Ok(()),
    }
}

/// The kernel's status of a snapshot; None if it has no device.
///
/// # Errors
/// The kernel's.
pub fn status(
    dm: &Dm,
    record: &SnapshotSetRecord,
    snapshot: &SnapshotRecord,
) -> Result<Option<SnapshotStatus>> {
    match view(dm, record, snapshot) {
        Ok(Some(info)) if info.has_active => dm.snapshot_status(&info.name).map(Some),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == ErrorKind::Refused => Ok(None),
        Err(error) => Err(error),
    }
}

/// True if the store has failed or was full when an original should have been preserved. "Overflow" is no such state:
/// the kernel reports it when a write *to the snapshot* finds no space, which loses no original (`__origin_write` and
/// `snapshot_map` in Linux `drivers/md/dm-snap.c`).
#[must_use]
pub fn is_lost(status: &SnapshotStatus) -> bool {
    !matches!(status, SnapshotStatus::Active { .. } | SnapshotStatus::Overflow)
}
