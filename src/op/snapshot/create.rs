//! `tidemark snapshot create`: keeps what a volume holds at one instant.
//!
//! Order, the crash argument:
//! 1. the record has the snapshot as unfinished, with the name of its store;
//! 2. the store is created, with all its space;
//! 3. the instant: the new view receives originals from then on ([`kept`]), and so does the former newest one;
//! 4. the record has the snapshot as kept, with its instant;
//! 5. only then the former newest view is led to the new one, which ends its receiving ([`settle`](super::settle)).
//!
//! After a crash before 4, the snapshot is removed, and the former newest one has missed nothing. After one between 4
//! and 5, both receive, and settling continues.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::layers::refuse_other_set;
use super::link;
use super::placement::{choose_place, choose_size, refresh_unit, store_path};
use super::set::{SnapshotSet, check_name, read_of};
use super::settle::{Settlement, settle_first};
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, ChunkSize, DeviceNumber, Error, Result, clock};
use crate::dm::naming::{ROLE_VOLUME, new_id};
use crate::dm::{DeviceIdentity, Dm};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord, SnapshotState};
use crate::job::{self, Job};
use crate::op::admission::{Admission, Question, WAITING_FOR_OTHERS};
use crate::op::attach::recorded_volumes;
use crate::op::request::Hooks;
use crate::progress::{Event, Observer};
use crate::stack::InstantContext;
use crate::stack::hooks::Hook;
use crate::stack::kept::{self, Capture};
use crate::stack::watchdog::Standby;
use crate::store::{TailPlace, size};
use crate::sys::privilege::require_root;
use crate::sys::process::crash_point;
use crate::volume::{self, Origin, OriginKind};

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
    /// Longest time for which filesystems may be frozen or the volume suspended.
    pub freeze_budget: Duration,
    /// The hooks.
    pub hooks: Hooks,
}

/// The plan of a snapshot. Serialized for `--dry-run --json`.
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
    #[serde(skip)]
    device: String,
    #[serde(skip)]
    origin: Origin,
    #[serde(skip)]
    number: DeviceNumber,
}

/// A snapshot that was created.
#[derive(Clone, Debug, Serialize)]
pub struct Created {
    /// VOLUME@NAME.
    pub snapshot: String,
    /// Its device.
    pub path: PathBuf,
    /// Its instant.
    pub instant: Option<String>,
    /// The file with its store.
    pub store: PathBuf,
    /// The size of the store.
    pub store_bytes: Bytes,
    /// Milliseconds for which the filesystems were frozen.
    pub frozen_ms: u64,
    /// Milliseconds for which the volume was suspended.
    pub suspended_ms: u64,
    /// The command that mounts it.
    pub next: String,
}

/// Makes the plan. Changes nothing.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a volume that was not attached, is being copied, or
/// cannot have snapshots; [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for options that do not fit; the
/// kernel's.
pub fn plan(request: &CreateRequest) -> Result<CreatePlan> {
    require_root("creating a snapshot")?;
    let origin = volume::resolve(&request.volume)?;
    let dm = Dm::open()?;
    let volume = attached_volume(&dm, &origin)?;
    let number = dm.info_of(volume.as_str())?.number;
    job::refuse_held_origin(number)?;
    if !origin.size.is_aligned(DIRECT_IO_ALIGN) {
        return Err(Error::refused(format!(
            "{volume} has {} bytes, which is not a multiple of {DIRECT_IO_ALIGN}: the kernel cannot make a snapshot of it",
            origin.size.get()
        ))
        .state("nothing was changed"));
    }
    let record = read_of(&volume)?;
    refuse_other_set(&dm, &volume, record.as_ref())?;
    record.as_ref().map_or(Ok(()), SnapshotSetRecord::refuse_rollback)?;
    let name = choose_name(record.as_ref(), request.name.as_deref(), &volume)?;
    let chunk = choose_chunk(record.as_ref(), request.chunk, &volume)?;
    let question = Question::of(&dm, number)?;
    let directory = choose_place(&question, request.store.as_deref())?;
    question.check_snapshot_records()?;
    let store_bytes = choose_size(request.store_size, origin.size, chunk)?;
    Ok(CreatePlan {
        request: request.clone(),
        name,
        directory,
        store_bytes,
        filesystems: origin.filesystems.clone(),
        chunk,
        device: recorded_device(&volume)?,
        volume,
        origin,
        number,
    })
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

pub(super) fn choose_name(
    record: Option<&SnapshotSetRecord>,
    wanted: Option<&str>,
    volume: &str,
) -> Result<String> {
    let taken = |name: &str| {
        record.is_some_and(|record| record.snapshots.iter().any(|snapshot| snapshot.name == name))
    };
    if let Some(record) = record
        && record.snapshots.len() >= SNAPSHOTS_MAX
    {
        return Err(Error::refused(format!("{volume} has {SNAPSHOTS_MAX} snapshots, which is the most"))
            .state("nothing was changed")
            .next("delete one: 'tidemark snapshot delete'"));
    }
    let Some(wanted) = wanted else {
        return Ok((1u64..).map(|number| number.to_string()).find(|name| !taken(name)).expect("one is free"));
    };
    check_name(wanted)?;
    if taken(wanted) {
        return Err(Error::refused(format!("{volume}@{wanted} exists already"))
            .state("nothing was changed")
            .next("choose another --name ('tidemark snapshot list' shows those that exist, and those being deleted)"));
    }
    Ok(wanted.to_owned())
}

fn choose_chunk(
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

/// Executes the plan.
///
/// # Errors
/// The first failure; then there is no snapshot, and the volume is as it was.
pub fn run(
    plan: &CreatePlan,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Created> {
    let dm = Dm::open()?;
    let mut job = Job::begin_for_origins("snapshot create", &[plan.number])
        .map_err(|error| error.state("nothing was changed"))?;
    let result = create(&dm, plan, &mut job, observer, interrupt);
    job.conclude(result)
}

fn create(
    dm: &Dm,
    plan: &CreatePlan,
    job: &mut Job,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Created> {
    let note = |text: &str| observer.event(&Event::Note { text: text.to_owned() });
    let admission = Admission::enter(&|| note(WAITING_FOR_OTHERS), interrupt)?;
    Question::of(dm, plan.number)?.check_place(&TailPlace::Directory(plan.directory.clone()))?;
    refuse_other_set(dm, &plan.volume, read_of(&plan.volume)?.as_ref())?;
    let set = match SnapshotSet::find(&plan.volume, interrupt)? {
        // What a command that died has left is completed first.
        Some(set) => settle_first(dm, set, job, interrupt)?,
        None => None,
    };
    let mut set = match set {
        Some(set) => set,
        None => SnapshotSet::create(&plan.volume, &plan.device, plan.origin.size, plan.chunk)?,
    };
    let id = new_id();
    let taken = take(dm, &mut set, plan, &id, job, interrupt);
    drop(admission);
    let times = match taken {
        Ok(times) => times,
        Err(error) => {
            let undo = Settlement { dm, set, journal: job, interrupt: &|| Ok(()), done: Vec::new() }.settle();
            return Err(error.after_undo(undo.map(drop)));
        }
    };
    observer.event(&Event::Instant {
        utc_ns: times.instant_utc_ns,
        frozen: times.frozen,
        suspended: times.suspended,
    });
    let after =
        plan.request.hooks.after.as_deref().map(|command| hook(plan, "--hook-after", command).run(interrupt));
    if let Some(Err(error)) = after {
        observer.event(&Event::Warning { text: error.to_string() });
    }
    if let Err(error) = link::note_mounts(dm, &mut set).and_then(|()| refresh_unit(set.record())) {
        observer.event(&Event::Warning { text: error.to_string() });
    }
    let store =
        set.record().named(&plan.name).map(|snapshot| PathBuf::from(&snapshot.store)).unwrap_or_default();
    Settlement { dm, set, journal: job, interrupt: &|| Ok(()), done: Vec::new() }
        .settle()
        .map_err(|error| error.state(format!("{}@{} exists and is valid", plan.volume, plan.name)))?;
    let snapshot = format!("{}@{}", plan.volume, plan.name);
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Ok(Created {
        path: crate::dm::node::mapper_path(&snapshot),
        instant: clock::utc_text(times.instant_utc_ns),
        store,
        store_bytes: plan.store_bytes,
        frozen_ms: millis(times.frozen),
        suspended_ms: millis(times.suspended),
        next: format!("tidemark snapshot mount {snapshot} DIR"),
        snapshot,
    })
}

/// Steps 1 to 4 at the head of this module.
fn take(
    dm: &Dm,
    set: &mut SnapshotSet,
    plan: &CreatePlan,
    id: &str,
    job: &mut Job,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<crate::stack::HoldTimes> {
    // Checked again: another command may have taken the name since the plan was made.
    set.record().refuse_rollback()?;
    choose_name(Some(set.record()), Some(&plan.name), &plan.volume)?;
    choose_chunk(Some(set.record()), Some(plan.chunk), &plan.volume)?;
    if Bytes(set.record().size_bytes) != plan.origin.size {
        return Err(Error::refused(format!("{} was resized since its snapshots were created", plan.volume))
            .state("nothing was changed")
            .next("delete the snapshots of its former size first"));
    }
    let snapshot = SnapshotRecord {
        name: plan.name.clone(),
        id: id.to_owned(),
        instant_utc_ns: 0,
        store: store_path(&plan.directory, (&plan.volume, &plan.name), id),
        store_bytes_max: size::worst_case(plan.origin.size, plan.chunk)?.get(),
        state: SnapshotState::Creating,
        lost: None,
        clone_of: None,
    };
    let store = set.record().store(&snapshot)?;
    set.change(|record| {
        record.snapshots.push(snapshot);
        // What the device held when it was detached proves nothing from here on.
        record.detached = None;
    })?;
    crash_point("snapshot.create.recorded");
    let standby = Standby::start(job.id());
    store.create_file(plan.store_bytes)?;
    crash_point("snapshot.create.file");
    let number = store.show(dm)?;
    crash_point("snapshot.create.store");
    if let Some(command) = &plan.request.hooks.before {
        hook(plan, "--hook-before", command).run(interrupt)?;
    }
    let request = Capture {
        volume: plan.volume.clone(),
        set: set.record().id.clone(),
        snapshot: plan.name.clone(),
        id: id.to_owned(),
        store: number,
        chunk: plan.chunk,
        filesystems: plan.filesystems.clone(),
        planned: plan.origin.frozen.clone(),
        lock_filesystem: plan.origin.lock_filesystem,
        budget: plan.request.freeze_budget,
    };
    let mut at_instant = |instant: &InstantContext<'_>| match &plan.request.hooks.frozen {
        None => Ok(()),
        Some(command) => {
            Hook { deadline: Some(instant.deadline), ..hook(plan, "--hook-frozen", command) }.run(interrupt)
        }
    };
    let times = kept::run(dm, job, &request, &standby, &mut at_instant, interrupt)?;
    crash_point("snapshot.create.taken");
    set.change_one(id, |snapshot| {
        snapshot.instant_utc_ns = times.instant_utc_ns;
        snapshot.state = SnapshotState::Kept;
    })?;
    crash_point("snapshot.create.kept");
    Ok(times)
}

fn hook<'a>(plan: &'a CreatePlan, option: &'static str, command: &'a str) -> Hook<'a> {
    Hook {
        option,
        command,
        origin: Path::new(&plan.origin.path),
        below: None,
        deadline: None,
        variables: &[],
    }
}
