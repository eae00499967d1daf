//! `tidemark snapshot rollback`: a volume shows what it held at a snapshot's instant, and goes on from there.
//!
//! The volume is removed, which the kernel refuses while it is in use; the [`merge`] is set up below it;
//! and it is made again, under the same UUID. From then on it can be used, and the kernel merges in the background. The
//! command waits for the end, but is not needed for it: the monitor, `recover`, and the next command for the volume's
//! snapshots end the merge too.
//!
//! If the command dies while the volume does not exist, `attach` makes it: as it was, or with the merge.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::delete::in_use;
use super::link;
use super::list::{SnapshotView, check_valid};
use super::merge::{self, Beginning};
use super::placement::choose_place;
use super::set::{find_existing, parse_name, read_existing, read_of};
use super::settle::{find_settled, settle_if_idle};
use crate::base::{Bytes, Error, Result, directory_of};
use crate::dm::{Dm, Udev, node};
use crate::format::state::{RollbackState, SnapshotRecord, SnapshotSetRecord};
use crate::job::{self, Job};
use crate::op::admission::{Admission, Question, WAITING_FOR_OTHERS};
use crate::sys::privilege::require_root;
use crate::sys::process::crash_point;

/// Interval between two looks at a merge.
const POLL: Duration = Duration::from_millis(100);

/// Steps in which progress is reported, per cent.
const STEP: u64 = 10;

/// The arguments of `tidemark snapshot rollback`.
#[derive(Clone, Debug, Serialize)]
pub struct RollbackRequest {
    /// The snapshot, as VOLUME@NAME.
    pub snapshot: String,
    /// Roll back when the volume is attached next.
    pub at_attach: bool,
    /// Bytes of originals that may be caused while the snapshot is merged; None: all that the volume can need.
    pub reserve: Option<Bytes>,
    /// The directory for the files of the rollback; None: that of the snapshot's store.
    pub store: Option<PathBuf>,
    /// Do not wait for the end of the merge.
    pub no_wait: bool,
}

/// The plan of a rollback. Serialized for `--dry-run --json`.
#[derive(Clone, Debug, Serialize)]
pub struct RollbackPlan {
    /// The user's request.
    pub request: RollbackRequest,
    /// The volume.
    pub volume: String,
    /// The directory for the files of the rollback.
    pub directory: PathBuf,
    /// The snapshot's instant.
    pub instant: Option<String>,
}

/// A rollback.
#[derive(Clone, Debug, Serialize)]
pub struct RolledBack {
    /// The snapshot, as VOLUME@NAME.
    pub snapshot: String,
    /// The volume's device.
    pub path: PathBuf,
    /// False while the snapshot is still being merged, or the rollback is only planned.
    pub complete: bool,
    /// What comes next, if it is not complete.
    pub next: Option<String>,
}

/// Makes the plan. Changes nothing.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a snapshot that does not exist or does not show its
/// instant, and for a volume that is in use; the kernel's.
pub fn plan(request: &RollbackRequest) -> Result<RollbackPlan> {
    require_root("rolling back a volume")?;
    let dm = Dm::open()?;
    let (volume, _) = parse_name(&request.snapshot)?;
    let record = read_existing(volume)?;
    let (snapshot, view) = check(&dm, &record, &request.snapshot)?;
    let info = dm.info_of(volume)?;
    job::refuse_held_origin(info.number)?;
    if !request.at_attach && info.open_count > 0 {
        return Err(in_use(volume, &info)?.next(at_attach(&request.snapshot)));
    }
    let beside = directory_of(Path::new(&snapshot.store)).to_owned();
    let directory = request.store.as_deref().unwrap_or(&beside);
    Ok(RollbackPlan {
        directory: choose_place(&Question::of(&dm, info.number)?, Some(directory))?,
        request: request.clone(),
        volume: volume.to_owned(),
        instant: view.instant,
    })
}

fn at_attach(snapshot: &str) -> String {
    format!(
        "a volume that cannot be unmounted is rolled back when it is attached next, at boot: 'tidemark snapshot rollback \
         {snapshot} --at-attach'"
    )
}

/// The snapshot `shown`, which must show its instant. No other rollback may be planned or in progress.
fn check(dm: &Dm, record: &SnapshotSetRecord, shown: &str) -> Result<(SnapshotRecord, SnapshotView)> {
    record.refuse_rollback()?;
    let (_, name) = parse_name(shown)?;
    let snapshot = record.existing(name)?;
    if snapshot.clone_of.is_some() {
        return Err(Error::refused(format!("{shown} is a clone: a volume is rolled back to a snapshot"))
            .state("nothing was changed")
            .next("copy the clone onto the volume instead"));
    }
    if snapshot.subset.is_some() {
        return Err(Error::refused(format!(
            "{shown} is a snapshot of a subset: what it leaves out would be zeros on the volume"
        ))
        .state("nothing was changed")
        .next(format!(
            "put back files that it holds: 'tidemark snapshot rollback {shown} --only PATH'; or choose a snapshot of \
             everything"
        )));
    }
    Ok((snapshot.clone(), check_valid(dm, record, shown)?))
}

/// Executes the plan.
///
/// # Errors
/// The first failure. If the merge had not begun, the volume is as it was.
pub fn run(
    plan: &RollbackPlan,
    notice: &dyn Fn(&str),
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<RolledBack> {
    let dm = Dm::open()?;
    let number = dm.info_of(plan.volume.as_str())?.number;
    let mut job = Job::begin_for_origins("snapshot rollback", &[number])
        .map_err(|error| error.state("nothing was changed"))?;
    let result = switch(&dm, plan, &mut job, notice, interrupt);
    job.conclude(result)?;
    let snapshot = plan.request.snapshot.clone();
    let path = node::mapper_path(&plan.volume);
    if plan.request.at_attach {
        let next = format!(
            "the volume is rolled back when it is attached next; 'tidemark snapshot rollback {snapshot} \
                            --cancel' cancels that"
        );
        return Ok(RolledBack { snapshot, path, complete: false, next: Some(next) });
    }
    notice(&format!("{} shows {snapshot}, and can be used", path.display()));
    let complete = !plan.request.no_wait && wait(&dm, &plan.volume, &snapshot, notice, interrupt)?;
    let next = "the merge goes on in the kernel; the monitor, 'tidemark recover' or the next command for the volume's \
                snapshots ends it";
    Ok(RolledBack { snapshot, path, complete, next: (!complete).then(|| next.to_owned()) })
}

/// Lets the volume show the snapshot, or records that this is to be done.
fn switch(
    dm: &Dm,
    plan: &RollbackPlan,
    job: &mut Job,
    notice: &dyn Fn(&str),
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let _admission = Admission::enter(&|| notice(WAITING_FOR_OTHERS), interrupt)?;
    let mut set = find_settled(dm, &plan.volume, job, interrupt)?;
    let (snapshot, _) = check(dm, set.record(), &plan.request.snapshot)?;
    let beginning =
        Beginning { snapshot: snapshot.id, directory: plan.directory.clone(), reserve: plan.request.reserve };
    if plan.request.at_attach {
        return merge::plan(&mut set, &beginning);
    }
    let info = dm.info_of(plan.volume.as_str())?;
    if dm.stack_under(&plan.volume)?.is_some() {
        return Err(Error::refused(format!("{} is being copied", plan.volume)).state("nothing was changed"));
    }
    let (record, names) = (set.record().clone(), set.record().volume_names());
    dm.remove(&plan.volume, Udev::Public).or_else(|error| match error.errno() {
        Some(libc::EBUSY) => Err(in_use(&plan.volume, &info)?.next(at_attach(&plan.request.snapshot))),
        _ => Err(error),
    })?;
    crash_point("snapshot.rollback.removed");
    // An earlier plan is replaced by this rollback.
    let begun = set.change(|record| record.rollback = None);
    let begun = begun.and_then(|()| merge::begin(dm, &mut set, &beginning, interrupt));
    drop(set);
    crash_point("snapshot.rollback.begun");
    let made = dm.active_table(&names.data).and_then(|own| {
        let table = link::assemble(dm, &plan.volume, Path::new(&record.device), &own)?;
        dm.create_active(&plan.volume, &info.uuid, &table.unwrap_or(own), Udev::Public)
    });
    let made = made.map_err(|error| {
        error
            .state(format!("{} is not attached", plan.volume))
            .next(format!("tidemark attach {} --name {}", record.device, plan.volume))
    });
    crash_point("snapshot.rollback.made");
    match begun {
        Ok(()) => made.map(drop),
        Err(error) => {
            let error = error.context(format!("rolling back {}", plan.volume));
            Err(error.after_undo(made.map(drop)).state("the volume is as it was"))
        }
    }
}

/// Waits for the end of the merge. False if `interrupt` ended the wait.
fn wait(
    dm: &Dm,
    volume: &str,
    snapshot: &str,
    notice: &dyn Fn(&str),
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<bool> {
    let mut reported = 0;
    loop {
        let Some(record) = read_of(volume)?.filter(|record| record.rolling_back().is_some()) else {
            return Ok(true);
        };
        if merge::needs_attention(dm, &record)? {
            settle_if_idle(dm, &record.id)?;
        }
        let target = record.snapshots.iter().find(|one| format!("{volume}@{}", one.name) == snapshot);
        let percent = target.map(|target| merge::percent(dm, &record, target)).transpose()?.flatten();
        if let Some(percent) = percent.filter(|percent| *percent >= reported + STEP) {
            reported = percent / STEP * STEP;
            notice(&format!("{percent} % merged"));
        }
        if interrupt().is_err() {
            return Ok(false);
        }
        thread::sleep(POLL);
    }
}

/// Cancels a rollback that is only planned.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if none is, or it has begun; I/O errors.
pub fn cancel(name: &str, interrupt: &dyn Fn() -> Result<()>) -> Result<RolledBack> {
    require_root("cancelling a rollback")?;
    let (volume, _) = parse_name(name)?;
    let mut set = find_existing(volume, interrupt)?;
    set.record().refuse_rollback()?;
    let is_of = |record: &SnapshotSetRecord| {
        let rollback = record.rollback.as_ref().filter(|rollback| rollback.state == RollbackState::Planned);
        rollback.is_some_and(|rollback| {
            let target = record.snapshots.iter().find(|one| one.id == rollback.snapshot);
            target.is_some_and(|target| format!("{volume}@{}", target.name) == name)
        })
    };
    if !is_of(set.record()) {
        return Err(Error::refused(format!("no rollback to {name} is planned")).state("nothing was changed"));
    }
    set.change(|record| record.rollback = None)?;
    let next = Some("the rollback is cancelled; nothing else was changed".to_owned());
    Ok(RolledBack { snapshot: name.to_owned(), path: node::mapper_path(volume), complete: false, next })
}
