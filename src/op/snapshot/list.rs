//! `tidemark snapshot list` and `show`. Change nothing.

use std::path::PathBuf;

use serde::Serialize;

use super::layers::{self, Place};
use super::merge;
use super::set::{no_snapshot, parse_name, read_all, read_of};
use crate::base::{Bytes, Error, Result, clock};
use crate::dm::{Dm, SnapshotStatus, node};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord, SnapshotState};
use crate::store::Overlap;
use crate::sys::privilege::require_root;

/// The state of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It shows its instant.
    Valid,
    /// Its store was full or failed, or it was lost in another way.
    Invalid,
    /// A snapshot that it is read through is lost.
    NeedsLost,
    /// A clone whose store is full: it can be read, and written again once the store is larger.
    Full,
    /// Its volume is not attached now.
    NotAttached,
    /// It is being created, or a command that created it died.
    Creating,
    /// It is being deleted, or a command that deleted it died.
    Deleting,
    /// It is deleted; its store still receives originals for older ones.
    Retired,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotView {
    /// VOLUME@NAME.
    pub snapshot: String,
    /// The snapshot of which it is a writable clone, as VOLUME@NAME; None for a snapshot.
    pub clone_of: Option<String>,
    /// Its clones, as VOLUME@NAME.
    pub clones: Vec<String>,
    /// How far the volume has been rolled back to it, in per cent; 0 also if that is planned. None if it is not.
    pub rollback_percent: Option<u64>,
    /// Its state.
    pub state: State,
    /// Why it is lost.
    pub lost: Option<String>,
    /// Its instant.
    pub instant: Option<String>,
    /// Seconds since then.
    pub age_seconds: Option<u64>,
    /// Its device, if it has one.
    pub path: Option<PathBuf>,
    /// The file with its store.
    pub store: PathBuf,
    /// Bytes in use in the store.
    pub used: Option<Bytes>,
    /// The size of the store.
    pub total: Option<Bytes>,
    /// The id of its group, if it was created with those of other volumes at one instant.
    pub group: Option<String>,
    /// What it leaves out; None if it shows all of the volume.
    pub subset: Option<SubsetView>,
    /// True if its store takes new data: originals, or what is written to the clone.
    pub receives: bool,
    /// True if its store is smaller than what the volume can need.
    pub can_fill: bool,
}

/// What a snapshot leaves out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SubsetView {
    /// What the user included, as typed.
    pub include: Vec<String>,
    /// What the user excluded, as typed.
    pub exclude: Vec<String>,
    /// Bytes that read as zeros.
    pub left_out_bytes: Bytes,
    /// Their ranges.
    pub ranges: usize,
}

/// What a snapshot holds.
#[derive(Clone, Debug, Serialize)]
pub struct SnapshotDetails {
    /// The facts of the list.
    #[serde(flatten)]
    pub view: SnapshotView,
    /// The snapshots of its group that still exist, itself among them, as VOLUME@NAME.
    pub group_snapshots: Vec<String>,
    /// Unit of copy-on-write.
    pub chunk: Bytes,
    /// Chunks of the volume that were changed from its instant to that of the next newer snapshot, or until now; those
    /// of a clone that were written.
    pub chunks_changed: Option<u64>,
    /// Bytes of originals that only this snapshot needs: its deletion frees them.
    pub unique: Option<Bytes>,
    /// Bytes of originals that an older snapshot needs as well.
    pub shared: Option<Bytes>,
}

/// All snapshots of `volume`, or of every volume, the oldest first.
///
/// # Errors
/// I/O errors; the kernel's.
pub fn list(volume: Option<&str>) -> Result<Vec<SnapshotView>> {
    require_root("examining device-mapper")?;
    let dm = Dm::open()?;
    let mut views = Vec::new();
    for record in read_all()? {
        let record = record?;
        if volume.is_none_or(|volume| record.volume == volume) {
            views.extend(views_of(&dm, &record)?);
        }
    }
    Ok(views)
}

/// The views of one set, the oldest first.
///
/// # Errors
/// The kernel's.
pub fn views_of(dm: &Dm, record: &SnapshotSetRecord) -> Result<Vec<SnapshotView>> {
    let mut views = Vec::new();
    let mut is_newer_lost = false;
    // Devices alone prove nothing: the volume has to lead to them.
    let place = layers::place(dm, record)?;
    for snapshot in record.snapshots.iter().filter(|snapshot| snapshot.clone_of.is_none()).rev() {
        let status = layers::status(dm, record, snapshot)?.filter(|_| place == Place::Led);
        is_newer_lost |= snapshot.state.is_linked() && status.as_ref().is_some_and(layers::is_lost);
        for clone in clones_of(record, snapshot).into_iter().rev() {
            let status = layers::status(dm, record, clone)?.filter(|_| place == Place::Led);
            views.push(view_of(dm, record, (clone, status), (place, is_newer_lost))?);
        }
        views.push(view_of(dm, record, (snapshot, status), (place, is_newer_lost))?);
    }
    views.reverse();
    Ok(views)
}

/// The clones of `snapshot` that users see.
fn clones_of<'a>(record: &'a SnapshotSetRecord, snapshot: &'a SnapshotRecord) -> Vec<&'a SnapshotRecord> {
    record.clones_of(&snapshot.id).filter(|clone| !clone.is_of_rollback()).collect()
}

/// Refuses a snapshot that does not show its instant. `shown` is its name, as VOLUME@NAME.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused); as [`views_of`].
pub fn check_valid(dm: &Dm, record: &SnapshotSetRecord, shown: &str) -> Result<SnapshotView> {
    if dm.info(record.volume.as_str())?.is_none() {
        return Err(Error::refused(format!("{} is not attached", record.volume))
            .state("nothing was changed")
            .next(format!("attach {} first", record.volume)));
    }
    let view = views_of(dm, record)?.into_iter().find(|view| view.snapshot == shown);
    view.filter(|view| view.state == State::Valid).ok_or_else(|| not_valid(shown))
}

/// The refusal for a snapshot that does not show its instant.
pub fn not_valid(shown: &str) -> Error {
    Error::refused(format!("{shown} does not show its instant"))
        .state("nothing was changed")
        .next(format!("'tidemark snapshot show {shown}' says why"))
}

/// The view of one, whose devices have this status. `is_needed_lost`: it is read through a lost one, or is that itself.
fn view_of(
    dm: &Dm,
    record: &SnapshotSetRecord,
    (snapshot, status): (&SnapshotRecord, Option<SnapshotStatus>),
    (place, is_needed_lost): (Place, bool),
) -> Result<SnapshotView> {
    let shown = |snapshot: &SnapshotRecord| format!("{}@{}", record.volume, snapshot.name);
    let state = match state_of(snapshot, status.as_ref(), is_needed_lost) {
        State::NotAttached if place == Place::Bypassed => State::Invalid,
        state => state,
    };
    let receives = match &snapshot.clone_of {
        Some(_) => matches!(status, Some(SnapshotStatus::Active { .. } | SnapshotStatus::Overflow)),
        None => status.is_some() && record.linked().last().is_some_and(|newest| newest.id == snapshot.id),
    };
    let clone_of = record.snapshots.iter().find(|other| snapshot.clone_of.as_ref() == Some(&other.id));
    let device = record.names(snapshot).snapshot;
    let (used, total) = match &status {
        Some(SnapshotStatus::Active { used, total, .. }) => (Some(used.bytes()), Some(total.bytes())),
        _ => (None, record.store(snapshot)?.file_bytes().ok()),
    };
    let has_device = dm.info(device.as_str())?.is_some_and(|info| info.has_active);
    let age = clock::utc_now_ns().checked_sub(snapshot.instant_utc_ns).map(|age| age / 1_000_000_000);
    Ok(SnapshotView {
        snapshot: shown(snapshot),
        clone_of: clone_of.map(shown),
        clones: clones_of(record, snapshot).into_iter().map(shown).collect(),
        rollback_percent: merge::percent(dm, record, snapshot)?,
        state,
        lost: snapshot.lost.clone(),
        instant: clock::utc_text(snapshot.instant_utc_ns).filter(|_| snapshot.instant_utc_ns > 0),
        age_seconds: age.filter(|_| snapshot.instant_utc_ns > 0),
        path: has_device.then(|| node::mapper_path(&device)),
        store: PathBuf::from(&snapshot.store),
        used,
        total,
        group: snapshot.group.clone(),
        subset: subset_of(record, snapshot),
        receives,
        can_fill: total.is_none_or(|total| total.get() < snapshot.store_bytes_max),
    })
}

/// What a snapshot leaves out, or the one of which it is a clone.
fn subset_of(record: &SnapshotSetRecord, snapshot: &SnapshotRecord) -> Option<SubsetView> {
    let is_shown = |one: &&SnapshotRecord| one.id == *snapshot.clone_of.as_ref().unwrap_or(&snapshot.id);
    let shown = record.snapshots.iter().find(is_shown)?;
    let subset = shown.subset.as_ref()?;
    Some(SubsetView {
        include: subset.include.clone(),
        exclude: subset.exclude.clone(),
        left_out_bytes: shown.left_out().total(),
        ranges: subset.left_out.len(),
    })
}

fn state_of(snapshot: &SnapshotRecord, status: Option<&SnapshotStatus>, is_newer_lost: bool) -> State {
    match (snapshot.state, status) {
        (SnapshotState::Creating, _) => State::Creating,
        (SnapshotState::Deleting | SnapshotState::Unlinked, _) => State::Deleting,
        (SnapshotState::Retired, _) => State::Retired,
        (SnapshotState::Detached, _) => State::Invalid,
        (SnapshotState::Kept, _) if snapshot.lost.is_some() => State::Invalid,
        (SnapshotState::Kept, None) => State::NotAttached,
        (SnapshotState::Kept, Some(status)) if layers::is_lost(status) => State::Invalid,
        (SnapshotState::Kept, Some(_)) if is_newer_lost => State::NeedsLost,
        (SnapshotState::Kept, Some(SnapshotStatus::Overflow)) if snapshot.clone_of.is_some() => State::Full,
        (SnapshotState::Kept, Some(_)) => State::Valid,
    }
}

/// One snapshot with what it holds. Reads the metadata of two stores.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it does not exist; as [`list`].
pub fn show(name: &str, interrupt: &dyn Fn() -> Result<()>) -> Result<SnapshotDetails> {
    require_root("examining device-mapper")?;
    let (volume, _) = parse_name(name)?;
    let dm = Dm::open()?;
    let none = || no_snapshot(&format!("there is no snapshot {name}"));
    let record = read_of(volume)?.ok_or_else(none)?;
    let view = views_of(&dm, &record)?.into_iter().find(|view| view.snapshot == name).ok_or_else(none)?;
    let is_shown = |snapshot: &&SnapshotRecord| format!("{volume}@{}", snapshot.name) == name;
    let snapshot = record.snapshots.iter().find(is_shown).ok_or_else(none)?;
    let linked = record.linked();
    let older = linked.iter().position(|other| other.id == snapshot.id).and_then(|at| at.checked_sub(1));
    let older = older.map(|at| record.store(&linked[at])).transpose()?;
    let overlap: Option<Overlap> = match view.state {
        State::Valid | State::Full | State::Retired | State::NeedsLost => {
            let status = layers::status(&dm, &record, snapshot)?.filter(|_| view.receives);
            Some(record.store(snapshot)?.overlap(&dm, status.as_ref(), older.as_ref(), interrupt)?)
        }
        _ => None,
    };
    let chunk = record.chunk()?.bytes();
    // A chunk that the next older store has as well is of no use to older snapshots.
    let needed = |overlap: &Overlap| if older.is_none() { 0 } else { overlap.chunks - overlap.shared };
    Ok(SnapshotDetails {
        group_snapshots: view.group.as_deref().map(members).transpose()?.unwrap_or_default(),
        view,
        chunk,
        chunks_changed: overlap.map(|overlap| overlap.chunks),
        unique: overlap.map(|overlap| chunk * (overlap.chunks - needed(&overlap))),
        shared: overlap.map(|overlap| chunk * needed(&overlap)),
    })
}

/// The snapshots of a group that still exist, as VOLUME@NAME.
fn members(group: &str) -> Result<Vec<String>> {
    let mut members = Vec::new();
    for record in read_all()? {
        let record = record?;
        let of_group = record.snapshots.iter().filter(|one| one.group.as_deref() == Some(group));
        let shown = of_group.filter(|one| one.state.is_visible() || one.state == SnapshotState::Creating);
        members.extend(shown.map(|one| format!("{}@{}", record.volume, one.name)));
    }
    members.sort();
    Ok(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_snapshot_is_never_shown_as_valid() {
        let snapshot = |state, lost: Option<&str>| SnapshotRecord {
            name: "a".to_owned(),
            id: "0".repeat(32),
            instant_utc_ns: 1,
            store: "/x".to_owned(),
            store_bytes_max: 1,
            state,
            lost: lost.map(str::to_owned),
            clone_of: None,
            group: None,
            subset: None,
        };
        let kept = |lost| snapshot(SnapshotState::Kept, lost);
        let active = SnapshotStatus::parse("16/2048 16");
        assert_eq!(state_of(&kept(None), Some(&active), false), State::Valid);
        assert_eq!(state_of(&kept(None), Some(&active), true), State::NeedsLost);
        assert_eq!(state_of(&kept(Some("why")), Some(&active), false), State::Invalid);
        assert_eq!(state_of(&kept(None), None, false), State::NotAttached);
        for text in ["Invalid", "Unknown", "Merge failed", "nonsense"] {
            assert_eq!(
                state_of(&kept(None), Some(&SnapshotStatus::parse(text)), false),
                State::Invalid,
                "{text}"
            );
        }
        // The kernel's word for a snapshot that cannot be written any more. Ours are not.
        assert_eq!(state_of(&kept(None), Some(&SnapshotStatus::Overflow), false), State::Valid);
        let clone = SnapshotRecord { clone_of: Some("1".repeat(32)), ..kept(None) };
        assert_eq!(state_of(&clone, Some(&SnapshotStatus::Overflow), false), State::Full);
        assert_eq!(state_of(&clone, Some(&active), true), State::NeedsLost);
        assert_eq!(state_of(&snapshot(SnapshotState::Detached, None), Some(&active), false), State::Invalid);
    }
}
