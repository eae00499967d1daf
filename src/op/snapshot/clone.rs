//! `tidemark snapshot clone`: a writable image of a snapshot.
//!
//! A clone is one more snapshot target over the snapshot's view, with a store of its own: what is written to it goes
//! there, and neither the snapshot nor the volume changes. Nothing is read through a clone, so it can be created and
//! deleted at any time. Its store holds all that was written to it, so the clone survives a crash as a disk does.
//!
//! Order, the crash argument: the record has the clone as unfinished; its store is created, empty; the record has it as
//! kept; [`settle`](super::settle) makes its devices. After a crash before the third step, the clone is removed.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::create::{check_free, choose_free};
use super::list::check_valid;
use super::placement::{choose_place, choose_size, refresh_unit, store_path};
use super::set::{SnapshotSet, parse_name, read_existing};
use super::settle::{Settlement, find_settled};
use crate::base::{Bytes, Error, Result};
use crate::dm::naming::new_id;
use crate::dm::{Dm, node};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord, SnapshotState};
use crate::job::Job;
use crate::op::admission::{Admission, Question, WAITING_FOR_OTHERS};
use crate::store::{TailPlace, size};
use crate::sys::privilege::require_root;
use crate::sys::process::crash_point;

/// The arguments of `tidemark snapshot clone`.
#[derive(Clone, Debug, Serialize)]
pub struct CloneRequest {
    /// The snapshot, as VOLUME@NAME.
    pub snapshot: String,
    /// The clone's name; None: the next free number.
    pub name: Option<String>,
    /// The directory for its store; None: /var/lib/tidemark.
    pub store: Option<PathBuf>,
    /// Size of the store; None: a fifth of the volume.
    pub store_size: Option<Bytes>,
}

/// The plan of a clone. Serialized for `--dry-run --json`.
#[derive(Clone, Debug, Serialize)]
pub struct ClonePlan {
    /// The user's request.
    pub request: CloneRequest,
    /// The clone, as VOLUME@NAME.
    pub clone: String,
    /// The directory of the store.
    pub directory: PathBuf,
    /// The size of the store.
    pub store_bytes: Bytes,
    #[serde(skip)]
    volume: String,
    #[serde(skip)]
    name: String,
}

/// A clone that was created.
#[derive(Clone, Debug, Serialize)]
pub struct Cloned {
    /// VOLUME@NAME.
    pub clone: String,
    /// The snapshot.
    pub snapshot: String,
    /// Its device.
    pub path: PathBuf,
    /// The file with its store.
    pub store: PathBuf,
    /// The size of the store.
    pub store_bytes: Bytes,
    /// The command that mounts it.
    pub next: String,
}

/// Makes the plan. Changes nothing.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a snapshot that does not exist, is a clone, or does not
/// show its instant; [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for options that do not fit; the kernel's.
pub fn plan(request: &CloneRequest) -> Result<ClonePlan> {
    require_root("cloning a snapshot")?;
    let dm = Dm::open()?;
    let (volume, _) = parse_name(&request.snapshot)?;
    let record = read_existing(volume)?;
    check(&dm, &record, &request.snapshot)?;
    let name = choose_free(&[(volume, Some(&record))], request.name.as_deref())?;
    let question = Question::of(&dm, dm.info_of(volume)?.number)?;
    let directory = choose_place(&question, request.store.as_deref())?;
    Ok(ClonePlan {
        clone: format!("{volume}@{name}"),
        directory,
        store_bytes: choose_size(request.store_size, Bytes(record.size_bytes), record.chunk()?)?,
        volume: volume.to_owned(),
        name,
        request: request.clone(),
    })
}

/// The snapshot `shown`, which must show its instant.
fn check(dm: &Dm, record: &SnapshotSetRecord, shown: &str) -> Result<SnapshotRecord> {
    let (_, name) = parse_name(shown)?;
    let snapshot = record.existing(name)?;
    if snapshot.clone_of.is_some() {
        return Err(Error::refused(format!("{shown} is itself a clone"))
            .state("nothing was changed")
            .next("clone its snapshot, or copy the clone"));
    }
    check_valid(dm, record, shown)?;
    Ok(snapshot.clone())
}

/// Executes the plan.
///
/// # Errors
/// The first failure; then there is no clone.
pub fn run(plan: &ClonePlan, notice: &dyn Fn(&str), interrupt: &dyn Fn() -> Result<()>) -> Result<Cloned> {
    let dm = Dm::open()?;
    let number = dm.info_of(plan.volume.as_str())?.number;
    let mut job = Job::begin_for_origins("snapshot clone", &[number])
        .map_err(|error| error.state("nothing was changed"))?;
    let result = clone(&dm, plan, &mut job, notice, interrupt);
    job.conclude(result)
}

fn clone(
    dm: &Dm,
    plan: &ClonePlan,
    job: &mut Job,
    notice: &dyn Fn(&str),
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Cloned> {
    let admission = Admission::enter(&|| notice(WAITING_FOR_OTHERS), interrupt)?;
    let number = dm.info_of(plan.volume.as_str())?.number;
    Question::of(dm, number)?.check_place(&TailPlace::Directory(plan.directory.clone()))?;
    let mut set = find_settled(dm, &plan.volume, job, interrupt)?;
    // Checked again: another command may have deleted the snapshot or taken the name since the plan was made.
    let snapshot = check(dm, set.record(), &plan.request.snapshot)?;
    check_free(Some(set.record()), &plan.name, &plan.volume)?;
    let id = new_id();
    let made = make(&mut set, plan, &snapshot, &id);
    drop(admission);
    let mut settle =
        |set| Settlement { dm, set, journal: job, interrupt: &|| Ok(()), done: Vec::new() }.settle();
    let store = match made {
        Ok(store) => store,
        Err(error) => return Err(error.after_undo(settle(set).map(drop))),
    };
    if let Err(error) = refresh_unit(set.record()) {
        notice(&error.to_string());
    }
    settle(set).map_err(|error| error.state(format!("the clone {} is recorded", plan.clone)))?;
    Ok(Cloned {
        clone: plan.clone.clone(),
        snapshot: plan.request.snapshot.clone(),
        path: node::mapper_path(&plan.clone),
        store,
        store_bytes: plan.store_bytes,
        next: format!("tidemark snapshot mount {} DIR", plan.clone),
    })
}

/// The first three steps at the head of this module. Returns the path of the store.
fn make(set: &mut SnapshotSet, plan: &ClonePlan, snapshot: &SnapshotRecord, id: &str) -> Result<PathBuf> {
    let size = Bytes(set.record().size_bytes);
    let clone = SnapshotRecord {
        name: plan.name.clone(),
        id: id.to_owned(),
        instant_utc_ns: snapshot.instant_utc_ns,
        store: store_path(Path::new(&plan.directory), (&plan.volume, &plan.name), id),
        store_bytes_max: size::worst_case(size, set.record().chunk()?)?.get(),
        state: SnapshotState::Creating,
        lost: None,
        clone_of: Some(snapshot.id.clone()),
        group: None,
        subset: None,
    };
    let store = set.record().store(&clone)?;
    set.change(|record| record.snapshots.push(clone))?;
    crash_point("snapshot.clone.recorded");
    store.create_file(plan.store_bytes)?;
    crash_point("snapshot.clone.file");
    set.change_one(id, |clone| clone.state = SnapshotState::Kept)?;
    crash_point("snapshot.clone.kept");
    Ok(store.path)
}
