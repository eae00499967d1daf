//! The snapshot stack over a live origin: put in place at one instant, taken away again.
//!
//! Insertion, in order (each a step with its undo; see [`insertion`]):
//! 1. `real` gets a copy of the origin's own table, `snap` becomes a snapshot of `real` with the COW
//!    store, `preserve` the `snapshot-origin` over `real`: all in use *before* anything is held, for writes do not pass
//!    them yet;
//! 2. filesystems are synced, then frozen;
//! 3. a table that leads to `preserve` is loaded into the origin, not used yet: past it where the frozen
//!    filesystems say that nothing is in use (their map can be read only while the device answers; see
//!    [`origin_table`]);
//! 4. the origin is suspended: the instant;
//! 5. the origin is resumed, which puts the loaded table to use; filesystems are thawed.
//!
//! Invariants: the origin is the only device ever suspended; nothing waits for udev between the
//! freeze and the thaw; nothing is logged meanwhile; a failure anywhere puts the origin's own table
//! back, the very text. A copy of that table is in `real` as long as the stack is in place, so the
//! kernel alone is enough to undo it ([`recover`](crate::op::recover)).

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt};
use crate::dm::{DeviceInfo, Dm, Slot, SnapshotStatus, Table, Target, node};
use crate::extent::free::FreeLimits;
use crate::extent::{Extent, ExtentSet};
use crate::format::state::{JobRecord, OriginRecord};
use crate::stack::origin_table::{Form, LowerDevices};
use crate::sys::dm_ioctl::SuspendFlags;
use crate::sys::nudge::Nudge;
use crate::sys::process::crash_point;
use crate::sys::queue::QueueSettings;
use crate::topology::Topology;
use crate::volume::free::FreeMapper;
use crate::volume::lvm_lock::{LvmLock, LvmScope};

use crate::job::Job;
use watchdog::Standby;

mod apart;
pub mod change;
pub mod gate;
pub mod hooks;
mod intent;
mod model;
pub mod origin_table;
mod owner;
mod plan;
mod runner;
mod trial;
mod want_of_memory;
pub mod watchdog;
pub mod write_back;

pub use change::{Action, BestEffort, Change, Executor, IntentLog, NoIntents, Step};
pub use intent::change_record;
pub use model::{AtInstant, HoldTimes, InstantContext, Planned, Skipped, StackRequest};
pub use owner::Owner;
pub use plan::{StackNames, crash_points, dismantling, insertion, restoration};
pub use runner::Runner;

/// Attempts to put the origin's own table back within the budget. On a disk that has become slow, I/O in flight may
/// take longer than that: each attempt has [`RESTORE_BUDGET_FACTOR`] times as long as the one before, and between two
/// of them writers go on.
const RESTORE_ATTEMPTS: u32 = 4;

/// See [`RESTORE_ATTEMPTS`].
const RESTORE_BUDGET_FACTOR: u32 = 4;

/// Longest wait for somebody else who is changing the origin's table.
const OTHER_TOOL_WAIT_MAX: Duration = Duration::from_secs(60);

/// Pause between two attempts.
const OTHER_TOOL_PAUSE: Duration = Duration::from_millis(50);

/// What the kernel does not know of a stack whose process died.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// What is not copied.
    pub skipped: Skipped,
    /// Longest time that the origin may be suspended.
    pub budget: Duration,
    /// For how long lvm2 is kept away.
    pub lvm_lock: LvmScope,
    /// How long it was held for the instant.
    pub times: HoldTimes,
}

/// A stack in place. Dropping it does nothing, [`Stack::remove`] takes it away.
#[derive(Clone, Debug)]
pub struct Stack {
    origin: String,
    names: StackNames,
    lower: LowerDevices,
    form: Form,
    /// The only one that changes the origin's table; held while it does.
    owner: Arc<Mutex<Owner>>,
    /// The snapshot's device, held open exclusively from before the instant until it is removed: whoever does not see our
    /// locks, in another mount namespace, knows by this that the copy lives.
    claim: Arc<Mutex<Option<File>>>,
    skipped: Skipped,
    logs: Vec<Extent>,
    below: PathBuf,
    budget: Duration,
    times: HoldTimes,
    /// The copy's watchdog, while it guards nothing.
    standby: Standby,
    /// Of a copy that keeps lvm2 away until its end.
    lvm: Arc<Mutex<Option<LvmLock>>>,
}

/// The origin is held, and lvm2 kept away from it as long as this lives.
#[derive(Debug)]
pub struct Hold {
    _lvm: Option<LvmLock>,
}

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
        standby: &Standby,
        at_instant: AtInstant<'_>,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let origin = request.origin.as_str();
        let number = dm.info_of(origin)?.number;
        // From before its table is read until it leads through the stack.
        let lvm = LvmLock::hold(dm, number, interrupt)?;
        let own_table = own_table(dm, origin)?;
        let request = &request.recheck(number, &own_table)?;
        refuse_own_record(job, &request.filesystems)?;
        let names = StackNames::new(origin, job.id());
        for name in names.removable() {
            if dm.info(name)?.is_some() {
                return Err(Error::refused(format!("{origin} has a device {name} already"))
                    .state("nothing was changed")
                    .next("wait for the copy in progress ('tidemark status'), or run 'tidemark recover'"));
            }
        }
        job.set_origin(OriginRecord {
            device: origin.to_owned(),
            number,
            table: own_table.to_string(),
            queue: QueueSettings::read(number).to_record(),
        })?;
        job.note_expedited();
        let change = insertion(request, &own_table, job.id());
        let mut runner = Runner::new(dm, request.budget, interrupt);
        runner.standby = standby.clone();
        runner.at_instant = Some(at_instant);
        runner.number = Some(number);
        runner.lock_filesystem = request.lock_filesystem;
        runner.frozen = request.planned.as_ref().map(|planned| planned.frozen.clone());
        runner.below = Some(names.real.clone());
        runner.own_table = Some(own_table);
        runner.form = form(dm, number);
        let mapper = FreeMapper::prepare(number, &request.filesystems)?;
        if request.all {
            runner.logs = mapper.into_logs();
        } else {
            runner.mapper = Some(mapper);
            runner.limits = Some(FreeLimits::for_chunk(request.chunk));
        }
        change.run(&mut runner, job)?;
        let times = runner.times;
        runner.report(origin);
        // Nothing after the change may fail: the stack is in place.
        let below = runner.below_found.take().expect("the instant has run, and looked it up");
        let lower = runner.lower.take().expect("a table was loaded, or the change had failed");
        let owner = runner.owner.take().expect("the change's first step makes it");
        Ok(Self {
            origin: origin.to_owned(),
            names,
            lower,
            form: runner.form,
            below,
            owner: Arc::new(Mutex::new(owner)),
            claim: Arc::new(Mutex::new(runner.claim.take())),
            skipped: std::mem::take(&mut runner.skipped),
            logs: std::mem::take(&mut runner.logs),
            budget: request.budget,
            times,
            standby: standby.clone(),
            lvm: Arc::new(Mutex::new(Some(lvm).filter(|_| request.lvm_lock == LvmScope::Copy))),
        })
    }

    /// The stack of a job whose process died, as the kernel has it. Drops a table of the copy that the dead process had
    /// loaded into the origin and not put to use; changes nothing else.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the kernel has no such stack any more.
    pub fn adopt(dm: &Dm, job: &Job, adopted: Adopted) -> Result<Self> {
        let FoundStack { record, origin, names, lower, current, claim } = FoundStack::find(dm, job.record())?;
        let lvm = LvmLock::hold(dm, origin.number, &|| Ok(()))?;
        let queue = QueueSettings::from_record(record.number, &record.queue);
        let owner = take_over(dm, &origin, current, &lower, queue).map_err(|error| match error.kind() {
            ErrorKind::StoreInvalid => cannot_resume(job.id(), error.to_string()),
            _ => error,
        })?;
        Ok(Self {
            origin: origin.name,
            below: node::device_path(lower.real)?,
            names,
            lower,
            form: form(dm, record.number),
            owner: Arc::new(Mutex::new(owner)),
            claim: Arc::new(Mutex::new(Some(claim))),
            skipped: adopted.skipped,
            // Copied by now, or soon enough.
            logs: Vec::new(),
            budget: adopted.budget,
            times: adopted.times,
            standby: Standby::start(job.id()),
            lvm: Arc::new(Mutex::new(Some(lvm).filter(|_| adopted.lvm_lock == LvmScope::Copy))),
        })
    }

    /// What is in use and leads past the snapshot all the same in the origin's table: what was released.
    #[must_use]
    pub fn released(&self) -> Vec<Extent> {
        released(&self.lower, lock(&self.owner).active(), &self.skipped.extents)
    }

    /// Where the copy's watchdog waits for what it is to guard.
    #[must_use]
    pub fn standby(&self) -> &Standby {
        &self.standby
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
        &self.names.snap
    }

    /// What is not preserved.
    #[must_use]
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// Where the filesystems' logs are, as far as they told: what is written most.
    #[must_use]
    pub fn logs(&self) -> &[Extent] {
        &self.logs
    }

    /// The origin's size.
    #[must_use]
    pub fn size(&self) -> Bytes {
        self.lower.own.length().bytes()
    }

    /// The number of the device beneath.
    #[must_use]
    pub fn number(&self) -> DeviceNumber {
        self.lower.real
    }

    /// The origin's device-mapper name when the copy began; it may have been renamed since.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The origin's number.
    #[must_use]
    pub fn origin_number(&self) -> DeviceNumber {
        lock(&self.owner).number()
    }

    /// Replaces the origin's table by one in which what is in `released` is preserved no more, in one call
    /// of the kernel. Answers how long the origin was held. Where it is held, by `hold`, it goes on.
    ///
    /// The kernel first waits for I/O in flight, among it writes that wait for the store, and holds what comes meanwhile:
    /// `nudge` ends that wait with the freeze budget.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] where somebody else has replaced the table; [`ErrorKind::Refused`] where somebody is
    /// about to, which may be over soon; [`ErrorKind::Interrupted`] where I/O in flight took longer than the budget; the
    /// kernel's. In all cases everything is as it was.
    pub fn release(
        &self,
        dm: &Dm,
        released: &[Extent],
        hold: Option<&Hold>,
        nudge: &Nudge,
    ) -> Result<Duration> {
        let mut owner = lock(&self.owner);
        // A region's free ranges are free as before: as lines, they count among the others.
        let skipped: ExtentSet = self.skipped.extents.iter().copied().collect();
        let released = released.iter().copied().collect::<ExtentSet>().difference(&skipped);
        let released: Vec<Extent> = released.iter().collect();
        let table = self.lower.table(&self.skipped.extents, &released, self.form)?;
        self.refuse_to_preserve_again(&table, &released)?;
        let _lvm = match hold {
            Some(_) => None,
            None => self.keep_lvm_away(dm, &owner)?,
        };
        if table == *owner.active() {
            return owner.check(dm).map(|()| Duration::ZERO);
        }
        crash_point("release.swap.before");
        let held = nudge.within(Instant::now() + self.budget, || owner.swap(dm, &table))?;
        crash_point("release.swap.after");
        Ok(held)
    }

    /// Suspends the origin, until [`Stack::release`] or [`Stack::resume_if_suspended`]. `nudge` ends the wait for I/O in flight after
    /// `limit`.
    ///
    /// # Errors
    /// As [`Stack::release`].
    pub fn hold(&self, dm: &Dm, nudge: &Nudge, limit: Duration) -> Result<Hold> {
        let mut owner = lock(&self.owner);
        let lvm = self.keep_lvm_away(dm, &owner)?;
        let how = SuspendFlags { flush: false, lock_filesystem: false };
        crash_point("hold.suspend.before");
        nudge.within(Instant::now() + limit, || owner.suspend(dm, how))?;
        crash_point("hold.suspend.after");
        Ok(Hold { _lvm: lvm })
    }

    /// True where the origin is held by us, as far as we know.
    #[must_use]
    pub fn is_held(&self) -> bool {
        lock(&self.owner).is_held()
    }

    /// Lets the origin go on where it is held by us.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resume_if_suspended(&self, dm: &Dm) -> Result<()> {
        lock(&self.owner).resume_if_suspended(dm)
    }

    /// Keeps lvm2 away from the origin's volume group, unless one of its commands is running: that one goes first.
    /// None where it is kept away already.
    fn keep_lvm_away(&self, dm: &Dm, owner: &Owner) -> Result<Option<LvmLock>> {
        if self.keeps_lvm_away() {
            return Ok(None);
        }
        let busy =
            || Error::refused(format!("a command of LVM is changing the volume group of {}", self.origin));
        LvmLock::try_hold(dm, owner.number())?.ok_or_else(busy).map(Some)
    }

    /// A range that was released must never be preserved again: what is there is not the instant's any more,
    /// and everything that the store holds for what is copied is laid over the copy at its end.
    fn refuse_to_preserve_again(&self, table: &Table, released: &[Extent]) -> Result<()> {
        let preserved: ExtentSet = self.lower.preserved(table).into_iter().collect();
        match released.iter().find(|extent| preserved.intersection_with(**extent).next().is_some()) {
            None => Ok(()),
            Some(extent) => Err(Error::new(
                ErrorKind::Kernel,
                format!("the table would have too many lines to keep {extent} released"),
            )),
        }
    }

    /// How the snapshot is.
    ///
    /// # Errors
    /// The kernel's.
    pub fn snapshot_status(&self, dm: &Dm) -> Result<SnapshotStatus> {
        dm.snapshot_status(&self.names.snap)
    }

    /// Fails where the origin does not write through the stack any more: somebody else has replaced
    /// its table (`lvextend` does), so originals may be missing. To be asked after the last read and
    /// before success is claimed.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`].
    pub fn check_in_place(&self, dm: &Dm) -> Result<()> {
        match lock(&self.owner).check(dm) {
            // Somebody is about to change it: what was read until now holds.
            Err(error) if error.kind() == ErrorKind::Refused => Ok(()),
            result => result,
        }
    }

    /// Takes the stack away: the origin gets its own table back, then the devices beneath go. Can be
    /// called again where it failed. A table that somebody else has given the origin meanwhile stays.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&self, dm: &Dm, job: &mut Job) -> Result<()> {
        self.restore(dm, job)?;
        *locked(&self.claim) = None;
        let mut runner = Runner::new(dm, self.budget, &|| Ok(()));
        let mut change = dismantling(&self.names);
        let names = self.names.removable().into_iter();
        let left = names.map(|name| Ok((name, dm.info(name)?.is_some()))).collect::<Result<Vec<_>>>()?;
        let is_removed = |device: &str| left.iter().any(|(name, there)| *name == device && !there);
        change
            .steps
            .retain(|step| !matches!(&step.action, Action::Remove { device, .. } if is_removed(device)));
        change.run(&mut runner, &mut BestEffort::new(job)).map_err(|error| {
            error
                .state(format!("{} has its own table again; devices of the copy are left", self.origin))
                .next("run 'tidemark recover'")
        })
    }

    /// The origin gets its own table back, and nothing more: the devices beneath stay. Waits for nothing but the origin
    /// and, where it is LVM's, for LVM.
    ///
    /// # Errors
    /// The kernel's.
    pub fn restore(&self, dm: &Dm, job: &mut Job) -> Result<()> {
        self.put_back(dm, job).map_err(|error| {
            let error = error
                .context(format!("putting back the table of {}", self.origin))
                .state(format!("{} goes on, with the snapshot in place", self.origin))
                .next("run 'tidemark recover'");
            explain_missing_disk(error, &self.origin, &self.lower.own)
        })?;
        // Whatever LVM does to the volume now, no copy depends on it.
        *locked(&self.lvm) = None;
        Ok(())
    }

    fn keeps_lvm_away(&self) -> bool {
        locked(&self.lvm).is_some()
    }

    fn put_back(&self, dm: &Dm, job: &mut Job) -> Result<()> {
        job.note_expedited();
        let mut owner = lock(&self.owner);
        owner.resume_if_suspended(dm)?;
        // Nothing is asked here whether to: what was begun is put back, or said to be in place.
        let _lvm = match self.keeps_lvm_away() {
            true => None,
            false => Some(LvmLock::hold(dm, owner.number(), &|| Ok(()))?),
        };
        let begin = Instant::now();
        let mut attempt = 1;
        let mut budget = self.budget;
        loop {
            // By the name that it has now. One that is gone has nothing to be put back.
            let Some(origin) = owner.device(dm)? else { return Ok(()) };
            let active =
                dm.table(origin.number, Slot::Active)?.filter(|table| self.lower.is_stack_table(table));
            let Some(active) = active else { return Ok(()) };
            let mut runner = Runner::new(dm, budget, &|| Ok(()));
            runner.standby = self.standby.clone();
            // What is below the origin tells how to go back, also where the record cannot be written any more.
            let change = restoration(&origin.name, &active, &self.lower.own);
            match change.run(&mut runner, &mut BestEffort::new(job)) {
                Ok(()) => {
                    owner.put_back_settings_of(&self.lower.own);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Refused && begin.elapsed() < OTHER_TOOL_WAIT_MAX => {
                    thread::sleep(OTHER_TOOL_PAUSE);
                    continue;
                }
                Err(error) if attempt >= RESTORE_ATTEMPTS => return Err(error),
                Err(error) => tracing::warn!("{error}; trying again"),
            }
            attempt += 1;
            budget = budget.saturating_mul(RESTORE_BUDGET_FACTOR);
        }
    }
}

/// `error` of putting back table `own` of `origin`, with what to do where one of its disks is gone: the kernel loads no table
/// over that, and the stack stays for as long as the origin does.
pub fn explain_missing_disk(error: Error, origin: &str, own: &Table) -> Error {
    match own.devices().into_iter().find(|disk| !Topology::default().node(*disk).exists()) {
        None => error,
        Some(disk) => error
            .context(format!("the disk {disk} under {origin} was removed"))
            .state(format!("{origin} leads to the copy's devices still, and fails as its disk does"))
            .next(format!(
                "unmount {origin}, remove it ('dmsetup remove {origin}'), and run 'tidemark recover'"
            )),
    }
}

fn released(lower: &LowerDevices, current: &Table, skipped: &[Extent]) -> Vec<Extent> {
    let mut preserved: ExtentSet = lower.preserved(current).into_iter().collect();
    preserved.extend(skipped.iter().copied());
    let whole = Extent::new(Bytes::ZERO, lower.own.length().bytes());
    whole.into_iter().flat_map(|whole| preserved.gaps_in(whole)).collect()
}

fn cannot_resume(job: &str, what: String) -> Error {
    Error::refused(format!("job {job} cannot go on: {what}"))
        .state("nothing was changed")
        .next("run 'tidemark recover', which puts back what is left, and copy again")
}

/// The stack of a job whose process died, found whole. Held by its claim, changed in nothing.
pub struct FoundStack<'a> {
    record: &'a OriginRecord,
    origin: DeviceInfo,
    names: StackNames,
    lower: LowerDevices,
    /// The origin's table in use.
    current: Table,
    claim: File,
}

impl<'a> FoundStack<'a> {
    /// Finds it.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the kernel has no such stack any more; the kernel's.
    pub fn find(dm: &Dm, job: &'a JobRecord) -> Result<Self> {
        let cannot_resume = |what: String| cannot_resume(&job.job, what);
        let record =
            job.origin.as_ref().ok_or_else(|| cannot_resume("its record names no origin".to_owned()))?;
        let names = StackNames::new(&record.device, &job.job);
        // By its number: it may have been renamed.
        let origin = check_adoptable(dm.info(record.number)?, &record.device, &cannot_resume)?;
        for name in names.removable() {
            check_adoptable(dm.info(name)?, name, &cannot_resume)?;
        }
        let table = |name: &str| dm.table(name, Slot::Active);
        let number = |name: &str| dm.info_of(name).map(|info| info.number);
        let lower = LowerDevices {
            own: table(&names.real)?.ok_or_else(|| cannot_resume(format!("{} has no table", names.real)))?,
            real: number(&names.real)?,
            preserve: Some(number(&names.preserve)?),
        };
        let preserving = Table::single(lower.own.length(), Target::SnapshotOrigin { device: lower.real })?;
        if table(&names.preserve)? != Some(preserving) {
            return Err(cannot_resume(format!("{} does not preserve anything any more", names.preserve)));
        }
        let current = dm
            .table(origin.number, Slot::Active)?
            .filter(|table| lower.is_stack_table(table))
            .ok_or_else(|| {
                cannot_resume(format!(
                    "{} does not write through its snapshot any more: somebody replaced its table",
                    origin.name
                ))
            })?;
        let status = dm.snapshot_status(&names.snap)?;
        if !status.is_usable() {
            return Err(cannot_resume(format!("the snapshot was lost meanwhile ({status:?})")));
        }
        let claim = dm.claim(number(&names.snap)?)?;
        Ok(Self { record, origin, names, lower, current, claim })
    }

    /// Its device that carries the origin's own table.
    #[must_use]
    pub fn number(&self) -> DeviceNumber {
        self.lower.real
    }

    /// As [`Stack::released`], where `skipped` was never preserved.
    #[must_use]
    pub fn released(&self, skipped: &[Extent]) -> Vec<Extent> {
        released(&self.lower, &self.current, skipped)
    }

    /// As [`Stack::snapshot_status`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn snapshot_status(&self, dm: &Dm) -> Result<SnapshotStatus> {
        dm.snapshot_status(&self.names.snap)
    }

    /// Refuses what [`Stack::adopt`] would find in its way: a table of others', or a suspension.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`]; the kernel's.
    pub fn check_adoptable(&self, dm: &Dm) -> Result<()> {
        let loaded = dm.table(self.origin.number, Slot::Inactive)?;
        if loaded.is_some_and(|table| self.lower.is_copy_table(&table)) {
            // The dead process's own, which the adoption drops.
            return Ok(());
        }
        Owner::new(dm, self.origin.number, self.current.clone())?.check(dm)
    }
}

/// A device of a stack that is to be adopted; `cannot_resume` says why it is not.
fn check_adoptable(
    found: Option<DeviceInfo>,
    name: &str,
    cannot_resume: &dyn Fn(String) -> Error,
) -> Result<DeviceInfo> {
    let info = found.ok_or_else(|| {
        cannot_resume(format!("there is no device {name} any more")).next(
            "run 'tidemark recover', which puts back what is left, and copy again. Where the process died \
             while it put the origin back, the copy had ended, well or not: a file with the final name is \
             complete, but may be one that was there before; look at its time",
        )
    })?;
    if !info.has_active {
        return Err(cannot_resume(format!("{name} is not the device that it was")));
    }
    if info.suspended {
        return Err(cannot_resume(format!("{name} is suspended")));
    }
    Ok(info)
}

/// The table of an origin whose owner died, and what it had noted of the queue.
fn take_over(
    dm: &Dm,
    origin: &DeviceInfo,
    current: Table,
    lower: &LowerDevices,
    queue: QueueSettings,
) -> Result<Owner> {
    // The dead process may have loaded a table. Any other table is somebody else's.
    if dm.table(origin.number, Slot::Inactive)?.is_some_and(|table| lower.is_copy_table(&table)) {
        dm.clear(origin.number)?;
    }
    let mut owner = Owner::new(dm, origin.number, current)?;
    owner.check(dm)?;
    owner.take_over_settings(lower.own.clone(), queue);
    Ok(owner)
}

fn locked<T>(part: &Mutex<Option<T>>) -> MutexGuard<'_, Option<T>> {
    // It is set in one assignment.
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lock(owner: &Mutex<Owner>) -> MutexGuard<'_, Owner> {
    // A panic leaves it usable: before each act it compares what it knows with the kernel's state.
    owner.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an origin's tables are made of. `switch` lines have no direct access to memory (DAX), and the kernel does not load
/// them into a device that has it.
fn form(dm: &Dm, origin: DeviceNumber) -> Form {
    Form::new(!Topology::default().is_dax(origin) && dm.has_target("switch"))
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
            // With such a one no copy is planned.
            return Err(Error::refused(format!(
                "{origin} was changed since the copy was planned: it has a '{}' target, and only linear and striped \
                 devices can be copied live",
                line.target.kind()
            ))
            .state("nothing was changed")
            .next("copy again when no other tool changes the volume; remove a snapshot of LVM's first"));
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
