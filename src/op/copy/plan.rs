//! The plan of a copy, as a value: made once, shown by `--dry-run`, executed by [`run`](mod@super::run).
//!
//! Changes nothing. Whatever is certain to be refused is refused here.

use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use super::raw_parent::RawParent;
use super::since::{self, KeptOrigin, SincePlan};
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, ChunkSize, DeviceNumber, Error, Result, SegmentSize};
use crate::copy::{CopyOptions, Order, region_size_for, segment_size_for};
use crate::dm::{Dm, naming};
use crate::format::SecondaryForm;
use crate::job;
use crate::op::admission::Question;
use crate::op::omission::OmissionPlan;
use crate::op::request::{CopyRequest, OnFull, Originals};
use crate::op::targets::{self, TargetFacts};
use crate::secondary::{self, Lineage, OriginIdentity, OriginalsMode, SecondaryRequest, SecondaryTarget};
use crate::stack::Change;
use crate::stack::{self, InsertRequest, StackRequest};
use crate::store::{StoreConfig, StorePlan, TailPlace};
use crate::sys::privilege::require_root;
use crate::topology::{Topology, device_number};
use crate::volume::{self, Origin, OriginKind};

/// The plan of `tidemark copy`. Serialized for `--dry-run --json`.
#[derive(Clone, Debug, Serialize)]
pub struct CopyPlan {
    /// The user's request.
    pub request: CopyRequest,
    /// The origin, as found.
    pub origin: Origin,
    /// Unit of copying, chosen by the device's size if not requested.
    pub segment: SegmentSize,
    /// Unit of release.
    pub region: Bytes,
    /// The order of the regions, chosen by the origin's state if not requested.
    pub order: Order,
    /// The store and the stack of a live origin; None for a cold one.
    pub live: Option<LivePlan>,
    /// The kept snapshot that is the origin.
    pub kept: Option<KeptOrigin>,
    /// What `--since` means.
    pub since: Option<SincePlan>,
    /// Devices that the secondary must not be, be on or be below.
    pub forbidden: Vec<DeviceNumber>,
    /// What would be lost at the secondary's path, and warnings.
    pub target: TargetFacts,
    /// What the user leaves out; None if everything is wanted.
    pub omitted: Option<OmissionPlan>,
}

/// The part of a plan that concerns a live origin.
#[derive(Clone, Debug, Serialize)]
pub struct LivePlan {
    /// The COW store to be created.
    pub store: StorePlan,
    /// The steps of the insertion, in order. Device numbers and ids are examples; a copy assigns its own.
    pub steps: Change,
    /// The origin's own table, which is restored at the end.
    pub table: String,
    /// Swap space may be on the origin: then no part of the store is in memory, and the process locks its memory.
    pub memory_waits: bool,
    #[serde(skip)]
    pub(super) config: StoreConfig,
    #[serde(skip)]
    pub(super) insert: InsertRequest,
}

/// Examines the origin and makes the plan.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) with what to do instead,
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for options that contradict each other or do not suit the
/// origin, I/O and kernel errors, those of `interrupt`.
pub fn plan(request: &CopyRequest, interrupt: &dyn Fn() -> Result<()>) -> Result<CopyPlan> {
    plan_one_of(1, request, interrupt)
}

/// As [`plan`], for one of `copies` that share the memory.
///
/// # Errors
/// As [`plan`].
pub(super) fn plan_one_of(
    copies: u64,
    request: &CopyRequest,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<CopyPlan> {
    let request = &with_names(request)?;
    // Checked before the origin is examined, because the job that uses it may be changing its table.
    if let Some(number) = device_number(&request.origin).ok().flatten() {
        job::refuse_held_origin(number)?;
    }
    let origin = volume::resolve(&request.origin)?;
    if origin.size == Bytes::ZERO {
        return Err(Error::refused(format!("{} is empty", origin.path.display()))
            .next("name a device or file that is not empty"));
    }
    let raw = RawParent::find(request)?;
    let segment = match &raw {
        Some(raw) => raw.segment(request.segment)?,
        None => segment_size_for(origin.size, request.segment)?,
    };
    let region = region_size_for(origin.size, segment, request.region)?;
    check_units(segment, request.chunk)?;
    let forbidden: Vec<DeviceNumber> = origin.number.into_iter().collect();
    let kept = since::kept_origin(&origin)?;
    let omitted = OmissionPlan::find(&request.subset, &origin, &[], interrupt)?;
    let omitted = match &kept {
        Some(kept) => OmissionPlan::with_ranges(omitted, &kept.left_out),
        None => omitted,
    };
    let live = match &origin.kind {
        OriginKind::Live { name, .. } => Some(plan_live(request, &origin, name, omitted.as_ref(), copies)?),
        OriginKind::Snapshot { .. } | OriginKind::ColdDevice | OriginKind::ColdFile => {
            refuse_live_options(request, &origin)?;
            None
        }
    };
    let overwrites = raw.as_ref().map(RawParent::overwrites);
    let since = since::plan(request, &origin, kept.as_ref(), raw, interrupt)?;
    let order = order_for(request, &origin);
    let target = match &request.secondary {
        SecondaryTarget::Pipe => TargetFacts::default(),
        SecondaryTarget::Path(_) if overwrites.is_some() => TargetFacts::overwriting(overwrites),
        SecondaryTarget::Path(path) => TargetFacts::of(path, Some(origin.size)),
    };
    let plan = CopyPlan {
        request: request.clone(),
        origin,
        segment,
        region,
        order,
        live,
        kept,
        since,
        forbidden,
        target,
        omitted,
    };
    plan.check_targets()?;
    Ok(plan)
}

/// The request with its names resolved: a volume's name is accepted wherever a device may be named.
fn with_names(request: &CopyRequest) -> Result<CopyRequest> {
    let mut request = request.clone();
    request.origin = volume::find(&request.origin)?;
    if let SecondaryTarget::Path(path) = &mut request.secondary {
        *path = targets::named(path)?;
    }
    if let Some(path) = &mut request.store.tail {
        *path = targets::named(path)?;
    }
    Ok(request)
}

/// Checks that a segment consists of whole chunks. (A region always consists of whole segments.) Otherwise a chunk
/// could cross the border of a region: once one half was released and written, the kernel would preserve the whole
/// chunk, and the new content of that half would be applied to the copy as an original.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage).
pub fn check_units(segment: SegmentSize, chunk: ChunkSize) -> Result<()> {
    if segment.bytes() >= chunk.bytes() {
        return Ok(());
    }
    Err(Error::usage(format!("--segment {segment} is smaller than --chunk {chunk}"))
        .next("make the segment at least as large as the chunk"))
}

/// The requested order, or the default. For a live origin the default is to copy the most written regions first: writes
/// to a region that was copied early need not be preserved. This also suits a rotational disk: in either order its
/// heads move between the requests of the copier and those of the writers. A cold origin is not written.
pub(in crate::op) fn order_for(request: &CopyRequest, origin: &Origin) -> Order {
    let suits = match origin.kind {
        OriginKind::Live { .. } => Order::Hot,
        _ => Order::Physical,
    };
    request.order.unwrap_or(suits)
}

/// True if a disk of the origin is rotational.
pub(in crate::op) fn is_rotating(origin: &Origin) -> bool {
    origin.number.is_some_and(|number| Topology::default().is_rotational(number))
}

/// Options that apply only to a live origin must not be ignored silently.
fn refuse_live_options(request: &CopyRequest, origin: &Origin) -> Result<()> {
    let option = match request {
        CopyRequest { hooks, .. } if hooks.frozen.is_some() => "--hook-frozen",
        CopyRequest { store, .. } if store.keep => "--keep-store",
        CopyRequest { on_full: OnFull::Hold, .. } => "--on-full hold",
        CopyRequest { order: Some(Order::Hot), .. } => "--order hot",
        _ => return Ok(()),
    };
    Err(Error::usage(format!(
        "{option} does not apply to {}, a {}: nothing is frozen and no store is created",
        origin.path.display(),
        origin.kind
    ))
    .state("nothing was changed")
    .next(format!("omit {option}, or attach the device and copy the volume")))
}

/// Refuses names that are not valid UTF-8 while nothing is frozen yet, because the job's record is text.
fn refuse_other_text(request: &CopyRequest, origin: &Origin) -> Result<()> {
    let secondary = match &request.secondary {
        SecondaryTarget::Pipe => None,
        SecondaryTarget::Path(path) => Some(path),
    };
    let named = [Some(&request.origin), Some(&origin.path), secondary, request.store.tail.as_ref()];
    let mut paths = named.into_iter().flatten().chain(&origin.filesystems);
    match paths.find(|path| path.to_str().is_none()) {
        None => Ok(()),
        Some(path) => Err(Error::refused(format!("the path {} is not UTF-8", path.display()))
            .state("nothing was changed")
            .next("name another file; a filesystem can be mounted at a second point (mount --bind)")),
    }
}

fn plan_live(
    request: &CopyRequest,
    origin: &Origin,
    name: &str,
    omitted: Option<&OmissionPlan>,
    copies: u64,
) -> Result<LivePlan> {
    require_root("copying a live device")?;
    refuse_other_text(request, origin)?;
    if !origin.size.is_aligned(DIRECT_IO_ALIGN) {
        // The store's blocks are 4 KiB, and the kernel requires the size of the snapshot to be a multiple of that.
        return Err(Error::refused(format!(
            "{} has {} bytes, which is not a multiple of {DIRECT_IO_ALIGN}: the kernel cannot make a \
             snapshot of it",
            origin.path.display(),
            origin.size.get()
        ))
        .state("nothing was changed")
        .next("copy it while it is not in use, or make the volume or partition end on a multiple of 4 KiB"));
    }
    let dm = Dm::open()?;
    let number = dm.info_of(name)?.number;
    let table = dm.active_table(name)?;
    let place = TailPlace::resolve(request.store.tail.as_deref())?;
    let question = Question::of(&dm, number)?;
    question.check_place(&place)?;
    let objection = question.objection_to_memory();
    let memory_waits = objection.is_some();
    let ram = match (request.store.ram, objection) {
        (None, Some(_)) => Some(Bytes::ZERO),
        (Some(wanted), Some(objection)) if wanted > Bytes::ZERO => return Err(objection),
        (ram, _) => ram,
    };
    let id = naming::new_id();
    let config = StoreConfig {
        origin_name: name.to_owned(),
        volume: name.to_owned(),
        id: id.clone(),
        job: id,
        origin_bytes: origin.size,
        chunk: request.chunk,
        place,
        size_max: request.store.size_max,
        ram,
        ram_shares: copies,
        keep: request.store.keep,
    };
    let store = config.plan()?;
    let stack = StackRequest {
        origin: name.to_owned(),
        // The store's device does not exist yet; the copy inserts its number.
        cow: number,
        chunk: request.chunk,
        lock_filesystem: origin.lock_filesystem,
        all: request.all,
        omission: omitted.map(|omitted| Arc::clone(&omitted.omission)),
        planned_table: Some(table.clone()),
    };
    let insert = InsertRequest {
        stacks: vec![stack],
        filesystems: origin.filesystems.clone(),
        planned: Some(origin.frozen.clone()),
        budget: request.freeze_budget,
        lvm_lock: request.lvm_lock,
    };
    let text = table.to_string();
    let steps = stack::insertion(&insert, &[table], &config.id);
    Ok(LivePlan { store, steps, table: text, memory_waits, config, insert })
}

impl CopyPlan {
    /// The refusals that are repeated when the secondary is opened and the store is created.
    pub(super) fn check_targets(&self) -> Result<()> {
        self.check_store()?;
        let SecondaryTarget::Path(path) = &self.request.secondary else { return Ok(()) };
        if self.request.format == SecondaryForm::Archive && is_device(path) {
            return Err(Error::refused(format!(
                "{} is a block device: an archive is a file",
                path.display()
            ))
            .next("use --format raw, or name a file"));
        }
        if is_same_file(&self.origin.path, path) {
            return Err(Error::refused(format!(
                "{} is the origin itself: {}",
                path.display(),
                self.origin.path.display()
            ))
            .state("nothing was changed")
            .next("name another file or device"));
        }
        if let Ok(found) = std::fs::metadata(path)
            && !found.is_file()
            && !is_device(path)
        {
            return Err(Error::refused(format!(
                "{} is neither a block device nor a regular file",
                path.display()
            ))
            .state("nothing was changed")
            .next("name a device or a file, or - for standard output"));
        }
        secondary::check(&self.secondary_request(self.forbidden_with_store()))
            .map_err(|error| targets::naming_job(error, path))?;
        match (&self.live, self.origin.number) {
            (Some(_), Some(number)) => {
                Question::of(&Dm::open()?, number)?.check_secondary(path, self.request.on_full)
            }
            _ => Ok(()),
        }
    }

    /// The copier's options.
    #[must_use]
    pub fn options(&self) -> CopyOptions {
        let CopyRequest { rate, verify, .. } = self.request;
        CopyOptions { segment: self.segment, region: self.region, order: self.order, rate, verify }
    }

    /// Checks a device given for the store, because it is overwritten as well.
    pub(super) fn check_store(&self) -> Result<()> {
        let Some(TailPlace::Device { path, number, .. }) = self.live.as_ref().map(|live| &live.store.place)
        else {
            return Ok(());
        };
        Topology::default()
            .check_device(*number, path, &self.forbidden)
            .map_err(|error| targets::naming_job(error, path).context("the store"))
    }

    /// The devices that the secondary must not use: those of the origin and of the store.
    pub(super) fn forbidden_with_store(&self) -> Vec<DeviceNumber> {
        let store = self.live.as_ref().and_then(|live| match &live.store.place {
            TailPlace::Device { number, .. } => Some(*number),
            _ => None,
        });
        self.forbidden.iter().copied().chain(store).collect()
    }

    /// What would be overwritten: an existing secondary, a device given for the store.
    #[must_use]
    pub fn destroys(&self) -> Option<String> {
        let secondary = self.target.overwrites.clone();
        let store = match self.live.as_ref().map(|live| &live.store.place) {
            Some(TailPlace::Device { path, .. }) => {
                Some(format!("everything on the store's device {} will be overwritten", path.display()))
            }
            _ => None,
        };
        match (secondary, store) {
            (Some(secondary), Some(store)) => Some(format!("{secondary}, and {store}")),
            (secondary, store) => secondary.or(store),
        }
    }

    /// The devices that the secondary must not use, including `below`.
    pub(in crate::op) fn forbidden_with(&self, below: DeviceNumber) -> Vec<DeviceNumber> {
        self.forbidden.iter().copied().chain([below]).collect()
    }

    /// True if a raw secondary is updated in place.
    pub(super) fn is_update(&self) -> bool {
        self.since.as_ref().is_some_and(|since| since.raw.is_some())
    }

    /// The snapshots and the archive that the copy is related to.
    fn lineage(&self) -> Lineage {
        if self.request.format != SecondaryForm::Archive {
            return Lineage::default();
        }
        Lineage {
            snapshot: self.kept.as_ref().map_or(Uuid::nil(), |kept| kept.id),
            base: self.since.as_ref().map_or(Uuid::nil(), |since| since.base_id),
            parent: self.since.as_ref().map_or(Uuid::nil(), |since| since.parent_id),
        }
    }

    /// The arguments for opening the secondary.
    pub(in crate::op) fn secondary_request(&self, forbidden: Vec<DeviceNumber>) -> SecondaryRequest {
        SecondaryRequest {
            target: self.request.secondary.clone(),
            form: self.request.format,
            originals: match self.request.originals {
                Originals::Overlay => OriginalsMode::Overlay,
                Originals::Append => OriginalsMode::Append,
            },
            replace: self.request.replace,
            verify: self.request.verify,
            forbidden,
            origin: OriginIdentity {
                name: self.origin.name(),
                path: self.origin.path.display().to_string(),
                size: self.origin.size,
            },
            segment: self.segment,
            chunk: self.request.chunk,
            block_list: whole(self.origin.size),
            lineage: self.lineage(),
            in_place: self.is_update(),
        }
    }
}

/// The block list that covers the whole origin.
pub(super) fn whole(size: Bytes) -> Vec<crate::extent::Extent> {
    crate::extent::Extent::new(Bytes::ZERO, size).into_iter().collect()
}

fn is_device(path: &std::path::Path) -> bool {
    matches!(device_number(path), Ok(Some(_)))
}

/// True if both names refer to the same file. (Devices are compared elsewhere, by number.)
pub(in crate::op) fn is_same_file(one: &std::path::Path, other: &std::path::Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let (Ok(one), Ok(other)) = (std::fs::metadata(one), std::fs::metadata(other)) else { return false };
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_regions_border_cuts_no_chunk() {
        let (segment, chunk) =
            (SegmentSize::new(Bytes::kib(64)).unwrap(), |size| ChunkSize::new(size).unwrap());
        check_units(segment, chunk(Bytes::kib(64))).unwrap();
        let error = check_units(segment, chunk(Bytes::kib(128))).unwrap_err();
        assert_eq!(error.kind(), crate::base::ErrorKind::Usage);
        check_units(SegmentSize::default(), chunk(Bytes::mib(1))).unwrap();
    }
}
