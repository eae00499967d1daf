//! Which chunks of a volume changed since a kept snapshot: those of the exceptions in its store and in all newer ones,
//! since only the newest store receives originals.
//!
//! Why none is missing: dm-snapshot records the exception of a chunk before the first write to the chunk since the
//! store began to receive reaches the origin. A deleted snapshot copies what an older one lacks into the older one's
//! store first. A rollback writes through the device that preserves originals, as everything does. So a chunk that is
//! in none of the stores from snapshot N on, up to that of snapshot M, holds the same at both instants. Some of the
//! named chunks may do so as well: one that was written with what it held, or twice.
//!
//! Only what every snapshot below the volume leaves out is not preserved, hence what snapshot N leaves out itself. What
//! changed there is not known.

use super::layers;
use super::set::no_snapshot;
use crate::base::{Error, Result};
use crate::dm::Dm;
use crate::extent::{Extent, ExtentSet};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord};

/// Calls `each` for the extent of each chunk that may have changed between the instant of the snapshot with id `from`
/// and that of `to`, or now; in no order, and more than once for some.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if one of them is not below the volume;
/// [`ErrorKind::StoreInvalid`](crate::base::ErrorKind::StoreInvalid) if a store is lost; the kernel's; I/O errors.
pub fn each(
    dm: &Dm,
    record: &SnapshotSetRecord,
    (from, to): (&str, Option<&str>),
    interrupt: &dyn Fn() -> Result<()>,
    each: &mut dyn FnMut(Extent),
) -> Result<()> {
    let linked = record.linked();
    let position = |id: &str| {
        let found = linked.iter().position(|one| one.id == id);
        found.ok_or_else(|| no_snapshot("a snapshot that is needed is not below the volume any more"))
    };
    let newest = linked.len().saturating_sub(1);
    let (first, end) = (position(from)?, to.map_or(Ok(linked.len()), position)?);
    for (at, one) in linked.iter().enumerate().take(end).skip(first) {
        if one.lost.is_some() {
            return Err(lost(record, one));
        }
        let status = if at == newest { layers::status(dm, record, one)? } else { None };
        record.store(one)?.each(dm, status.as_ref(), interrupt, each)?;
    }
    Ok(())
}

/// The chunks that [`each`] names, as a set.
///
/// # Errors
/// As [`each`].
pub fn set(
    dm: &Dm,
    record: &SnapshotSetRecord,
    range: (&str, Option<&str>),
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<ExtentSet> {
    let mut changed = ExtentSet::new();
    each(dm, record, range, interrupt, &mut |extent| changed.insert(extent))?;
    Ok(changed)
}

fn lost(record: &SnapshotSetRecord, snapshot: &SnapshotRecord) -> Error {
    Error::refused(format!("the store of {}@{} is lost", record.volume, snapshot.name))
        .state("nothing was changed")
        .next("what has changed is not known: make a whole copy")
}
