//! The devices of a rollback: the volume shows the snapshot at once, while the snapshot is merged into its device.
//!
//! ```text
//!   volume   linear -> merge
//!   merge    mirror, from the clone to `keep`
//!   clone    snapshot <view of the snapshot> <a store of its own>    hidden; takes what users write
//!   keep     preserves originals for every snapshot, as always
//! ```
//!
//! The kernel's `mirror` target copies the clone to `keep`, region by region. Until a region is copied, it is read from
//! the clone and written there; from then on it is written to both. Its log, on disk, knows which regions are the same.
//! It is written in advance: only regions that a store has changed since the snapshot differ. Since the mirror writes
//! through `keep`, each snapshot keeps its instant, also the one that is merged.
//!
//! Crash argument. The volume does not exist while the merge is being set up, so it cannot be in use. Until the record
//! says `Merging`, its device is as it was; from then on, whatever makes the volume makes the merge first. The log says
//! what is left after a crash. Once both are the same, the record says `Merged`, and only then the volume is led to
//! `keep`: what users write from then on does not reach the clone, which must not be copied again.
//!
//! Until the merge is complete, the volume needs the stores of the snapshot and of all newer ones. A full store of the
//! clone makes writers wait; a full newest store would destroy the volume. So that one gets all the space that it can
//! need before the merge begins, unless the user bounds it.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use super::changes;
use super::layers::{self, RESTORE_BUDGET};
use super::placement::{choose_size, store_path};
use super::set::SnapshotSet;
use crate::base::{Bytes, Error, Result, ResultExt as _, Sectors};
use crate::dm::naming::{ROLE_MERGE, new_id};
use crate::dm::{DeviceIdentity, Dm, Slot, SnapshotStatus, Table, Target, Udev};
use crate::format::mirror_log::{MirrorLog, MirrorStatus};
use crate::format::state::{
    ROLLBACK_NAME, RollbackRecord, RollbackState, SnapshotRecord, SnapshotSetRecord, SnapshotState,
};
use crate::stack::change::IntentLog;
use crate::stack::kept;
use crate::store::size;
use crate::sys::dm_ioctl::SuspendFlags;
use crate::sys::process::crash_point;

/// A region of the mirror: 512 KiB, the usual one of `lvcreate --type mirror`. It is copied as a whole.
const REGION: Sectors = Sectors(1024);

/// A rollback that is about to begin.
#[derive(Clone, Debug)]
pub struct Beginning {
    /// The id of the snapshot.
    pub snapshot: String,
    /// The directory for the files of the rollback.
    pub directory: PathBuf,
    /// Bytes of originals for which the newest store must have room besides those of the merge; None: all that the
    /// volume can need.
    pub reserve: Option<Bytes>,
}

impl Beginning {
    fn record(&self, state: RollbackState) -> RollbackRecord {
        RollbackRecord {
            snapshot: self.snapshot.clone(),
            state,
            reserve_bytes: self.reserve.map(Bytes::get),
            directory: self.directory.display().to_string(),
            mounts: None,
        }
    }
}

/// Begins a rollback: afterwards the record says so. The volume does not exist; its layers do.
///
/// # Errors
/// [`ErrorKind::NoSpace`](crate::base::ErrorKind::NoSpace), I/O errors, `interrupt`'s; then nothing has begun.
pub fn begin(
    dm: &Dm,
    set: &mut SnapshotSet,
    beginning: &Beginning,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let record = set.record().clone();
    let log = differences(dm, &record, &beginning.snapshot, interrupt)?;
    reserve(dm, &record, log.differing().bytes(), beginning.reserve)?;
    let (size, chunk) = (Bytes(record.size_bytes), record.chunk()?);
    let id = new_id();
    let clone = SnapshotRecord {
        name: ROLLBACK_NAME.to_owned(),
        store: store_path(&beginning.directory, (&record.volume, ROLLBACK_NAME), &id),
        id,
        instant_utc_ns: 0,
        store_bytes_max: size::worst_case(size, chunk)?.get(),
        state: SnapshotState::Creating,
        lost: None,
        clone_of: Some(beginning.snapshot.clone()),
        group: None,
        subset: None,
    };
    set.change(|record| record.snapshots.push(clone.clone()))?;
    crash_point("snapshot.rollback.recorded");
    let files = record.store(&clone)?.create_file(choose_size(None, size, chunk)?);
    let files = files.and_then(|()| write_log(&record, &clone, &log));
    let begun = files.and_then(|()| {
        crash_point("snapshot.rollback.files");
        set.change(|record| {
            record.rollback = Some(beginning.record(RollbackState::Merging));
            record.snapshots.iter_mut().filter(|one| one.id == clone.id).for_each(|clone| {
                clone.state = SnapshotState::Kept;
            });
        })
    });
    begun.map_err(|error| {
        let undo = record.store(&clone).and_then(|store| store.remove(dm));
        let undo = undo.and_then(|()| record.log(&clone)?.remove(dm));
        let undo = undo.and_then(|()| set.change(|record| record.snapshots.retain(|one| one.id != clone.id)));
        error.after_undo(undo)
    })
}

/// Begins the rollback that was planned for now, if there is one. True if it has begun. One that cannot begin is given
/// up, with a warning: the volume is wanted.
///
/// # Errors
/// I/O errors of the record.
pub fn begin_planned(dm: &Dm, set: &mut SnapshotSet) -> Result<bool> {
    let rollback = set.record().rollback.clone();
    let Some(planned) = rollback.filter(|rollback| rollback.state == RollbackState::Planned) else {
        return Ok(false);
    };
    let beginning = Beginning {
        snapshot: planned.snapshot,
        directory: PathBuf::from(planned.directory),
        reserve: planned.reserve_bytes.map(Bytes),
    };
    let is_there = set.record().linked().iter().any(|one| one.id == beginning.snapshot && one.lost.is_none());
    let begun = if is_there {
        begin(dm, set, &beginning, &|| Ok(()))
    } else {
        Err(Error::refused("the snapshot is lost"))
    };
    let Err(error) = begun else { return Ok(true) };
    tracing::warn!("{} is not rolled back: {error}", set.record().volume);
    set.change(|record| record.rollback = None)?;
    Ok(false)
}

/// The regions in which the volume may differ from the snapshot: those of every original that its store or a newer one
/// holds.
fn differences(
    dm: &Dm,
    record: &SnapshotSetRecord,
    snapshot: &str,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<MirrorLog> {
    let mut log = MirrorLog::in_sync(record.length()?, REGION);
    let mut differ = |extent: crate::extent::Extent| log.differ(extent.start(), extent.end());
    changes::each(dm, record, (snapshot, None), interrupt, &mut differ)?;
    Ok(log)
}

/// Gives the newest store room for the originals that the merge and its users can cause.
fn reserve(dm: &Dm, record: &SnapshotSetRecord, merged: Bytes, more: Option<Bytes>) -> Result<()> {
    let linked = record.linked();
    let newest = linked.last().ok_or_else(|| Error::refused("the volume has no snapshots"))?;
    let (store, chunk) = (record.store(newest)?, record.chunk()?);
    let most = Bytes(newest.store_bytes_max);
    let Some(SnapshotStatus::Active { used, total, .. }) = layers::status(dm, record, newest)? else {
        return Err(Error::refused(format!("the store of {}@{} failed", record.volume, newest.name)));
    };
    let wanted = match more {
        None => most,
        Some(more) => (used.bytes() + size::worst_case(merged + more, chunk)?).min(most),
    };
    if wanted <= total.bytes() {
        return Ok(());
    }
    store.enlarge(dm, wanted).map_err(|error| {
        error.next(format!(
            "make room for {} in {}, or bound what may be written meanwhile: --reserve SIZE (a volume whose newest \
             store fills before the merge is complete is lost)",
            wanted - total.bytes(),
            store.path.display()
        ))
    })
}

fn write_log(record: &SnapshotSetRecord, clone: &SnapshotRecord, log: &MirrorLog) -> Result<()> {
    let (store, content) = (record.log(clone)?, log.encode());
    store.create_file(Bytes::from_len(content.len()).align_up(size::STORE_UNIT))?;
    let what = || format!("writing the log of the merge {}", store.path.display());
    let file = OpenOptions::new().write(true).open(&store.path).io_context(what)?;
    file.write_all_at(&content, 0).and_then(|()| file.sync_all()).io_context(what)
}

/// Makes the merge of a rollback that has begun. Returns the volume's table; None if there is no merge.
///
/// # Errors
/// The kernel's; I/O errors.
pub fn make(dm: &Dm, record: &SnapshotSetRecord) -> Result<Option<Table>> {
    if record.rolling_back().is_none_or(|rollback| rollback.state != RollbackState::Merging) {
        return Ok(None);
    }
    let clone = clone_of(record)?;
    let log = record.log(&clone)?.show(dm)?;
    let from = dm.info_of(record.names(&clone).view.as_str())?.number;
    let to = dm.info_of(record.volume_names().keep.as_str())?.number;
    // The kernel's text, see Target: the legs, and "hold what cannot be written to both until the table is replaced".
    let params = format!("disk 2 {log} {} 2 {from} 0 {to} 0 1 handle_errors", REGION.get());
    let table = Table::single(record.length()?, Target::Other { kind: "mirror".to_owned(), params })?;
    let name = record.volume_names().merge;
    let found = layers::merge(dm, record)?.filter(|merge| merge.has_active);
    let number = match found {
        Some(merge) => merge.number,
        None => {
            let identity = identity(record);
            dm.remove_if_it_is(&name, &identity)?;
            dm.create_active(&name, &identity.uuid(), &table, Udev::Internal)?
        }
    };
    crash_point("snapshot.rollback.merge");
    Table::single(record.length()?, Target::Linear { device: number, offset: Sectors::ZERO }).map(Some)
}

fn identity(record: &SnapshotSetRecord) -> DeviceIdentity {
    DeviceIdentity::new(&record.volume, ROLE_MERGE, &record.id)
}

fn clone_of(record: &SnapshotSetRecord) -> Result<SnapshotRecord> {
    let clone = record.snapshots.iter().find(|snapshot| snapshot.is_of_rollback());
    clone.cloned().ok_or_else(|| Error::bad_data(format!("the rollback of {} has no store", record.volume)))
}

/// How far the merge is; None if there is none.
fn status(dm: &Dm, record: &SnapshotSetRecord) -> Result<Option<MirrorStatus>> {
    let Some(merge) = layers::merge(dm, record)?.filter(|merge| merge.has_active) else { return Ok(None) };
    let rows = dm.status(&merge.name)?;
    Ok(rows.first().and_then(|(_, _, _, text)| MirrorStatus::parse(text)))
}

/// How far the volume has been rolled back to `snapshot`, in per cent; None if it is not.
///
/// # Errors
/// The kernel's.
pub fn percent(dm: &Dm, record: &SnapshotSetRecord, snapshot: &SnapshotRecord) -> Result<Option<u64>> {
    let Some(rollback) = record.rollback.as_ref().filter(|rollback| rollback.snapshot == snapshot.id) else {
        return Ok(None);
    };
    Ok(Some(match rollback.state {
        RollbackState::Planned => 0,
        RollbackState::Merging => status(dm, record)?.map_or(0, |status| status.percent()),
        RollbackState::Merged => 100,
    }))
}

/// True if a merge is complete, or has failed.
///
/// # Errors
/// The kernel's.
pub fn needs_attention(dm: &Dm, record: &SnapshotSetRecord) -> Result<bool> {
    if record.rolling_back().is_none() {
        return Ok(false);
    }
    Ok(status(dm, record)?.is_none_or(|status| status.is_complete() || !status.is_healthy))
}

/// Ends a merge that is complete, and tries again what has failed. The volume is in use. Returns what was done.
///
/// # Errors
/// The kernel's; I/O errors.
pub fn tend(dm: &Dm, set: &mut SnapshotSet, journal: &mut dyn IntentLog) -> Result<Vec<String>> {
    let Some(rollback) = set.record().rolling_back().cloned() else { return Ok(Vec::new()) };
    if rollback.state == RollbackState::Merging {
        match status(dm, set.record())? {
            Some(status) if status.is_complete() => {
                set.change(|record| {
                    record.rollback =
                        Some(RollbackRecord { state: RollbackState::Merged, ..rollback.clone() });
                })?;
                crash_point("snapshot.rollback.merged");
            }
            Some(status) if !status.is_healthy => return retry(dm, set.record()).map(|()| Vec::new()),
            _ => return Ok(Vec::new()),
        }
    }
    finish(dm, set, journal)?;
    Ok(vec![format!("roll back {}", set.record().volume)])
}

/// Replaces the merge by itself: it has failed to read or write, and what it holds is tried again.
fn retry(dm: &Dm, record: &SnapshotSetRecord) -> Result<()> {
    let name = record.volume_names().merge;
    let Some(table) = dm.table(name.as_str(), Slot::Active)? else { return Ok(()) };
    dm.load(name.as_str(), &table)?;
    // With a flush, what it holds would fail.
    dm.suspend(name.as_str(), SuspendFlags { flush: false, lock_filesystem: false })?;
    dm.resume(name.as_str(), Udev::None)
}

/// Leads the volume to `keep`, and removes what only the merge needed.
fn finish(dm: &Dm, set: &mut SnapshotSet, journal: &mut dyn IntentLog) -> Result<()> {
    let record = set.record().clone();
    let names = record.volume_names();
    if let Some(merge) = layers::merge(dm, &record)?
        && dm.table(record.volume.as_str(), Slot::Active)?.is_some_and(|table| table.maps_to(merge.number))
    {
        let keep = dm.info_of(names.keep.as_str())?.number;
        let table = Table::single(record.length()?, Target::Linear { device: keep, offset: Sectors::ZERO })?;
        kept::lead(dm, &record.volume, &table, RESTORE_BUDGET, journal)?;
        crash_point("snapshot.rollback.led");
    }
    dm.remove_if_it_is(&names.merge, &identity(&record))?;
    crash_point("snapshot.rollback.unmade");
    set.change(|record| {
        let shown = record.rollback.take().and_then(|rollback| rollback.mounts);
        record.mounts = shown.or_else(|| record.mounts.take());
        let of_rollback = record.snapshots.iter_mut().filter(|snapshot| snapshot.is_of_rollback());
        of_rollback.for_each(|clone| clone.state = SnapshotState::Unlinked);
    })
}

/// Records that the volume is rolled back when it is attached next.
///
/// # Errors
/// I/O errors.
pub fn plan(set: &mut SnapshotSet, beginning: &Beginning) -> Result<()> {
    set.change(|record| record.rollback = Some(beginning.record(RollbackState::Planned)))
}
