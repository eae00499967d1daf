//! `tidemark snapshot create`: what is to be kept of which volumes. [`take`](super::take) executes the plan.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::layers::refuse_other_set;
use super::placement::{choose_size, resolve_directory};
use super::set::{check_name, read_of};
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, ChunkSize, DeviceNumber, Error, Result, directory_of, escape};
use crate::dm::naming::ROLE_VOLUME;
use crate::dm::{DeviceIdentity, Dm};
use crate::format::state::SnapshotSetRecord;
use crate::job;
use crate::op::admission::Question;
use crate::op::attach::recorded_volumes;
use crate::op::omission::OmissionPlan;
use crate::op::request::Hooks;
use crate::stack::ORIGINS_MAX;
use crate::store::TailPlace;
use crate::sys::privilege::require_root;
use crate::topology::Topology;
use crate::volume::subset::Subset;
use crate::volume::{self, FreezeSet, Origin, OriginKind, filesystems_on};

/// Most snapshots of one volume: each older one is read through all newer ones.
pub const SNAPSHOTS_MAX: usize = 64;

/// The arguments of `tidemark snapshot create`.
#[derive(Clone, Debug, Serialize)]
pub struct CreateRequest {
    /// The volume's name or path.
    pub volume: PathBuf,
    /// The snapshot's name; None: the next free number.
    pub name: Option<String>,
    /// The directory for its store; None: /var/lib/tidemark.
    pub store: Option<PathBuf>,
    /// Size of the store; None: a fifth of the volume.
    pub store_size: Option<Bytes>,
    /// Unit of copy-on-write; None: that of the volume's other snapshots, or the default.
    pub chunk: Option<ChunkSize>,
    /// What of the volume is kept.
    pub subset: Subset,
    /// Longest time for which filesystems may be frozen or volumes suspended.
    pub freeze_budget: Duration,
    /// The hooks.
    pub hooks: Hooks,
}

/// The plan of snapshots with one instant. Serialized for `--dry-run --json`: of one volume as its own plan.
#[derive(Clone, Debug)]
pub struct GroupPlan {
    /// One for each volume, in the order of the command line.
    pub snapshots: Vec<CreatePlan>,
    /// The filesystems on all volumes, as found.
    pub(super) frozen: FreezeSet,
}

impl Serialize for GroupPlan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Group<'a> {
            snapshots: &'a [CreatePlan],
            #[serde(serialize_with = "escape::paths")]
            filesystems: &'a [PathBuf],
        }
        match &self.snapshots[..] {
            [one] => one.serialize(serializer),
            all => Group { snapshots: all, filesystems: &self.frozen.points }.serialize(serializer),
        }
    }
}

impl GroupPlan {
    /// The hooks, which run once for all volumes.
    pub(super) fn hooks(&self) -> &Hooks {
        &self.snapshots[0].request.hooks
    }

    /// The paths of all volumes, separated by spaces, for the hooks.
    pub(super) fn origins(&self) -> String {
        let paths: Vec<String> =
            self.snapshots.iter().map(|one| one.origin.path.display().to_string()).collect();
        paths.join(" ")
    }

    /// The filesystems that are frozen, in this order.
    #[must_use]
    pub fn filesystems(&self) -> &[PathBuf] {
        &self.frozen.points
    }
}

/// The plan of a snapshot.
#[derive(Clone, Debug, Serialize)]
pub struct CreatePlan {
    /// The user's request.
    pub request: CreateRequest,
    /// The volume's name.
    pub volume: String,
    /// The snapshot's name.
    pub name: String,
    /// The directory of the store.
    pub directory: PathBuf,
    /// The size of the store.
    pub store_bytes: Bytes,
    /// The filesystems that are frozen.
    pub filesystems: Vec<PathBuf>,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// What the user leaves out; None if everything is wanted.
    pub omitted: Option<OmissionPlan>,
    #[serde(skip)]
    pub(super) device: String,
    #[serde(skip)]
    pub(super) origin: Origin,
    #[serde(skip)]
    pub(super) number: DeviceNumber,
}

/// Makes the plan of snapshots with one instant and one name. The requests differ only in their volume. Changes nothing.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a volume that was not attached, is being copied, is named
/// twice, or cannot have snapshots; [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for options that do not fit; the
/// kernel's; `interrupt`'s.
///
/// # Panics
/// If there is no request: a broken invariant.
pub fn plan(requests: &[CreateRequest], interrupt: &dyn Fn() -> Result<()>) -> Result<GroupPlan> {
    assert!(!requests.is_empty(), "a snapshot is of a volume");
    require_root("creating a snapshot")?;
    if requests.len() > ORIGINS_MAX {
        return Err(Error::refused(format!(
            "{} volumes at once: {ORIGINS_MAX} are possible",
            requests.len()
        ))
        .state("nothing was changed")
        .next("create the snapshots in several groups"));
    }
    let dm = Dm::open()?;
    let mut volumes: Vec<Volume> = Vec::new();
    for request in requests {
        let volume = Volume::find(&dm, request)?;
        if volumes.iter().any(|other| other.number == volume.number) {
            return Err(Error::refused(format!("{} is named twice", volume.name))
                .state("nothing was changed")
                .next("name each volume once"));
        }
        volumes.push(volume);
    }
    check_ranges(&requests[0].subset, volumes.len())?;
    let mounted: Vec<DeviceNumber> =
        volumes.iter().flat_map(|volume| volume.origin.frozen.devices.clone()).collect();
    let omitted = volumes.iter().zip(requests).map(|(volume, request)| {
        OmissionPlan::find(&request.subset, &volume.origin, &mounted, interrupt)
            .map_err(|error| error.context(format!("the snapshot of {}", volume.name)))
    });
    let omitted = omitted.collect::<Result<Vec<_>>>()?;
    let records: Vec<_> =
        volumes.iter().map(|volume| (volume.name.as_str(), volume.record.as_ref())).collect();
    let name = choose_free(&records, requests[0].name.as_deref())?;
    let plans = volumes
        .into_iter()
        .zip(requests)
        .zip(omitted)
        .map(|((volume, request), omitted)| volume.plan(request, &name, omitted));
    let snapshots = plans.collect::<Result<Vec<_>>>()?;
    check_places(&dm, &snapshots)?;
    let frozen = match &snapshots[..] {
        [one] => one.origin.frozen.clone(),
        all => filesystems_on(&all.iter().map(|one| one.number).collect::<Vec<_>>(), &Topology::default())?,
    };
    Ok(GroupPlan { snapshots, frozen })
}

/// Refuses ranges of bytes for several volumes: it is not clear of which.
fn check_ranges(subset: &Subset, volume_count: usize) -> Result<()> {
    if volume_count == 1 || !subset.names_ranges() {
        return Ok(());
    }
    Err(Error::usage("bytes are named, and several volumes: it is not clear of which volume they are")
        .state("nothing was changed")
        .next("name files, or create the snapshot of that volume apart"))
}

/// Refuses a store that may wait for one of the volumes: they are held together. The stores of older snapshots count too.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) with the chain of devices; I/O errors.
pub(super) fn check_places(dm: &Dm, snapshots: &[CreatePlan]) -> Result<()> {
    let mut places = Vec::new();
    for snapshot in snapshots {
        places.push(snapshot.directory.clone());
        if snapshots.len() > 1 {
            let linked = read_of(&snapshot.volume)?.map(|record| record.linked()).unwrap_or_default();
            places.extend(linked.iter().map(|older| directory_of(Path::new(&older.store)).to_owned()));
        }
    }
    places.sort();
    places.dedup();
    for snapshot in snapshots {
        let question = Question::of(dm, snapshot.number)?;
        for place in &places {
            question.check_place(&TailPlace::Directory(place.clone()))?;
        }
    }
    Ok(())
}

/// A volume of which a snapshot is to be created.
struct Volume {
    name: String,
    origin: Origin,
    number: DeviceNumber,
    record: Option<SnapshotSetRecord>,
}

impl Volume {
    fn find(dm: &Dm, request: &CreateRequest) -> Result<Self> {
        let origin = volume::resolve(&request.volume)?;
        let name = attached_volume(dm, &origin)?;
        let number = dm.info_of(name.as_str())?.number;
        job::refuse_held_origin(number)?;
        if !origin.size.is_aligned(DIRECT_IO_ALIGN) {
            return Err(Error::refused(format!(
                "{name} has {} bytes, which is not a multiple of {DIRECT_IO_ALIGN}: the kernel cannot make a snapshot of it",
                origin.size.get()
            ))
            .state("nothing was changed"));
        }
        let record = read_of(&name)?;
        refuse_other_set(dm, &name, record.as_ref())?;
        record.as_ref().map_or(Ok(()), SnapshotSetRecord::refuse_rollback)?;
        Question::of(dm, number)?.check_snapshot_records()?;
        Ok(Self { name, origin, number, record })
    }

    fn plan(self, request: &CreateRequest, name: &str, omitted: Option<OmissionPlan>) -> Result<CreatePlan> {
        let chunk = choose_chunk(self.record.as_ref(), request.chunk, &self.name)?;
        Ok(CreatePlan {
            request: request.clone(),
            name: name.to_owned(),
            directory: resolve_directory(request.store.as_deref())?,
            store_bytes: choose_size(request.store_size, self.origin.size, chunk)?,
            filesystems: self.origin.filesystems.clone(),
            chunk,
            omitted,
            device: recorded_device(&self.name)?,
            volume: self.name,
            origin: self.origin,
            number: self.number,
        })
    }
}

/// The name of the attached volume that `origin` is.
fn attached_volume(dm: &Dm, origin: &Origin) -> Result<String> {
    let attach = |what: String| {
        Error::refused(what).state("nothing was changed").next(
            "snapshots are kept of attached volumes: unmount the device, then 'tidemark attach DEVICE --name NAME \
             --install-unit', and mount /dev/mapper/NAME",
        )
    };
    let OriginKind::Live { name, .. } = &origin.kind else {
        return Err(attach(format!("{} is not an attached volume", origin.path.display())));
    };
    let info = dm.info_of(name.as_str())?;
    match DeviceIdentity::parse(&info.uuid) {
        Some(identity) if identity.role == ROLE_VOLUME => Ok(name.clone()),
        _ => Err(attach(format!(
            "{name} was not attached by Tidemark, so nothing proves that it is not written before its snapshots are put \
             together again at boot"
        ))),
    }
}

/// The device below an attached volume.
fn recorded_device(volume: &str) -> Result<String> {
    let record = recorded_volumes()?.into_iter().flatten().find(|record| record.name == volume);
    record.map(|record| record.device).ok_or_else(|| {
        Error::refused(format!("{volume} has no record of how it was attached"))
            .state("nothing was changed")
            .next(format!("attach it again under the same name: 'tidemark attach DEVICE --name {volume}'"))
    })
}

/// A name that all `volumes` have free: `wanted`, or the first number.
///
/// # Errors
/// As [`check_free`]; [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for a name that cannot be one.
pub(super) fn choose_free(
    volumes: &[(&str, Option<&SnapshotSetRecord>)],
    wanted: Option<&str>,
) -> Result<String> {
    let free = |name: &str| volumes.iter().try_for_each(|(volume, record)| check_free(*record, name, volume));
    if let Some(wanted) = wanted {
        check_name(wanted)?;
        return free(wanted).map(|()| wanted.to_owned());
    }
    // Each volume has at most so many.
    let most = SNAPSHOTS_MAX * volumes.len() + 1;
    let mut numbers = (1..=most).map(|number| number.to_string());
    numbers.find(|name| free(name).is_ok()).map_or_else(|| free("1").map(|()| "1".to_owned()), Ok)
}

/// Refuses a name that `volume` has in use, and a further snapshot if it has the most that are possible.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused).
pub(super) fn check_free(record: Option<&SnapshotSetRecord>, name: &str, volume: &str) -> Result<()> {
    let Some(record) = record else { return Ok(()) };
    if record.snapshots.len() >= SNAPSHOTS_MAX {
        return Err(Error::refused(format!("{volume} has {SNAPSHOTS_MAX} snapshots, which is the most"))
            .state("nothing was changed")
            .next("delete one: 'tidemark snapshot delete'"));
    }
    if record.snapshots.iter().any(|snapshot| snapshot.name == name) {
        return Err(Error::refused(format!("{volume}@{name} exists already"))
            .state("nothing was changed")
            .next("choose another --name ('tidemark snapshot list' shows those that exist, and those being deleted)"));
    }
    Ok(())
}

/// The unit of copy-on-write: `wanted`, or that of the volume's other snapshots.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) if these have another.
pub(super) fn choose_chunk(
    record: Option<&SnapshotSetRecord>,
    wanted: Option<ChunkSize>,
    volume: &str,
) -> Result<ChunkSize> {
    let Some(record) = record.filter(|record| !record.snapshots.is_empty()) else {
        return Ok(wanted.unwrap_or_default());
    };
    let chunk = record.chunk()?;
    match wanted {
        Some(wanted) if wanted != chunk => {
            Err(Error::usage(format!("--chunk {wanted}: the snapshots of {volume} have chunks of {chunk}"))
                .state("nothing was changed")
                .next("omit --chunk"))
        }
        _ => Ok(chunk),
    }
}
