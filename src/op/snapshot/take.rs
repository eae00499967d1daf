//! Creates the snapshots of a plan: executes what [`create`](super::create) has planned.
//!
//! Order, the crash argument; each step is done for every volume before the next begins:
//! 1. the record has the snapshot as unfinished, with the name of its store;
//! 2. the store is created, with all its space;
//! 3. the instant, one for all volumes: the new view receives originals from then on ([`kept`]), and so does the former
//!    newest one. The record has what the snapshot leaves out, which is known only now;
//! 4. the record has the snapshot as kept, with its instant;
//! 5. only then the former newest view is led to the new one, which ends its receiving ([`settle`](super::settle)).
//!
//! After a crash before 4, the snapshot is removed, and the former newest one has missed nothing. After one between 4
//! and 5, both receive, and settling continues.
//!
//! With several volumes, 4 is a step for each of their records, and a crash between two of them must not leave a snapshot
//! of one volume and none of the other. So the record of the group comes between 3 and 4, and decides for all: see
//! [`group`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::create::{CreatePlan, GroupPlan, check_free, check_places, choose_chunk};
use super::group::{self, Uncommitted};
use super::layers::refuse_other_set;
use super::link;
use super::placement::{refresh_unit, store_path};
use super::set::{SnapshotSet, read_of};
use super::settle::{Settlement, settle_first};
use crate::base::{Bytes, DeviceNumber, Error, Result, clock};
use crate::dm::Dm;
use crate::dm::naming::new_id;
use crate::format::state::{SnapshotGroupRecord, SnapshotRecord, SnapshotState, SubsetRecord};
use crate::job::Job;
use crate::op::admission::{Admission, WAITING_FOR_OTHERS};
use crate::progress::{Event, Observer};
use crate::stack::hooks::{AroundInstant, Deadline, Hook};
use crate::stack::kept::{self, Capture, CaptureRequest};
use crate::stack::watchdog::Standby;
use crate::stack::{HoldTimes, InstantContext, Skipped};
use crate::store::size;
use crate::sys::process::crash_point;
use crate::volume::subset::{Selector, Subset};

/// What was created. Serialized for `--json`: one snapshot as itself, several as a group.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum CreateReport {
    /// The snapshot of one volume.
    One(Created),
    /// The snapshots of several volumes.
    Group(CreatedGroup),
}

/// Snapshots of several volumes with one instant.
#[derive(Clone, Debug, Serialize)]
pub struct CreatedGroup {
    /// The id that they share, as `snapshot list` shows it.
    pub group: String,
    /// The instant.
    pub instant: Option<String>,
    /// Milliseconds from the first freeze to the last thaw.
    pub frozen_ms: u64,
    /// Milliseconds from the first suspension to the last resume.
    pub suspended_ms: u64,
    /// One for each volume, in the order of the command line.
    pub snapshots: Vec<Created>,
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
    /// Bytes that it leaves out, which read as zeros; None if everything was wanted.
    pub left_out_bytes: Option<Bytes>,
    /// Why it leaves out less than it was to.
    pub left_out_notes: Vec<String>,
    /// Milliseconds for which the filesystems were frozen.
    pub frozen_ms: u64,
    /// Milliseconds for which the volume was suspended.
    pub suspended_ms: u64,
    /// The command that mounts it.
    pub next: String,
}

/// One volume of the plan while its snapshot is created.
struct Member<'a> {
    plan: &'a CreatePlan,
    /// Locked until the end.
    set: SnapshotSet,
    /// The snapshot's id.
    id: String,
    /// What it leaves out, from the instant on.
    left_out: Skipped,
}

/// What was not created, and what that leaves.
enum Stop {
    /// Everything is to be put back.
    Undo(Error),
    /// The snapshots exist, or it is not known whether they do: the next command decides.
    Leave(Error),
}

/// Executes the plan.
///
/// # Errors
/// The first failure; then there is no snapshot of any volume, and the volumes are as they were, unless the error says
/// that the snapshots exist.
pub fn run(
    plan: &GroupPlan,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<CreateReport> {
    let dm = Dm::open()?;
    let numbers: Vec<DeviceNumber> = plan.snapshots.iter().map(|one| one.number).collect();
    let mut job = Job::begin_for_origins("snapshot create", &numbers)
        .map_err(|error| error.state("nothing was changed"))?;
    let result = create(&dm, plan, &mut job, observer, interrupt);
    job.conclude(result)
}

fn create(
    dm: &Dm,
    plan: &GroupPlan,
    job: &mut Job,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<CreateReport> {
    let note = |text: &str| observer.event(&Event::Note { text: text.to_owned() });
    let admission = Admission::enter(&|| note(WAITING_FOR_OTHERS), interrupt)?;
    check_places(dm, &plan.snapshots)?;
    let group = (plan.snapshots.len() > 1).then(new_id);
    let mut members = Vec::new();
    let origins = plan.origins();
    let around = AroundInstant {
        variables: &[("TIDEMARK_ORIGINS", &origins)],
        ..plan.hooks().around(&plan.snapshots[0].origin.path)
    };
    let taken = open(dm, plan, &mut members, job, interrupt)
        .and_then(|()| take(dm, (plan, &around), &mut members, group.as_deref(), job, interrupt))
        .map_err(Stop::Undo)
        .and_then(|times| commit(&mut members, group.as_deref(), times).map(|()| times));
    drop(admission);
    // At once, whatever became of the instant: applications may be waiting for it.
    if let Err(error) = around.after(interrupt) {
        observer.event(&Event::Warning { text: error.to_string() });
    }
    let times = match taken {
        Ok(times) => times,
        Err(Stop::Leave(error)) => return Err(error),
        Err(Stop::Undo(error)) => {
            let settle = |error: Error, member: Member<'_>| {
                let undo = Settlement {
                    dm,
                    set: member.set,
                    journal: &mut *job,
                    interrupt: &|| Ok(()),
                    done: Vec::new(),
                };
                error.after_undo(undo.settle().map(drop))
            };
            return Err(members.into_iter().fold(error, settle));
        }
    };
    observer.event(&Event::Instant {
        utc_ns: times.instant_utc_ns,
        frozen: times.frozen,
        suspended: times.suspended,
    });
    let mut snapshots = Vec::new();
    let mut failures = Vec::new();
    for mut member in members {
        if let Err(error) =
            link::note_mounts(dm, &mut member.set).and_then(|()| refresh_unit(member.set.record()))
        {
            observer.event(&Event::Warning { text: error.to_string() });
        }
        for note in &member.left_out.omission_notes {
            observer.event(&Event::Warning { text: note.clone() });
        }
        snapshots.push(member.created(times));
        let settlement =
            Settlement { dm, set: member.set, journal: &mut *job, interrupt: &|| Ok(()), done: Vec::new() };
        failures.extend(settlement.settle().err());
    }
    Error::first_of(failures).map_err(|error| error.state(format!("{} and valid", exist(plan))))?;
    Ok(match group {
        None => CreateReport::One(snapshots.remove(0)),
        Some(group) => CreateReport::Group(CreatedGroup {
            group,
            instant: clock::utc_text(times.instant_utc_ns),
            frozen_ms: millis(times.frozen),
            suspended_ms: millis(times.suspended),
            snapshots,
        }),
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// "data@1 exists", "data@1, wal@1 exist".
fn exist(plan: &GroupPlan) -> String {
    let names: Vec<String> =
        plan.snapshots.iter().map(|plan| format!("{}@{}", plan.volume, plan.name)).collect();
    format!("{} {}", names.join(", "), if names.len() == 1 { "exists" } else { "exist" })
}

/// Finds or creates the set of each volume, and checks what another command may have changed since the plan was made.
fn open<'a>(
    dm: &Dm,
    plan: &'a GroupPlan,
    members: &mut Vec<Member<'a>>,
    job: &mut Job,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<()> {
    for plan in &plan.snapshots {
        refuse_other_set(dm, &plan.volume, read_of(&plan.volume)?.as_ref())?;
        let set = match SnapshotSet::find(&plan.volume, interrupt)? {
            // What a command that died has left is completed first.
            Some(set) => settle_first(dm, set, &mut *job, interrupt)?,
            None => None,
        };
        let set = match set {
            Some(set) => set,
            None => SnapshotSet::create(&plan.volume, &plan.device, plan.origin.size, plan.chunk)?,
        };
        members.push(Member { plan, set, id: new_id(), left_out: Skipped::default() });
    }
    for Member { plan, set, .. } in members.iter() {
        set.record().refuse_rollback()?;
        check_free(Some(set.record()), &plan.name, &plan.volume)?;
        choose_chunk(Some(set.record()), Some(plan.chunk), &plan.volume)?;
        if Bytes(set.record().size_bytes) != plan.origin.size {
            return Err(Error::refused(format!(
                "{} was resized since its snapshots were created",
                plan.volume
            ))
            .state("nothing was changed")
            .next("delete the snapshots of its former size first"));
        }
    }
    Ok(())
}

/// Steps 1 to 3 at the head of this module.
fn take(
    dm: &Dm,
    (plan, around): (&GroupPlan, &AroundInstant<'_>),
    members: &mut [Member<'_>],
    group: Option<&str>,
    job: &mut Job,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<HoldTimes> {
    for member in members.iter_mut() {
        member.record_unfinished(group)?;
        crash_point("snapshot.create.recorded");
    }
    let standby = Standby::start(job.id());
    let mut captures = Vec::new();
    for member in members.iter() {
        captures.push(member.create_store(dm)?);
    }
    around.before(interrupt)?;
    let request = CaptureRequest {
        captures,
        planned: plan.frozen.clone(),
        budget: plan.snapshots[0].request.freeze_budget,
    };
    let mut at_instant = |instant: &InstantContext<'_>| match &plan.hooks().frozen {
        None => Ok(()),
        Some(command) => Hook {
            option: "--hook-frozen",
            command,
            origin: around.origin,
            below: None,
            deadline: Some(Deadline { at: instant.deadline, option: "--freeze-budget" }),
            variables: around.variables,
        }
        .run(interrupt),
    };
    let captured = kept::run(dm, job, &request, &standby, &mut at_instant, interrupt)?;
    crash_point("snapshot.create.taken");
    for (member, left_out) in members.iter_mut().zip(captured.left_out) {
        member.record_left_out(left_out)?;
    }
    Ok(captured.times)
}

/// Step 4 at the head of this module.
fn commit(members: &mut [Member<'_>], group: Option<&str>, times: HoldTimes) -> Result<(), Stop> {
    let Some(group) = group else {
        return members.iter_mut().try_for_each(|member| member.record_kept(times)).map_err(Stop::Undo);
    };
    let record = SnapshotGroupRecord {
        id: group.to_owned(),
        instant_utc_ns: times.instant_utc_ns,
        snapshots: members.iter().map(Member::name).collect(),
    };
    let names = record.snapshots.join(", ");
    group::commit(&record).map_err(|uncommitted| match uncommitted {
        Uncommitted::No(error) => Stop::Undo(error),
        Uncommitted::Unknown(error) => Stop::Leave(
            error.state(format!("it is not known whether {names} exist: all of them do, or none does")).next(
                "mend the filesystem of /var/lib/tidemark, then run 'tidemark recover', which decides it",
            ),
        ),
    })?;
    crash_point("snapshot.group.committed");
    let recorded = members.iter_mut().try_for_each(|member| member.record_kept(times));
    recorded.map_err(|error| {
        Stop::Leave(
            error
                .state(format!("{names} exist, and are not in use yet"))
                .next("run 'tidemark recover', which completes them"),
        )
    })?;
    if let Err(error) = group::close(group) {
        tracing::warn!("{error}; 'tidemark recover' removes this record, which is not needed any more");
    }
    crash_point("snapshot.group.closed");
    Ok(())
}

impl Member<'_> {
    fn name(&self) -> String {
        format!("{}@{}", self.plan.volume, self.plan.name)
    }

    /// Step 1.
    fn record_unfinished(&mut self, group: Option<&str>) -> Result<()> {
        let snapshot = SnapshotRecord {
            name: self.plan.name.clone(),
            id: self.id.clone(),
            instant_utc_ns: 0,
            store: store_path(&self.plan.directory, (&self.plan.volume, &self.plan.name), &self.id),
            store_bytes_max: size::worst_case(self.plan.origin.size, self.plan.chunk)?.get(),
            state: SnapshotState::Creating,
            lost: None,
            clone_of: None,
            group: group.map(str::to_owned),
            subset: None,
        };
        self.set.change(|record| {
            record.snapshots.push(snapshot);
            // What the device held when it was detached proves nothing from here on.
            record.detached = None;
        })
    }

    /// Step 2. Returns what the instant needs.
    fn create_store(&self, dm: &Dm) -> Result<Capture> {
        let record = self.set.record();
        let snapshot = record.snapshots.iter().find(|snapshot| snapshot.id == self.id);
        let store = record.store(snapshot.expect("it was recorded in step 1"))?;
        store.create_file(self.plan.store_bytes)?;
        crash_point("snapshot.create.file");
        let number = store.show(dm)?;
        crash_point("snapshot.create.store");
        Ok(Capture {
            volume: self.plan.volume.clone(),
            set: record.id.clone(),
            snapshot: self.plan.name.clone(),
            id: self.id.clone(),
            store: number,
            chunk: self.plan.chunk,
            omission: self.plan.omitted.as_ref().map(|omitted| Arc::clone(&omitted.omission)),
            left_out_by_older: record.left_out_by_all(),
        })
    }

    /// Records what is left out, before anything makes the snapshot exist: whichever command completes it has to know.
    /// A snapshot that leaves out nothing is one of everything.
    fn record_left_out(&mut self, left_out: Skipped) -> Result<()> {
        self.left_out = left_out;
        let ranges = self.left_out.extents.iter().map(|extent| (extent.start().get(), extent.end().get()));
        let left_out: Vec<(u64, u64)> = ranges.collect();
        if left_out.is_empty() {
            return Ok(());
        }
        let Subset { include, exclude } = &self.plan.request.subset;
        let text = |selectors: &[Selector]| selectors.iter().map(ToString::to_string).collect();
        let subset = SubsetRecord { include: text(include), exclude: text(exclude), left_out };
        self.set.change_one(&self.id, |snapshot| snapshot.subset = Some(subset))?;
        crash_point("snapshot.create.left-out");
        Ok(())
    }

    fn record_kept(&mut self, times: HoldTimes) -> Result<()> {
        self.set.change_one(&self.id, |snapshot| {
            snapshot.instant_utc_ns = times.instant_utc_ns;
            snapshot.state = SnapshotState::Kept;
        })?;
        crash_point("snapshot.create.kept");
        Ok(())
    }

    fn created(&self, times: HoldTimes) -> Created {
        let snapshot = self.name();
        let store = self.set.record().named(&self.plan.name).map(|snapshot| PathBuf::from(&snapshot.store));
        Created {
            path: crate::dm::node::mapper_path(&snapshot),
            instant: clock::utc_text(times.instant_utc_ns),
            store: store.unwrap_or_default(),
            store_bytes: self.plan.store_bytes,
            left_out_bytes: self.left_out.omitted,
            left_out_notes: self.left_out.omission_notes.clone(),
            frozen_ms: millis(times.frozen),
            suspended_ms: millis(times.suspended),
            next: format!("tidemark snapshot mount {snapshot} DIR"),
            snapshot,
        }
    }
}
