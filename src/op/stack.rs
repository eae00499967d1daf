//! The snapshot stack over a live origin: put in place at one instant, taken away again.
//!
//! Insertion, in order (each a step with its undo; see [`insertion`]):
//! 1. `real` gets a copy of the origin's own table, `snap` becomes a snapshot of `real` with the COW
//!    store: both in use *before* anything is held, for writes do not pass an origin target yet;
//! 2. filesystems are synced, then frozen;
//! 3. `snapshot-origin` over `real` is loaded into the origin, not used yet: `linear` where the frozen
//!    filesystems say that nothing is in use (their map can be read only while the device answers);
//! 4. the origin is suspended: the instant;
//! 5. the origin is resumed, which puts the loaded table to use; filesystems are thawed.
//!
//! Invariants: the origin is the only device ever suspended; nothing waits for udev between the
//! freeze and the thaw; nothing is logged meanwhile; a failure anywhere puts the origin's own table
//! back, the very text. A copy of that table is in `real` as long as the stack is in place, so the
//! kernel alone is enough to undo it ([`recover`](super::recover)).

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::base::clock::{self, Stopwatch};
use crate::base::{Bytes, ChunkSize, DeviceNumber, Error, ErrorKind, Result, ResultExt, Sectors};
use crate::dm::naming::{ROLE_REAL, ROLE_SNAP, beside};
use crate::dm::origin_table::{LineLimits, is_over, origin_table, preserved};
use crate::dm::{
    Action, AtBest, Change, DeviceIdentity, Dm, Executor, Slot, SnapshotStatus, Step, Table, Target,
    Template, Udev, node,
};
use crate::extent::free::{FreeLimits, skippable};
use crate::extent::{Extent, ExtentSet};
use crate::sys::process::crash_point;
use crate::sys::{freeze, process};
use crate::volume::free::{FreeMapper, Picture};

use super::job::Job;
use super::watchdog::{Order, Verdict, Watchdog, budget_ran_out};

/// Attempts to put the origin's own table back when the watchdog intervenes.
const RESTORE_ATTEMPTS: u32 = 3;

/// The steps of an insertion, in order: with `insert.` before and `.before`, `.after` behind, the
/// names of its crash points.
pub const INSERT_STEPS: [&str; 15] = [
    "create-real",
    "load-real",
    "resume-real",
    "create-snap",
    "load-snap",
    "resume-snap",
    "guard",
    "freeze",
    "load-origin",
    "suspend",
    "instant",
    "switch",
    "thaw",
    "unguard",
    "expect",
];
/// The steps of putting the origin's table back (`restore.`).
pub const RESTORE_STEPS: [&str; 6] = ["load-own", "guard", "suspend", "switch", "unguard", "expect"];
/// The steps of removing the devices beneath (`dismantle.`).
pub const DISMANTLE_STEPS: [&str; 2] = ["remove-snap", "remove-real"];

/// What to put where.
#[derive(Clone, Debug)]
pub struct StackRequest {
    /// The origin's device-mapper name.
    pub origin: String,
    /// The COW store's device, its first chunk zeroed.
    pub cow: DeviceNumber,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// Mount points of every filesystem on the origin, one each, in the order of freezing.
    pub filesystems: Vec<PathBuf>,
    /// Let the suspension freeze what is mounted on the device itself: for mounts that cannot be
    /// reached.
    pub lock_filesystem: bool,
    /// Longest time that anything may be frozen or suspended.
    pub budget: Duration,
    /// Preserve everything, what filesystems do not use as well.
    pub all: bool,
}

/// What can be done at the instant.
#[derive(Clone, Copy, Debug)]
pub struct InstantContext<'a> {
    /// The device beneath: can be read, and does not change before the origin is resumed.
    pub below: &'a Path,
    /// The instant, UTC, in nanoseconds since 1970.
    pub utc_ns: u64,
    /// When the budget ends.
    pub deadline: Instant,
}

/// How long the origin was held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldTimes {
    /// Syncing filesystems, nothing held yet.
    pub synced: Duration,
    /// From the first freeze to the last thaw.
    pub frozen: Duration,
    /// From the suspension's begin to the resume's end.
    pub suspended: Duration,
    /// The instant, UTC, in nanoseconds since 1970.
    pub instant_utc_ns: u64,
}

/// What of the origin need not be preserved, because at the instant nothing there was in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// The ranges; sorted, disjoint.
    pub extents: Vec<Extent>,
    /// Which filesystems did not say what they use, and why; for people.
    pub notes: Vec<String>,
}

/// What the kernel does not know of a stack whose process died.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// What is not copied.
    pub skipped: Skipped,
    /// Longest time that the origin may be suspended.
    pub budget: Duration,
    /// How long it was held for the instant.
    pub times: HoldTimes,
}

/// A stack in place. Dropping it does nothing, [`Stack::remove`] takes it away.
#[derive(Clone, Debug)]
pub struct Stack {
    origin: String,
    real: String,
    snap: String,
    own_table: Table,
    /// The device beneath.
    number: DeviceNumber,
    /// The table that the origin has now by our doing; held while it is being replaced.
    current: Arc<Mutex<Table>>,
    skipped: Skipped,
    below: PathBuf,
    budget: Duration,
    times: HoldTimes,
}

/// The plan of an insertion: the very value that [`Stack::insert`] runs.
#[must_use]
pub fn insertion(request: &StackRequest, own_table: &Table, id: &str) -> Change {
    let origin = request.origin.as_str();
    let real = beside(origin, ROLE_REAL, id);
    let snap = beside(origin, ROLE_SNAP, id);
    let length = own_table.length().get();
    let uuid = |role| DeviceIdentity::new(origin, role, id).uuid();
    let snap_table =
        format!("0 {length} snapshot {{{real}}} {} PO {}", request.cow, request.chunk.sectors().get());
    let step = |name: &str, action| Step::new(name, action);
    let filesystems = request.filesystems.clone();
    Change::new("insert")
        .then(
            step("create-real", Action::Create { device: real.clone(), uuid: uuid(ROLE_REAL) })
                .undo(Action::Remove { device: real.clone(), udev: Udev::Internal }),
        )
        .then(step("load-real", Action::Load { device: real.clone(), table: own_table.into() }))
        .then(step("resume-real", Action::Resume { device: real.clone(), udev: Udev::Internal }))
        .then(
            step("create-snap", Action::Create { device: snap.clone(), uuid: uuid(ROLE_SNAP) })
                .undo(Action::Remove { device: snap.clone(), udev: Udev::Internal }),
        )
        .then(step("load-snap", Action::Load { device: snap.clone(), table: Template::new(snap_table) }))
        .then(step("resume-snap", Action::Resume { device: snap, udev: Udev::Internal }))
        .then(step("guard", guard(origin, &filesystems)).undo(Action::Dismiss))
        .then(
            step("freeze", Action::Freeze { filesystems: filesystems.clone() })
                .undo(Action::Thaw { filesystems: filesystems.clone() }),
        )
        .then(
            step("load-origin", Action::LoadOver { device: origin.to_owned(), over: real })
                .undo(Action::Clear { device: origin.to_owned() }),
        )
        .then(
            step("suspend", suspend(origin, true, request.lock_filesystem))
                .undo(Action::Clear { device: origin.to_owned() })
                .undo(resume(origin)),
        )
        .then(step("instant", Action::Instant))
        .then(undo_switch(step("switch", resume(origin)), origin, own_table, &filesystems))
        .then(step("thaw", Action::Thaw { filesystems }))
        .then(step("unguard", Action::Unguard))
        .then(step("expect", Action::ExpectOver { device: origin.to_owned() }))
}

/// Once the origin uses the new table, going back is a reload of its own, under a watchdog of its
/// own (the first one may have fired: that may be why we go back).
/// Filesystems first, while the watchdog that knows of them still stands.
fn undo_switch(step: Step, origin: &str, own_table: &Table, filesystems: &[PathBuf]) -> Step {
    step.undo(Action::Thaw { filesystems: filesystems.to_vec() })
        .undo(Action::Dismiss)
        .undo(guard(origin, &[]))
        .undo(Action::Load { device: origin.to_owned(), table: own_table.into() })
        .undo(suspend(origin, false, false))
        .undo(resume(origin))
        .undo(Action::Dismiss)
}

/// The plan of putting the origin's own table back.
#[must_use]
pub fn restoration(origin: &str, own_table: &Table) -> Change {
    let clear = Action::Clear { device: origin.to_owned() };
    Change::new("restore")
        .then(
            Step::new("load-own", Action::Load { device: origin.to_owned(), table: own_table.into() })
                .undo(clear.clone()),
        )
        .then(Step::new("guard", guard(origin, &[])).undo(Action::Dismiss))
        .then(Step::new("suspend", suspend(origin, false, false)).undo(clear).undo(resume(origin)))
        .then(Step::new("switch", resume(origin)))
        .then(Step::new("unguard", Action::Dismiss))
        .then(Step::new("expect", Action::Expect { device: origin.to_owned(), table: own_table.into() }))
}

/// The plan of removing what the origin no longer maps to. Nothing of it is taken back: what is left
/// is removed by the next attempt.
#[must_use]
pub fn dismantling(snap: &str, real: &str) -> Change {
    let remove = |device: &str| Action::Remove { device: device.to_owned(), udev: Udev::Internal };
    Change::new("dismantle")
        .then(Step::new("remove-snap", remove(snap)))
        .then(Step::new("remove-real", remove(real)))
}

fn guard(origin: &str, filesystems: &[PathBuf]) -> Action {
    Action::Guard { device: origin.to_owned(), filesystems: filesystems.to_vec() }
}

fn suspend(origin: &str, flush: bool, lock_filesystem: bool) -> Action {
    Action::Suspend { device: origin.to_owned(), flush, lock_filesystem }
}

// Never with a cookie: while anything is held nobody waits for udev, and udev keeps what it knows
// of a device that is not ours.
fn resume(origin: &str) -> Action {
    Action::Resume { device: origin.to_owned(), udev: Udev::None }
}

/// Every crash point of a copy's stack changes, in order of passage.
#[must_use]
pub fn crash_points() -> Vec<String> {
    [("insert", &INSERT_STEPS[..]), ("restore", &RESTORE_STEPS), ("dismantle", &DISMANTLE_STEPS)]
        .iter()
        .flat_map(|(change, steps)| steps.iter().map(move |step| (change, step)))
        .flat_map(|(change, step)| [format!("{change}.{step}.before"), format!("{change}.{step}.after")])
        .collect()
}

/// What is done at the instant.
pub type AtInstant<'a> = &'a mut dyn FnMut(&InstantContext<'_>) -> Result<()>;

impl Stack {
    /// Puts the stack in place. `at_instant` runs while the origin is quiet; `interrupt` is asked
    /// before each step of the critical section up to the switch.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for an origin that cannot carry a stack, [`ErrorKind::Timeout`] where
    /// the budget runs out, `at_instant`'s, `interrupt`'s and the kernel's; everything is put back.
    pub fn insert(
        dm: &Dm,
        job: &mut Job,
        request: &StackRequest,
        at_instant: AtInstant<'_>,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let origin = request.origin.as_str();
        let own_table = own_table(dm, origin)?;
        refuse_own_record(job, &request.filesystems)?;
        let real = beside(origin, ROLE_REAL, job.id());
        let snap = beside(origin, ROLE_SNAP, job.id());
        for name in [&real, &snap] {
            if dm.info(name)?.is_some() {
                return Err(Error::refused(format!("{origin} has a device {name} already"))
                    .state("nothing was changed")
                    .next("wait for the copy in progress ('tidemark status'), or run 'tidemark recover'"));
            }
        }
        job.set_origin(origin, dm.info_of(origin)?.number, &own_table.to_string())?;
        let change = insertion(request, &own_table, job.id());
        let mut runner = Runner::new(dm, request.budget, interrupt);
        runner.at_instant = Some(at_instant);
        runner.write_back_all = request.lock_filesystem;
        runner.below = Some(real.clone());
        runner.length = own_table.length();
        if !request.all {
            runner.mapper = Some(FreeMapper::prepare(dm.info_of(origin)?.number, &request.filesystems)?);
            runner.limits = Some(FreeLimits::for_chunk(request.chunk));
        }
        change.run(&mut runner, job)?;
        let times = runner.times;
        runner.report(origin);
        // Nothing after the change may fail: the stack is in place.
        let (number, below) = runner.below_found.take().expect("the instant has run, and looked it up");
        let current = runner.loaded.take().expect("a table was loaded, or the change had failed");
        Ok(Self {
            origin: origin.to_owned(),
            number,
            below,
            current: Arc::new(Mutex::new(current)),
            skipped: runner.skipped,
            real,
            snap,
            own_table,
            budget: request.budget,
            times,
        })
    }

    /// The stack of a job whose process died, as the kernel has it. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the kernel has no such stack any more.
    pub fn adopt(dm: &Dm, job: &Job, adopted: Adopted) -> Result<Self> {
        let gone = |what: String| {
            Error::refused(format!("job {} cannot go on: {what}", job.id()))
                .state("nothing was changed")
                .next("run 'tidemark recover', which puts back what is left, and copy again")
        };
        let record = job.record().origin.as_ref();
        let record = record.ok_or_else(|| gone("its record names no origin".to_owned()))?;
        let origin = record.device.as_str();
        let real = beside(origin, ROLE_REAL, job.id());
        let snap = beside(origin, ROLE_SNAP, job.id());
        for name in [origin, &real, &snap] {
            let info = dm.info(name)?.ok_or_else(|| {
                gone(format!("there is no device {name} any more")).next(
                    "run 'tidemark recover', which puts back what is left, and copy again. Where the process died \
                     while it put the origin back, the copy had ended, well or not: a file with the final name is \
                     complete, but may be one that was there before; look at its time",
                )
            })?;
            let wrong = name == origin && info.number != record.number;
            if wrong || !info.has_active {
                return Err(gone(format!("{name} is not the device that it was")));
            }
            if info.suspended {
                return Err(gone(format!("{name} is suspended")));
            }
        }
        let number = dm.info_of(&real)?.number;
        let table = |name: &str| dm.table(name, Slot::Active);
        let current = table(origin)?.filter(|table| is_over(table, number)).ok_or_else(|| {
            gone(format!(
                "{origin} does not write through its snapshot any more: somebody replaced its table"
            ))
        })?;
        let own_table = table(&real)?.ok_or_else(|| gone(format!("{real} has no table")))?;
        let status = dm.snapshot_status(&snap)?;
        if !status.is_usable() {
            return Err(gone(format!("the snapshot was lost meanwhile ({status:?})")));
        }
        // A table that was loaded when the process died, and never used.
        dm.clear(origin)?;
        Ok(Self {
            origin: origin.to_owned(),
            below: node::device_path(number)?,
            number,
            current: Arc::new(Mutex::new(current)),
            skipped: adopted.skipped,
            real,
            snap,
            own_table,
            budget: adopted.budget,
            times: adopted.times,
        })
    }

    /// What is in use and `linear` all the same in the origin's table: what was released.
    #[must_use]
    pub fn released(&self) -> Vec<Extent> {
        let mut preserved: ExtentSet = preserved(&lock(&self.current), self.number).into_iter().collect();
        preserved.extend(self.skipped.extents.iter().copied());
        let whole = Extent::new(Bytes::ZERO, self.own_table.length().bytes());
        whole.into_iter().flat_map(|whole| preserved.gaps_in(whole)).collect()
    }

    /// How long the origin was held.
    #[must_use]
    pub fn times(&self) -> HoldTimes {
        self.times
    }

    /// A path of the device beneath: the origin's data, read past the snapshot.
    #[must_use]
    pub fn below(&self) -> &Path {
        &self.below
    }

    /// The name of the snapshot device: the origin as it was at the instant.
    #[must_use]
    pub fn snap(&self) -> &str {
        &self.snap
    }

    /// What is not preserved.
    #[must_use]
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// The origin's size.
    #[must_use]
    pub fn size(&self) -> Bytes {
        self.own_table.length().bytes()
    }

    /// The number of the device beneath.
    #[must_use]
    pub fn number(&self) -> DeviceNumber {
        self.number
    }

    /// The origin's device-mapper name.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Replaces the origin's table by one in which what is in `released` is `linear` as well, in one call
    /// of the kernel. Answers how long the origin was held. Where the origin is suspended, it goes on.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] where somebody else has replaced the table; the kernel's, and then
    /// everything is as it was.
    pub fn release(&self, dm: &Dm, released: &[Extent]) -> Result<Duration> {
        let mut current = lock(&self.current);
        let length = self.own_table.length();
        // A region's free ranges are free as before: as lines, they count among the others.
        let skipped: ExtentSet = self.skipped.extents.iter().copied().collect();
        let released = released.iter().copied().collect::<ExtentSet>().difference(&skipped);
        let released: Vec<Extent> = released.iter().collect();
        let table =
            origin_table(length, self.number, &self.skipped.extents, &released, LineLimits::default())?;
        refuse_to_preserve_again(&table, self.number, &released)?;
        self.check_table(dm, &current)?;
        if table == *current {
            return Ok(Duration::ZERO);
        }
        crash_point("release.swap.before");
        let held = dm.swap(&self.origin, &table)?;
        crash_point("release.swap.after");
        // A watchdog that lets the origin go on drops what is loaded: then the swap swapped nothing.
        if dm.table(&self.origin, Slot::Active)?.as_ref() != Some(&table) {
            self.check_table(dm, &current)?;
            return Err(Error::new(ErrorKind::Kernel, format!("the table of {} was dropped", self.origin)));
        }
        *current = table;
        Ok(held)
    }

    /// How the snapshot is.
    ///
    /// # Errors
    /// The kernel's.
    pub fn snapshot_status(&self, dm: &Dm) -> Result<SnapshotStatus> {
        dm.snapshot_status(&self.snap)
    }

    /// Fails where the origin does not write through the stack any more: somebody else has replaced
    /// its table (`lvextend` does), so originals may be missing. To be asked after the last read and
    /// before success is claimed.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`].
    pub fn check_in_place(&self, dm: &Dm) -> Result<()> {
        self.check_table(dm, &lock(&self.current))
    }

    fn check_table(&self, dm: &Dm, expected: &Table) -> Result<()> {
        if dm.table(&self.origin, Slot::Active)?.as_ref() == Some(expected) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::StoreInvalid,
            format!("somebody replaced the table of {} while it was being copied", self.origin),
        )
        .next("copy again, and do not resize or move the volume meanwhile"))
    }

    /// Takes the stack away: the origin gets its own table back, then snapshot and `real` go. Can be
    /// called again where it failed. A table that somebody else has given the origin meanwhile stays.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&self, dm: &Dm, job: &mut Job) -> Result<()> {
        self.put_back(dm, job).map_err(|error| {
            error
                .context(format!("putting back the table of {}", self.origin))
                .state(format!("{} goes on, with the snapshot in place", self.origin))
                .next("run 'tidemark recover'")
        })?;
        let mut runner = Runner::new(dm, self.budget, &|| Ok(()));
        let left: Vec<_> = [&self.snap, &self.real]
            .into_iter()
            .map(|name| Ok((name, dm.info(name)?.is_some())))
            .collect::<Result<Vec<_>>>()?;
        let mut change = dismantling(&self.snap, &self.real);
        let gone = |device: &str| left.iter().any(|(name, there)| name.as_str() == device && !there);
        change.steps.retain(|step| !matches!(&step.action, Action::Remove { device, .. } if gone(device)));
        change.run(&mut runner, &mut AtBest::new(job)).map_err(|error| {
            error
                .state(format!("{} has its own table again; devices of the copy are left", self.origin))
                .next("run 'tidemark recover'")
        })
    }

    fn put_back(&self, dm: &Dm, job: &mut Job) -> Result<()> {
        let mut attempt = 1;
        loop {
            let active = dm.table(&self.origin, Slot::Active)?;
            if !active.is_some_and(|table| is_over(&table, self.number)) {
                return Ok(());
            }
            let mut runner = Runner::new(dm, self.budget, &|| Ok(()));
            // What is below the origin tells how to go back, also where the record cannot be written any more.
            match restoration(&self.origin, &self.own_table).run(&mut runner, &mut AtBest::new(job)) {
                Ok(()) => return Ok(()),
                Err(error) if attempt >= RESTORE_ATTEMPTS => return Err(error),
                Err(error) => tracing::warn!("{error}; trying again"),
            }
            attempt += 1;
        }
    }
}

/// A range that was released must never be preserved again: what is there is not the instant's any more,
/// and everything that the store holds for what is copied is laid over the copy at its end.
fn refuse_to_preserve_again(table: &Table, real: DeviceNumber, released: &[Extent]) -> Result<()> {
    let preserved: ExtentSet = preserved(table, real).into_iter().collect();
    match released.iter().find(|extent| preserved.intersection_with(**extent).next().is_some()) {
        None => Ok(()),
        Some(extent) => Err(Error::new(
            ErrorKind::Kernel,
            format!("the table would have too many lines to keep {extent} released"),
        )),
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    // It is set in one assignment, after the kernel has the table.
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The origin's table, if it can carry a stack.
fn own_table(dm: &Dm, origin: &str) -> Result<Table> {
    let info = dm.info_of(origin)?;
    let table = dm.table(origin, Slot::Active)?.ok_or_else(|| {
        Error::refused(format!("{origin} has no table")).next("activate the device, then copy it")
    })?;
    if info.suspended || info.has_inactive {
        return Err(Error::refused(format!(
            "somebody is changing {origin}: it is suspended or has a table loaded"
        ))
        .state("nothing was changed")
        .next("wait until that is over; after a crash: 'tidemark recover', or 'dmsetup resume'"));
    }
    for line in table.lines() {
        if !matches!(line.target, Target::Linear { .. } | Target::Striped { .. }) {
            return Err(Error::refused(format!(
                "{origin} has a '{}' target; only linear and striped devices can be copied live",
                line.target.kind()
            )));
        }
    }
    Ok(table)
}

/// The journal must not lie on a filesystem that is about to be frozen.
fn refuse_own_record(job: &Job, filesystems: &[PathBuf]) -> Result<()> {
    let record = job.filesystem()?;
    for path in filesystems {
        let meta = std::fs::metadata(path).io_context(|| format!("looking at {}", path.display()))?;
        if DeviceNumber::from_dev(meta.dev()) == record {
            return Err(Error::refused(format!(
                "{} lies on the filesystem {} that is to be frozen",
                super::job::RUN_DIR,
                path.display()
            ))
            .next("mount a tmpfs on /run, as every distribution does"));
        }
    }
    Ok(())
}

/// Does a change's actions: device-mapper's by [`Dm`], freeze, watchdog and instant itself.
pub(super) struct Runner<'a> {
    dm: &'a Dm,
    budget: Duration,
    interrupt: &'a dyn Fn() -> Result<()>,
    at_instant: Option<AtInstant<'a>>,
    below: Option<String>,
    below_found: Option<(DeviceNumber, PathBuf)>,
    /// Length of the origin.
    length: Sectors,
    /// Asked what is in use while everything is frozen; None: everything is.
    mapper: Option<FreeMapper>,
    limits: Option<FreeLimits>,
    /// Where what is skipped was seen to lie.
    picture: Option<Picture>,
    skipped: Skipped,
    /// What is frozen by its device cannot be named: everything is written back beforehand, or the suspension would do
    /// it while writers wait.
    write_back_all: bool,
    /// Things are being put back: nobody is asked whether to.
    taking_back: bool,
    /// The origin is about to be preserved by a map that holds only as long as the filesystems are frozen.
    map_in_force: bool,
    /// What [`Action::LoadOver`] has loaded.
    loaded: Option<Table>,
    watchdog: Option<Watchdog>,
    files: Vec<(PathBuf, File)>,
    frozen_since: Option<Instant>,
    suspended_since: Option<Instant>,
    times: HoldTimes,
    /// What could not be said while it happened.
    notes: Vec<String>,
}

impl<'a> Runner<'a> {
    pub(super) fn new(dm: &'a Dm, budget: Duration, interrupt: &'a dyn Fn() -> Result<()>) -> Self {
        Self {
            dm,
            budget,
            interrupt,
            at_instant: None,
            below: None,
            below_found: None,
            length: Sectors::ZERO,
            mapper: None,
            limits: None,
            picture: None,
            skipped: Skipped::default(),
            write_back_all: false,
            taking_back: false,
            map_in_force: false,
            loaded: None,
            watchdog: None,
            files: Vec::new(),
            frozen_since: None,
            suspended_since: None,
            times: HoldTimes::default(),
            notes: Vec::new(),
        }
    }

    fn report(&mut self, origin: &str) {
        for note in self.notes.drain(..) {
            tracing::warn!("{note}");
        }
        tracing::info!(
            "{origin}: synced in {} ms, frozen for {} ms, suspended for {} ms",
            self.times.synced.as_millis(),
            self.times.frozen.as_millis(),
            self.times.suspended.as_millis()
        );
    }

    /// Everything that takes time is done while nothing is held yet, and last of it dirty data is written back, so
    /// that the freeze, which writes back what has become dirty since, is short.
    fn guard(&mut self, device: &str, filesystems: &[PathBuf]) -> Result<()> {
        self.files.clear();
        for path in filesystems {
            let file = File::open(path).io_context(|| format!("opening {}", path.display()))?;
            if let Some(mapper) = &self.mapper {
                mapper.check_same(path, &file)?;
            }
            self.files.push((path.clone(), file));
        }
        let program = Path::new("/proc/self/exe");
        let order = Order {
            devices: vec![device.to_owned()],
            filesystems: filesystems.to_vec(),
            budget_ms: u64::try_from(self.budget.as_millis()).unwrap_or(u64::MAX),
        };
        self.watchdog = Some(Watchdog::start(program, &order)?);
        if let Err(error) = process::lock_memory() {
            self.notes.push(format!("memory cannot be locked during the freeze: {error}"));
        }
        let watch = Stopwatch::start();
        self.write_back()?;
        self.times.synced = watch.elapsed();
        self.watchdog.as_mut().map_or(Ok(()), Watchdog::arm)
    }

    fn write_back(&self) -> Result<()> {
        if self.write_back_all {
            nix::unistd::sync();
        }
        for (path, file) in &self.files {
            freeze::sync_filesystem(file)
                .io_context(|| format!("writing back the filesystem at {}", path.display()))?;
        }
        Ok(())
    }

    fn dismiss(&mut self) -> Verdict {
        let verdict = self.watchdog.take().map_or(Verdict::Calm, Watchdog::dismiss);
        let _ = process::unlock_memory();
        verdict
    }

    /// Before and after each critical action: has the watchdog let everything go, or the user asked
    /// us to stop? If the watchdog has fired it is stopped first: from then on we put things back.
    fn check(&mut self, interruptible: bool) -> Result<()> {
        let fired = match self.watchdog.as_mut() {
            Some(watchdog) => watchdog.check(),
            None => Ok(()),
        };
        if let Err(error) = fired {
            self.dismiss();
            return Err(error);
        }
        if interruptible { self.ask() } else { Ok(()) }
    }

    fn ask(&self) -> Result<()> {
        if self.taking_back { Ok(()) } else { (self.interrupt)() }
    }

    fn freeze(&mut self) -> Result<()> {
        self.check(true)?;
        let start = Instant::now();
        self.frozen_since = Some(start);
        let mut result = Ok(());
        let mut count = 0;
        for (path, file) in &self.files {
            match freeze::freeze(file) {
                Ok(()) => count += 1,
                Err(source) => {
                    result = Err(freeze_error(path, source));
                    break;
                }
            }
        }
        let result = result
            .and_then(|()| self.check(true))
            .and_then(|()| if start.elapsed() > self.budget { Err(budget_ran_out()) } else { Ok(()) });
        // All or none: this step is not taken back by itself.
        if result.is_err() {
            for (_, file) in self.files.iter().take(count).rev() {
                let _ = freeze::thaw(file);
            }
            self.frozen_since = None;
        }
        result
    }

    /// What the frozen filesystems do not use stays linear; whatever does not answer is all preserved.
    fn load_over(&mut self, device: &str, over: &str) -> Result<()> {
        self.check(true)?;
        if let (Some(mapper), Some(limits)) = (self.mapper.take(), &self.limits) {
            let (found, picture) = mapper.read();
            self.skipped = Skipped {
                extents: skippable(&found.extents, self.length.bytes(), limits),
                notes: found.notes,
            };
            self.picture = (!self.skipped.extents.is_empty()).then_some(picture);
        }
        let number = self.dm.info_of(over)?.number;
        let table = origin_table(self.length, number, &self.skipped.extents, &[], LineLimits::default())?;
        self.dm.load(device, &table)?;
        self.loaded = Some(table);
        self.map_in_force = !self.skipped.extents.is_empty();
        Ok(())
    }

    fn expect_over(&self, device: &str) -> Result<()> {
        let found = self.dm.table(device, Slot::Active)?;
        if found.is_none() || found != self.loaded {
            return Err(Error::new(
                ErrorKind::Kernel,
                format!("{device} does not have the table that was loaded into it"),
            ));
        }
        if self.picture.as_ref().is_none_or(Picture::still_holds) {
            return Ok(());
        }
        let what = format!("the devices on {device} were changed while its filesystems were frozen");
        Err(Error::new(ErrorKind::Kernel, what)
            .next("copy again, and leave partitions, LVM and loop devices alone meanwhile, or use --all"))
    }

    fn thaw(&mut self, filesystems: &[PathBuf]) -> Result<()> {
        if self.files.is_empty() {
            // Not frozen by us but by a job that died. Opening a directory writes nothing.
            for path in filesystems {
                match File::open(path) {
                    Ok(file) => self.files.push((path.clone(), file)),
                    // Unmounted since, so not frozen.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error).io_context(|| format!("opening {}", path.display())),
                }
            }
        }
        let mut result = Ok(());
        // On the way back nothing depends on the map any more: a load that is dropped says so.
        let map_in_force = std::mem::take(&mut self.map_in_force);
        let mut early = None;
        for (path, file) in self.files.iter().rev() {
            match freeze::thaw(file) {
                Ok(()) => {}
                // The watchdog was faster, or somebody else. What was free when it was read may have been in
                // use at the instant.
                Err(source) if source.raw_os_error() == Some(libc::EINVAL) && map_in_force => {
                    early = Some((path.clone(), source));
                }
                Err(source) if source.raw_os_error() == Some(libc::EINVAL) => {
                    self.notes.push(format!("{} was thawed by somebody else", path.display()));
                }
                Err(source) => {
                    result = Err(Error::io(format!("thawing {}", path.display()), source)
                        .next(format!("run 'fsfreeze -u {}'", path.display())));
                }
            }
        }
        if let Some(since) = self.frozen_since.take() {
            self.times.frozen = since.elapsed();
        }
        if let (Some((path, source)), Ok(())) = (early, &result) {
            // The watchdog says itself why it did.
            self.check(false)?;
            result =
                Err(Error::io(format!("{} was thawed before the instant was over", path.display()), source)
                    .next("copy again, and leave the filesystem alone while it is frozen, or use --all"));
        }
        result
    }

    fn suspend(&mut self, action: &Action, device: &str) -> Result<()> {
        self.check(true)?;
        self.suspended_since = Some(Instant::now());
        self.dm.execute(action)?;
        self.times.instant_utc_ns = clock::utc_now_ns();
        if let Err(error) = self.check(false) {
            // The watchdog acted too early to see this suspension.
            let undo = self.dm.clear(device).and_then(|()| self.dm.resume(device, Udev::None));
            return Err(match undo {
                Ok(()) => error,
                Err(undo) => error.with_failed_undo(undo),
            });
        }
        Ok(())
    }

    fn instant(&mut self) -> Result<()> {
        self.check(true)?;
        let held_since = self.frozen_since.or(self.suspended_since).unwrap_or_else(Instant::now);
        let (Some(below), Some(at_instant)) = (self.below.as_deref(), self.at_instant.as_mut()) else {
            return Ok(());
        };
        let number = self.dm.info_of(below)?.number;
        let path = node::device_path(number)?;
        self.below_found = Some((number, path.clone()));
        at_instant(&InstantContext {
            below: &path,
            utc_ns: self.times.instant_utc_ns,
            deadline: held_since + self.budget,
        })?;
        self.check(true)
    }

    fn resume(&mut self, action: &Action) -> Result<()> {
        self.dm.execute(action)?;
        if let Some(since) = self.suspended_since.take() {
            self.times.suspended = since.elapsed();
        }
        Ok(())
    }
}

impl Executor for Runner<'_> {
    fn taking_back(&mut self) {
        self.taking_back = true;
    }

    fn execute(&mut self, action: &Action) -> Result<()> {
        match action {
            Action::Guard { device, filesystems } => {
                self.ask()?;
                let result = self.guard(device, filesystems);
                if result.is_err() {
                    self.dismiss();
                }
                result
            }
            Action::LoadOver { device, over } => self.load_over(device, over),
            Action::ExpectOver { device } => self.expect_over(device),
            Action::Freeze { .. } => self.freeze(),
            Action::Thaw { filesystems } => self.thaw(filesystems),
            Action::Suspend { device, .. } => self.suspend(action, device),
            Action::Instant => self.instant(),
            Action::Resume { .. } => self.resume(action),
            Action::Clear { .. } => {
                self.map_in_force = false;
                self.dm.execute(action)
            }
            Action::Unguard => match self.dismiss() {
                Verdict::Fired(_) => Err(budget_ran_out()),
                Verdict::Calm => Ok(()),
                Verdict::Lost => {
                    self.notes.push("the watchdog died".to_owned());
                    Ok(())
                }
            },
            Action::Dismiss => {
                if let Verdict::Fired(_) = self.dismiss() {
                    self.notes.push("the watchdog had let the origin go on".to_owned());
                }
                Ok(())
            }
            _ => self.dm.execute(action),
        }
    }
}

fn freeze_error(path: &Path, source: std::io::Error) -> Error {
    let error = |what: &str| Error::refused(format!("freezing {}: {what}", path.display()));
    match source.raw_os_error() {
        Some(libc::EBUSY) => error("somebody else has frozen it")
            .with_source(source)
            .next(format!("thaw it first: fsfreeze -u {}", path.display())),
        Some(libc::EOPNOTSUPP) => {
            error("its filesystem cannot be frozen").with_source(source).next("unmount it, then copy it")
        }
        _ => Error::io(format!("freezing {}", path.display()), source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> StackRequest {
        StackRequest {
            origin: "vg-data".into(),
            cow: DeviceNumber { major: 253, minor: 9 },
            chunk: ChunkSize::default(),
            filesystems: vec!["/srv".into()],
            lock_filesystem: false,
            budget: Duration::from_secs(2),
            all: false,
        }
    }

    #[test]
    fn crash_points_are_those_of_the_plans() {
        let own: Table = "0 8192 linear 8:16 2048".parse().unwrap();
        let id = crate::dm::naming::new_id();
        let mut points = insertion(&request(), &own, &id).crash_points();
        points.extend(restoration("vg-data", &own).crash_points());
        points.extend(dismantling("s", "r").crash_points());
        assert_eq!(points, crash_points());
    }

    #[test]
    fn the_plan_holds_only_the_origin_and_waits_for_nobody_meanwhile() {
        let own: Table = "0 8192 linear 8:16 2048".parse().unwrap();
        let plan = insertion(&request(), &own, &crate::dm::naming::new_id());
        let mut held = false;
        for step in &plan.steps {
            match &step.action {
                Action::Freeze { .. } => held = true,
                Action::Unguard => held = false,
                Action::Suspend { device, .. } => assert_eq!(device, "vg-data"),
                Action::Resume { udev, .. } if held => assert_eq!(*udev, Udev::None),
                Action::Create { .. } | Action::Load { .. } | Action::Remove { .. } => assert!(!held),
                _ => {}
            }
        }
        assert_eq!(
            plan.steps[8].action.to_string(),
            "load into vg-data: snapshot-origin over vg-data-real, linear where nothing is in use"
        );
    }
}
