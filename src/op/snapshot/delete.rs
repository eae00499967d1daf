//! `tidemark snapshot delete`: deletes snapshots, whichever of a volume's they are.

use serde::Serialize;

use super::layers;
use super::set::{find_existing, parse_name, read_existing, read_of};
use super::settle::Settlement;
use crate::base::{Error, Result};
use crate::dm::{DeviceInfo, Dm};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord, SnapshotState};
use crate::job::Job;
use crate::sys::privilege::require_root;
use crate::sys::process::crash_point;
use crate::topology::Topology;

/// The plan of a deletion. Serialized for `--dry-run --json`.
#[derive(Clone, Debug, Serialize)]
pub struct DeletePlan {
    /// The volume.
    pub volume: String,
    /// The snapshots, as VOLUME@NAME.
    pub snapshots: Vec<String>,
    #[serde(skip)]
    names: Vec<String>,
}

/// The result of a deletion.
#[derive(Clone, Debug, Serialize)]
pub struct Deleted {
    /// The snapshots, as VOLUME@NAME.
    pub snapshots: Vec<String>,
    /// What was done, in words.
    pub done: Vec<String>,
    /// Deleted snapshots whose stores still receive originals for older ones.
    pub retired: Vec<String>,
}

/// Makes the plan. All snapshots are of one volume.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for a bad name;
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a snapshot that does not exist or is in use.
pub fn plan(snapshots: &[String]) -> Result<DeletePlan> {
    require_root("deleting a snapshot")?;
    let mut names = Vec::new();
    let mut volumes = Vec::new();
    for snapshot in snapshots {
        let (volume, name) = parse_name(snapshot)?;
        volumes.push(volume.to_owned());
        names.push(name.to_owned());
    }
    volumes.dedup();
    let [volume] = &volumes[..] else {
        return Err(
            Error::usage("the snapshots are of different volumes").next("delete those of each volume apart")
        );
    };
    check(&Dm::open()?, &read_existing(volume)?, &names)?;
    Ok(DeletePlan { volume: volume.clone(), snapshots: snapshots.to_vec(), names })
}

/// Refuses snapshots that do not exist or are in use.
fn check(dm: &Dm, record: &SnapshotSetRecord, names: &[String]) -> Result<()> {
    for name in names {
        let shown = format!("{}@{name}", record.volume);
        let snapshot = record.existing(name)?;
        let device = record.names(snapshot).snapshot;
        if let Some(info) = dm.info(device.as_str())?.filter(|info| info.open_count > 0) {
            return Err(in_use(&shown, &info)?);
        }
        if let Some(rollback) = &record.rollback {
            // Older ones are not needed for it.
            let place = |id: &str| record.snapshots.iter().position(|snapshot| snapshot.id == id);
            if snapshot.clone_of.is_none() && place(&snapshot.id) >= place(&rollback.snapshot) {
                let cancel =
                    "a rollback that is only planned is cancelled by 'tidemark snapshot rollback --cancel'";
                return record.refuse_rollback().and(Err(Error::refused(format!(
                    "a rollback of {} that needs {shown} is planned",
                    record.volume
                ))
                .state("nothing was changed")
                .next(cancel)));
            }
        }
        let left = |clone: &&SnapshotRecord| clone.state.is_visible() && !names.contains(&clone.name);
        if let Some(clone) = record.clones_of(&snapshot.id).find(left) {
            return Err(Error::refused(format!("{shown} has the clone {}@{}", record.volume, clone.name))
                .state("nothing was changed")
                .next("delete the clone first, or both with one command"));
        }
    }
    Ok(())
}

/// The refusal for a snapshot that is in use.
pub(super) fn in_use(shown: &str, info: &DeviceInfo) -> Result<Error> {
    let topology = Topology::default();
    let mount = topology.mounts()?.into_iter().find(|mount| mount.is_of(info.number));
    Ok(match mount {
        Some(mount) => Error::refused(format!("{shown} is mounted at {}", mount.point.display()))
            .state("nothing was changed")
            .next(format!("umount {}", mount.point.display())),
        None => Error::refused(format!("{shown} is open"))
            .state("nothing was changed")
            .next(format!("find its users: fuser -v /dev/mapper/{shown}")),
    })
}

/// Executes the plan.
///
/// # Errors
/// The first failure. A deletion that has begun is continued by the next command or `recover`; every other snapshot
/// stays right.
pub fn run(plan: &DeletePlan, interrupt: &dyn Fn() -> Result<()>) -> Result<Deleted> {
    let dm = Dm::open()?;
    let number = dm.info(plan.volume.as_str())?.map(|info| info.number);
    let numbers: Vec<_> = number.into_iter().collect();
    let mut job = Job::begin_for_origins("snapshot delete", &numbers)
        .map_err(|error| error.state("nothing was changed"))?;
    let result = delete(&dm, plan, &mut job, interrupt);
    job.conclude(result)
}

fn delete(dm: &Dm, plan: &DeletePlan, job: &mut Job, interrupt: &dyn Fn() -> Result<()>) -> Result<Deleted> {
    let mut set = find_existing(&plan.volume, interrupt)?;
    check(dm, set.record(), &plan.names)?;
    let is_attached = layers::keep(dm, set.record())?.is_some();
    let of_plan = |name: &String| plan.names.contains(name);
    if !is_attached
        && set.record().linked().iter().any(|snapshot| of_plan(&snapshot.name))
        && set.record().linked().iter().any(|snapshot| !of_plan(&snapshot.name))
    {
        return Err(Error::refused(format!(
            "{} is not attached, and its other snapshots may need these",
            plan.volume
        ))
        .state("nothing was changed")
        .next(format!("attach {} first", plan.volume)));
    }
    set.change(|record| {
        for snapshot in record.snapshots.iter_mut().filter(|snapshot| of_plan(&snapshot.name)) {
            snapshot.state = match snapshot.state {
                // Nothing is read through a clone.
                SnapshotState::Kept if is_attached && snapshot.clone_of.is_none() => SnapshotState::Deleting,
                SnapshotState::Kept | SnapshotState::Detached => SnapshotState::Unlinked,
                state => state,
            };
        }
    })?;
    crash_point("snapshot.delete.recorded");
    let settlement = Settlement { dm, set, journal: job, interrupt, done: Vec::new() };
    let done = settlement.settle().map_err(|error| {
        error.state("the deletion is recorded and not complete; the other snapshots are right")
    })?;
    let left = read_of(&plan.volume)?;
    let retired =
        left.iter().flat_map(|set| &set.snapshots).filter(|one| one.state == SnapshotState::Retired);
    let retired = retired.map(|snapshot| format!("{}@{}", plan.volume, snapshot.name)).collect();
    Ok(Deleted { snapshots: plan.snapshots.clone(), done, retired })
}
