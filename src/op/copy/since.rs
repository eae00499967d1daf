//! `copy --since`: only what changed since a kept snapshot is copied; and what a copy of a kept snapshot records of it.
//!
//! Copied is what is used now and has changed, or is not in the parent (it was free then):
//! `needed = used AND (changed OR absent in the parent)`. The rest of what is used is inherited from the parent.
//! The parent is an archive, or the raw secondary itself, which is updated in place ([`update`](super::update)).
//! What has changed is in the stores ([`changes`]). It is read after the instant: a chunk whose first write came after
//! it may be in the stores too, and is copied in vain.

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use super::raw_parent::{RawCheckPlan, RawCheckReport, RawParent};
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, Error, Result, directory_of};
use crate::dm::Dm;
use crate::extent::{Extent, ExtentSet};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord};
use crate::op::request::CopyRequest;
use crate::op::snapshot::set::{SnapshotSet, none_of, read_all, read_existing};
use crate::op::snapshot::{changes, list};
use crate::restore::chain;
use crate::secondary::SecondaryTarget;
use crate::volume::{Origin, OriginKind};

/// A kept snapshot as the origin of a copy.
#[derive(Clone, Debug, Serialize)]
pub struct KeptOrigin {
    /// VOLUME@NAME.
    pub snapshot: String,
    /// Its id.
    pub id: Uuid,
    /// Its instant, UTC, in nanoseconds since 1970.
    pub instant_utc_ns: u64,
    /// What it leaves out of its volume.
    #[serde(skip)]
    pub(super) left_out: ExtentSet,
    #[serde(skip)]
    volume: String,
}

/// The plan of `--since`.
#[derive(Clone, Debug, Serialize)]
pub struct SincePlan {
    /// The kept snapshot since which changes are copied, as VOLUME@NAME.
    pub base: String,
    /// Its id.
    pub base_id: Uuid,
    /// The archive that is continued, or the raw secondary that is updated.
    pub parent: PathBuf,
    /// Its id, or that of its record.
    pub parent_id: Uuid,
    /// What is read of a raw secondary before it is updated.
    pub check: Option<RawCheckPlan>,
    /// Unit in which changes are known, bytes.
    pub chunk: Bytes,
    /// Chunks that have changed; of a volume in use, until now.
    pub changed_chunks: u64,
    /// Bytes to be copied, if no space is free now.
    pub to_move: Bytes,
    /// Bytes of the origin.
    pub total: Bytes,
    #[serde(skip)]
    volume: String,
    /// What the parent and those that it continues do not hold, and what the base leaves out: what changed there is not
    /// known.
    #[serde(skip)]
    absent: ExtentSet,
    /// The raw secondary that is updated.
    #[serde(skip)]
    pub(super) raw: Option<RawParent>,
    /// What may differ between the parent and the new instant, as of the plan.
    #[serde(skip)]
    pub(super) planned: ExtentSet,
}

/// The report of `--since`.
#[derive(Clone, Debug, Serialize)]
pub struct SinceReport {
    /// The kept snapshot since which changes were copied, as VOLUME@NAME.
    pub base: String,
    /// The archive that is continued, or the raw secondary that was updated.
    pub parent: PathBuf,
    /// What was read of the raw secondary before it was updated.
    pub check: Option<RawCheckReport>,
    /// Chunks that have changed.
    pub changed_chunks: u64,
    /// Their bytes.
    pub changed_bytes: Bytes,
    /// Bytes that were read from the origin; its originals are not counted.
    pub moved_bytes: Bytes,
}

/// What is copied of an origin, and what its parent has.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    /// Copied; sorted, disjoint.
    pub(super) needed: Vec<Extent>,
    /// As in the parent; sorted, disjoint.
    pub(super) inherited: Vec<Extent>,
    /// Not in use, or left out; sorted, disjoint. A part of it may be inherited, because it reads as zeros already.
    pub(super) absent: Vec<Extent>,
    /// Bytes that have changed.
    pub(super) changed: Bytes,
}

/// The kept snapshot that the origin is; None if it is none.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it does not show its instant; I/O errors; the kernel's.
pub(super) fn kept_origin(origin: &Origin) -> Result<Option<KeptOrigin>> {
    let OriginKind::Snapshot { id } = &origin.kind else { return Ok(None) };
    for record in read_all()? {
        let record = record?;
        let Some(snapshot) = record.snapshots.iter().find(|one| one.id == *id) else { continue };
        let shown = format!("{}@{}", record.volume, snapshot.name);
        list::check_valid(&Dm::open()?, &record, &shown)?;
        return Ok(Some(KeptOrigin {
            id: id_of(snapshot)?,
            instant_utc_ns: snapshot.instant_utc_ns,
            snapshot: shown,
            left_out: snapshot.left_out(),
            volume: record.volume.clone(),
        }));
    }
    Err(Error::refused(format!("no record names the snapshot {}", origin.path.display()))
        .state("nothing was changed")
        .next("'tidemark snapshot list' shows the snapshots"))
}

/// Checks that the kept snapshot still shows its instant.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it does not; I/O errors; the kernel's.
pub(super) fn check_kept(kept: &KeptOrigin) -> Result<()> {
    let record = read_existing(&kept.volume)?;
    let of_that_id = record.snapshots.iter().find(|one| id_of(one).is_ok_and(|id| id == kept.id));
    let is_it = of_that_id.is_some_and(|one| format!("{}@{}", record.volume, one.name) == kept.snapshot);
    let checked = if is_it {
        list::check_valid(&Dm::open()?, &record, &kept.snapshot).map(drop)
    } else {
        Err(Error::refused(format!("{} is not the snapshot any more that was to be copied", kept.snapshot)))
    };
    checked.map_err(|error| error.context("what was read is of no use").state("the copy is given up"))
}

/// Makes the plan of `--since`; None if it was not asked for.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for options that do not go together;
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if what has changed is not known, or there is no parent;
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a damaged one; I/O errors; the kernel's;
/// `interrupt`'s.
pub(super) fn plan(
    request: &CopyRequest,
    origin: &Origin,
    kept: Option<&KeptOrigin>,
    raw: Option<RawParent>,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Option<SincePlan>> {
    let Some(typed) = &request.since else { return Ok(None) };
    let volume = match (kept, &origin.kind) {
        (Some(kept), _) => kept.volume.clone(),
        (None, OriginKind::Live { name, .. }) => name.clone(),
        _ => {
            return Err(Error::refused(format!("{} has no kept snapshots", origin.path.display()))
                .state("nothing was changed")
                .next("--since needs an attached volume, or one of its kept snapshots"));
        }
    };
    let record = read_existing(&volume)?;
    let base = base_of(&record, typed, kept)?;
    let base_id = id_of(&base)?;
    let shown = format!("{volume}@{}", base.name);
    let dm = Dm::open()?;
    list::check_valid(&dm, &record, &shown)?;
    let to = last_of(kept, raw.as_ref());
    if to.is_none() {
        record.refuse_rollback()?;
    }
    let changed = changes::set(&dm, &record, (&base.id, to.as_deref()), interrupt)?;
    let mut parent = match raw {
        Some(raw) => Parent::of_raw(raw, (base_id, &shown), (origin, request))?,
        None => Parent::of_archive(request, (base_id, &shown), origin, interrupt)?,
    };
    parent.absent.extend(base.left_out().iter());
    let chunk = record.chunk()?.bytes();
    let mut since = SincePlan {
        base: shown,
        base_id,
        parent: parent.path,
        parent_id: parent.id,
        check: parent.raw.as_ref().map(|raw| raw.check_plan(request.sample)),
        chunk,
        changed_chunks: changed.total().get().div_ceil(chunk.get()),
        to_move: Bytes::ZERO,
        total: origin.size,
        volume,
        absent: parent.absent,
        raw: parent.raw,
        planned: ExtentSet::new(),
    };
    let selection = since.select(&whole_of(origin.size), &changed);
    since.to_move = selection.needed.iter().map(|extent| extent.length()).sum();
    since.planned = selection.needed.into_iter().collect();
    Ok(Some(since))
}

/// The id of the snapshot before whose instant changes count; None: all count until now.
///
/// Why a raw secondary that does not hold its base exactly needs all. It was written by an increment since the same
/// base, complete or interrupted, to another instant, which may be later than this snapshot's. What that increment
/// wrote are chunks that had changed since the base until then. Each of them has an exception in the store of the base
/// or of a newer snapshot, and none is ever taken away: stores only grow, and a deleted snapshot hands what an older
/// one lacks to the older one's store first. So the chunks that have changed since the base until now are a superset of
/// all that any such increment may have written. All of them are written again, from this instant; and a chunk that is
/// not among them holds the same at the base's instant, at this one, and on the secondary.
fn last_of(kept: Option<&KeptOrigin>, raw: Option<&RawParent>) -> Option<String> {
    kept.filter(|_| raw.is_none_or(RawParent::is_at_base)).map(|kept| kept.id.simple().to_string())
}

fn whole_of(size: Bytes) -> Vec<Extent> {
    Extent::new(Bytes::ZERO, size).into_iter().collect()
}

/// What holds the content at the instant of the base.
struct Parent {
    path: PathBuf,
    id: Uuid,
    absent: ExtentSet,
    raw: Option<RawParent>,
}

impl Parent {
    fn of_raw(
        raw: RawParent,
        base: (Uuid, &str),
        (origin, request): (&Origin, &CopyRequest),
    ) -> Result<Self> {
        raw.check_base(base.0, base.1)?;
        if raw.copy.size != origin.size {
            return Err(wrong_size((&raw.path, raw.copy.size), (base.1, origin.size))
                .next("make a whole copy (without --since)"));
        }
        if !origin.size.is_aligned(DIRECT_IO_ALIGN) {
            return Err(Error::refused(format!(
                "a raw copy of {} bytes cannot be updated: the size is not a multiple of {DIRECT_IO_ALIGN}",
                origin.size.get()
            ))
            .state("nothing was changed")
            .next(format!("make a whole copy of {}", request.origin.display())));
        }
        Ok(Self { path: raw.path.clone(), id: raw.copy.id, absent: raw.absent(), raw: Some(raw) })
    }

    fn of_archive(
        request: &CopyRequest,
        (base, shown): (Uuid, &str),
        origin: &Origin,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let places = places_of(request)?;
        let found = chain::find_snapshot(base, &places, interrupt)?;
        let parent = found.ok_or_else(|| no_parent(shown, &places))?;
        let (path, superblock) = (parent.last().path().to_owned(), parent.last().superblock());
        if superblock.origin_size != origin.size {
            return Err(wrong_size((&path, superblock.origin_size), (shown, origin.size))
                .next("name another archive of the snapshot with --parent"));
        }
        Ok(Self { path, id: superblock.archive, absent: parent.absent, raw: None })
    }
}

/// The snapshot that `--since` names, as NAME or VOLUME@NAME.
fn base_of(record: &SnapshotSetRecord, typed: &str, kept: Option<&KeptOrigin>) -> Result<SnapshotRecord> {
    let name = match typed.rsplit_once('@') {
        None => typed,
        Some((volume, name)) if volume == record.volume => name,
        Some((volume, _)) => {
            return Err(Error::refused(format!(
                "{typed} is of the volume {volume}, not of {}",
                record.volume
            ))
            .state("nothing was changed")
            .next(format!("'tidemark snapshot list {}' shows the snapshots of the volume", record.volume)));
        }
    };
    let base = record.existing(name)?;
    if base.clone_of.is_some() {
        return Err(Error::refused(format!("{}@{name} is a clone, not a kept snapshot", record.volume))
            .state("nothing was changed")
            .next("name the snapshot that it is a clone of"));
    }
    let position = |id: &str| record.snapshots.iter().position(|one| one.id == id);
    let newer = kept.filter(|kept| position(&base.id) >= position(&kept.id.simple().to_string()));
    if let Some(kept) = newer {
        return Err(Error::refused(format!("{}@{name} is not older than {}", record.volume, kept.snapshot))
            .state("nothing was changed")
            .next("name an older snapshot with --since"));
    }
    Ok(base.clone())
}

fn id_of(snapshot: &SnapshotRecord) -> Result<Uuid> {
    Uuid::parse_str(&snapshot.id)
        .map_err(|source| Error::bad_data("the id of a snapshot in its record").with_source(source))
}

/// Where the parent is looked for.
fn places_of(request: &CopyRequest) -> Result<Vec<PathBuf>> {
    match &request.secondary {
        _ if !request.parents.is_empty() => Ok(request.parents.clone()),
        SecondaryTarget::Path(path) => Ok(vec![directory_of(path).to_owned()]),
        SecondaryTarget::Pipe => {
            Err(Error::usage("with --since, an archive on standard output needs --parent")
                .next("name the archive of the snapshot, or its directory: --parent PATH"))
        }
    }
}

fn no_parent(base: &str, places: &[PathBuf]) -> Error {
    let shown: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
    Error::refused(format!("no archive of {base} was found in {}", shown.join(", ")))
        .state("nothing was changed")
        .next(format!(
            "name it, or its directory, with --parent; or make it: tidemark copy {base} FILE.tdm (a copy of the volume \
             itself is not of this snapshot)"
        ))
}

fn wrong_size((parent, recorded): (&Path, Bytes), (base, size): (&str, Bytes)) -> Error {
    Error::bad_data(format!(
        "{} says that {base} has {} bytes, and it has {}",
        parent.display(),
        recorded.get(),
        size.get()
    ))
    .state("nothing was changed")
}

impl SincePlan {
    /// What is copied of `used`, if `changed` is what has changed.
    fn select(&self, used: &[Extent], changed: &ExtentSet) -> Selection {
        let mut wanted = changed.clone();
        wanted.extend(self.absent.iter());
        let is_interrupted = self.raw.as_ref().is_some_and(RawParent::is_updating);
        if let Some(raw) = self.raw.as_ref().filter(|_| is_interrupted) {
            // What an interrupted update left in a segment has no checksum that could be compared: all of the segment
            // is written again.
            let whole = |extent: Extent| {
                let segment = raw.copy.segment.bytes();
                Extent::new(
                    extent.start().align_down(segment),
                    extent.end().align_up(segment).min(self.total),
                )
            };
            wanted = wanted.iter().filter_map(whole).collect();
        }
        let in_use: ExtentSet = used.iter().copied().collect();
        let absent: Vec<Extent> =
            whole_of(self.total).into_iter().flat_map(|whole| in_use.gaps_in(whole)).collect();
        let mut inherited: ExtentSet = used.iter().flat_map(|extent| wanted.gaps_in(*extent)).collect();
        if let Some(raw) = self.raw.as_ref().filter(|_| !is_interrupted) {
            // It reads as zeros already. What the base leaves out need not: an earlier update may have written it.
            let zeros = raw.absent();
            inherited.extend(absent.iter().flat_map(|extent| zeros.intersection_with(*extent)));
        }
        Selection {
            needed: used.iter().flat_map(|extent| wanted.intersection_with(*extent)).collect(),
            inherited: inherited.iter().collect(),
            absent,
            changed: changed.total(),
        }
    }

    /// What is copied of `used`, the part of the origin that is in use. To be called after the instant. No other
    /// command changes the snapshots meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if what has changed is not known any more; I/O errors;
    /// the kernel's; `interrupt`'s.
    pub(super) fn selection(
        &self,
        used: &[Extent],
        kept: Option<&KeptOrigin>,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Selection> {
        let dm = Dm::open()?;
        let set = SnapshotSet::find(&self.volume, interrupt)?.ok_or_else(|| none_of(&self.volume))?;
        list::check_valid(&dm, set.record(), &self.base)?;
        let (from, to) = (self.base_id.simple().to_string(), last_of(kept, self.raw.as_ref()));
        let changed = changes::set(&dm, set.record(), (&from, to.as_deref()), interrupt)?;
        Ok(self.select(used, &changed))
    }

    /// The report of a copy that read `moved` bytes.
    pub(super) fn report(&self, changed: Bytes, moved: Bytes, check: Option<RawCheckReport>) -> SinceReport {
        SinceReport {
            base: self.base.clone(),
            parent: self.parent.clone(),
            check,
            changed_chunks: changed.get().div_ceil(self.chunk.get()),
            changed_bytes: changed,
            moved_bytes: moved,
        }
    }
}

#[cfg(test)]
#[path = "since_tests.rs"]
mod tests;
