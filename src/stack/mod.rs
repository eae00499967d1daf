//! The snapshot stacks over live origins: inserted at one instant, and removed again.
//!
//! Insertion, in order (each step has an undo; see [`insertion`]; each is done for every origin of a group
//! before the next begins):
//! 1. Create three devices: `real` with a copy of the origin's own table, `snap` as a snapshot of `real` on
//!    the COW store, `preserve` as the `snapshot-origin` over `real`. All are resumed *before* anything is
//!    held, as writes do not reach them yet.
//! 2. Sync the filesystems, then freeze them.
//! 3. Load a table into the origin. It leads to `preserve`, but bypasses it where the frozen filesystems
//!    report free space (their map can be read only while the device serves reads; see [`origin_table`]).
//! 4. Suspend the origin: the instant.
//! 5. Resume the origin, which activates the loaded table. Thaw the filesystems.
//!
//! Invariants:
//! - The origins are the only devices that are ever suspended. All of them are at the instant: one instant for
//!   the whole group, or none.
//! - Between the freeze and the thaw nothing waits for udev, and nothing is logged.
//! - A failure at any step restores the origin's own table, with the same text.
//! - `real` holds a copy of that table as long as the stack exists, so the kernel's state alone is enough to
//!   undo it ([`recover`](crate::op::recover)).

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt};
use crate::dm::naming::ROLE_REAL;
use crate::dm::{DeviceIdentity, DeviceInfo, Dm, Slot, SnapshotStatus, Table, Target, node};
use crate::extent::{Extent, ExtentSet};
use crate::format::state::{JobRecord, OriginRecord};
use crate::stack::origin_table::{Form, LowerDevices};
use crate::sys::dm_ioctl::SuspendFlags;
use crate::sys::nudge::Nudge;
use crate::sys::process::crash_point;
use crate::sys::queue::QueueSettings;
use crate::topology::Topology;
use crate::volume::lvm_lock::{LvmLock, LvmScope};

use crate::job::Job;
use member::Member;
use watchdog::Standby;

pub mod change;
mod freeze_estimate;
mod freezing;
pub mod gate;
mod hold_order;
pub mod hooks;
mod intent;
mod isolation;
pub mod kept;
mod layers;
mod member;
mod model;
mod oom;
pub mod origin_table;
mod owner;
mod plan;
pub mod recovery;
mod runner;
pub mod watchdog;
pub mod write_back;

pub use change::{Action, BestEffort, Change, Executor, Step};
#[cfg(test)]
pub use intent::change_record;
pub use layers::StackNames;
pub use model::{AtInstant, HoldTimes, InsertRequest, InstantContext, Skipped, StackRequest};
pub use owner::Owner;
pub use plan::{dismantling, insertion, restoration};
pub use runner::Runner;

/// Most origins that are held at one instant.
pub const ORIGINS_MAX: usize = 32;

/// Attempts to restore the origin's own table. On a slow disk, I/O in flight may take longer than the budget:
/// each attempt may take [`RESTORE_BUDGET_FACTOR`] times as long as the one before, and the origin accepts
/// writes in between.
const RESTORE_ATTEMPTS: u32 = 4;

/// By how much each of the [`RESTORE_ATTEMPTS`] may take longer than the one before.
const RESTORE_BUDGET_FACTOR: u32 = 4;

/// Longest wait for another tool that is changing the origin's table.
const OTHER_TOOL_WAIT_MAX: Duration = Duration::from_secs(60);

/// Pause between two attempts while another tool is changing it.
const OTHER_TOOL_PAUSE: Duration = Duration::from_millis(50);

/// What the kernel does not know about a stack whose process died.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// What is not copied.
    pub skipped: Skipped,
    /// Longest time that the origin may be suspended.
    pub budget: Duration,
    /// How long lvm2 is locked out.
    pub lvm_lock: LvmScope,
    /// How long the origin was held for the instant.
    pub times: HoldTimes,
}

/// An inserted stack. Dropping it changes nothing; [`Stack::remove`] removes the stack.
#[derive(Clone, Debug)]
pub struct Stack {
    origin: String,
    names: StackNames,
    lower: LowerDevices,
    form: Form,
    /// The only code that changes the origin's table. Locked during each change.
    owner: Arc<Mutex<Owner>>,
    /// The snapshot's device, held open exclusively from before the instant until its removal. A process in
    /// another mount namespace cannot see our lock files; an open snapshot tells it that the copy is running.
    claim: Arc<Mutex<Option<File>>>,
    skipped: Skipped,
    logs: Vec<Extent>,
    below: PathBuf,
    budget: Duration,
    times: HoldTimes,
    /// The copy's watchdog, while it has nothing to guard.
    standby: Standby,
    /// The lock of a copy that locks out lvm2 until it ends. Stacks in one volume group share it.
    lvm: Arc<Mutex<Option<Arc<LvmLock>>>>,
}

/// The origin is held, and lvm2 locked out, as long as this value lives.
#[derive(Debug)]
pub struct Hold {
    _lvm: Option<LvmLock>,
}

impl Stack {
    /// Inserts a stack under each origin of `request`, all at one instant. `at_instant` runs while the origins
    /// are quiet. `interrupt` is called before each step of the critical section up to the switch. Returns the
    /// stacks in the order of the request.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for an origin that cannot carry a stack, [`ErrorKind::Timeout`] if the budget
    /// runs out, those of `at_instant` and `interrupt`, the kernel's. After an error everything has been put
    /// back, for all origins.
    pub fn insert(
        dm: &Dm,
        job: &mut Job,
        request: &InsertRequest,
        standby: &Standby,
        at_instant: AtInstant<'_>,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Vec<Self>> {
        let number = |stack: &StackRequest| Ok(dm.info_of(stack.origin.as_str())?.number);
        let numbers = request.stacks.iter().map(number).collect::<Result<Vec<_>>>()?;
        refuse_as_group(request, &numbers, job.id())?;
        // Held from before the tables are read until they lead through the stacks.
        let locks = LvmLock::hold_all(dm, &numbers, interrupt)?;
        let own_tables = request.stacks.iter().map(|stack| own_table(dm, &stack.origin));
        let own_tables = own_tables.collect::<Result<Vec<_>>>()?;
        let found: Vec<(DeviceNumber, Table)> =
            numbers.iter().copied().zip(own_tables.iter().cloned()).collect();
        let request = &request.recheck(&found)?;
        refuse_own_record(job, &request.filesystems)?;
        refuse_second_stack(dm, request, job.id())?;
        let record = |(stack, (number, table)): (&StackRequest, &(DeviceNumber, Table))| OriginRecord {
            device: stack.origin.clone(),
            number: *number,
            table: table.to_string(),
            queue: QueueSettings::read(*number).to_record(),
        };
        job.set_origins(request.stacks.iter().zip(&found).map(record).collect())?;
        job.note_expedited();
        let change = insertion(request, &own_tables, job.id());
        let mut runner = Runner::new(dm, request.budget, interrupt);
        runner.standby = standby.clone();
        runner.at_instant = Some(at_instant);
        runner.frozen.clone_from(&request.planned);
        for (stack, found) in request.stacks.iter().zip(found) {
            let is_only = request.stacks.len() == 1;
            let filesystems = filesystems_above(&request.filesystems, found.0, is_only);
            let form = form(dm, found.0);
            runner.members.push(Member::new(stack, found, &filesystems, form)?);
        }
        change.run(&mut runner, job)?;
        runner.report();
        // Nothing after the change may fail: the stacks are in use now.
        let lvm_lock = request.lvm_lock;
        let stacks = request
            .stacks
            .iter()
            .zip(locks.into_iter().map(|lock| Some(lock).filter(|_| lvm_lock == LvmScope::Copy)));
        Ok(stacks.map(|(stack, lock)| Self::inserted(stack, lock, &mut runner, job.id())).collect())
    }

    /// The stack that `runner` has inserted for `request`.
    fn inserted(
        request: &StackRequest,
        lock: Option<Arc<LvmLock>>,
        runner: &mut Runner<'_>,
        job: &str,
    ) -> Self {
        let names = StackNames::new(&request.origin, job);
        let member = runner.members.remove(0);
        let at = runner.owners.iter().position(|owner| owner.name() == request.origin);
        let owner = runner.owners.remove(at.expect("the change's first steps create the owners"));
        let claim = runner.claims.iter().position(|(device, _)| *device == names.snap);
        let claim = claim.map(|at| runner.claims.remove(at).1);
        Self {
            origin: request.origin.clone(),
            names,
            lower: member.lower.expect("the change loaded a table, or it would have failed"),
            form: member.form,
            below: runner.below.remove(0),
            owner: Arc::new(Mutex::new(owner)),
            claim: Arc::new(Mutex::new(claim)),
            skipped: member.skipped,
            logs: member.logs,
            budget: runner.budget(),
            times: runner.times,
            standby: runner.standby.clone(),
            lvm: Arc::new(Mutex::new(lock)),
        }
    }

    /// The stack of a job whose process died, as found in the kernel. Drops a table of the copy that the dead
    /// process loaded into the origin but did not activate; changes nothing else.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if the kernel no longer has such a stack; `interrupt`'s while it waits for lvm2.
    pub fn adopt(dm: &Dm, job: &Job, adopted: Adopted, interrupt: &dyn Fn() -> Result<()>) -> Result<Self> {
        let FoundStack { record, origin, names, lower, current, claim } = FoundStack::find(dm, job.record())?;
        let lvm = LvmLock::hold(dm, origin.number, interrupt)
            .map_err(|error| error.state("the copy stays as it was"))?;
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
            // The logs only set the order of the copy, and the dead process began with them.
            logs: Vec::new(),
            budget: adopted.budget,
            times: adopted.times,
            standby: Standby::start(job.id()),
            lvm: Arc::new(Mutex::new(Some(Arc::new(lvm)).filter(|_| adopted.lvm_lock == LvmScope::Copy))),
        })
    }

    /// Ranges that were released: in use, but no longer mapped through the snapshot.
    #[must_use]
    pub fn released(&self) -> Vec<Extent> {
        released(&self.lower, lock(&self.owner).active(), &self.skipped.extents)
    }

    /// Where the copy's watchdog waits for its next order.
    #[must_use]
    pub fn standby(&self) -> &Standby {
        &self.standby
    }

    /// How long the origin was held.
    #[must_use]
    pub fn times(&self) -> HoldTimes {
        self.times
    }

    /// A path to the device `real`: the origin's data, read below the snapshot.
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

    /// Where the filesystems' logs are, as far as known: these are written most often.
    #[must_use]
    pub fn logs(&self) -> &[Extent] {
        &self.logs
    }

    /// The origin's size.
    #[must_use]
    pub fn size(&self) -> Bytes {
        self.lower.own.length().bytes()
    }

    /// The number of the device `real`.
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

    /// Replaces the origin's table, in one call of the kernel, by one that no longer preserves the ranges in
    /// `released`. Returns how long the origin was held. A suspension by [`Stack::hold`] ends with it.
    ///
    /// The kernel first waits for I/O in flight, which includes writes that wait for the store, and holds new
    /// I/O meanwhile. `nudge` ends that wait when the freeze budget runs out.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] if another tool has replaced the table; [`ErrorKind::Refused`] if another
    /// tool is about to, and a retry can succeed; [`ErrorKind::Interrupted`] if I/O in flight took longer
    /// than the budget; the kernel's. After any of these the table is unchanged.
    pub fn release(
        &self,
        dm: &Dm,
        released: &[Extent],
        hold: Option<&Hold>,
        nudge: &Nudge,
    ) -> Result<Duration> {
        let mut owner = lock(&self.owner);
        // Free ranges of a region stay free: a run of them alone counts as a free run, as before.
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

    /// Suspends the origin until [`Stack::release`] or [`Stack::resume_if_suspended`]. After `limit`, `nudge`
    /// ends the wait for I/O in flight.
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

    /// True if this process holds the origin suspended, as far as it knows.
    #[must_use]
    pub fn is_held(&self) -> bool {
        lock(&self.owner).is_held()
    }

    /// Resumes the origin if this process suspended it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resume_if_suspended(&self, dm: &Dm) -> Result<()> {
        lock(&self.owner).resume_if_suspended(dm)
    }

    /// Locks lvm2 out of the origin's volume group, unless a command of lvm2 is running: then that command
    /// goes first. None if the lock is held already.
    fn keep_lvm_away(&self, dm: &Dm, owner: &Owner) -> Result<Option<LvmLock>> {
        if self.keeps_lvm_away() {
            return Ok(None);
        }
        let busy =
            || Error::refused(format!("an LVM command is changing the volume group of {}", self.origin));
        LvmLock::try_hold(dm, owner.number())?.ok_or_else(busy).map(Some)
    }

    /// A released range must never be preserved again. Its content is newer than the instant, and at the end
    /// the copy is overlaid with every original that the store holds for copied ranges.
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

    /// The status of the snapshot.
    ///
    /// # Errors
    /// The kernel's.
    pub fn snapshot_status(&self, dm: &Dm) -> Result<SnapshotStatus> {
        dm.snapshot_status(&self.names.snap)
    }

    /// Fails if the origin no longer writes through the stack, because another tool has replaced its table
    /// (`lvextend` does). Originals may be missing then. To be called after the last read, before success is
    /// reported.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`].
    pub fn check_in_place(&self, dm: &Dm) -> Result<()> {
        match lock(&self.owner).check(dm) {
            // Another tool is about to change it. Everything read so far is still valid.
            Err(error) if error.kind() == ErrorKind::Refused => Ok(()),
            result => result,
        }
    }

    /// Removes the stack: restores the origin's own table, then removes the devices below. Can be repeated
    /// after a failure. If another tool has given the origin another table, that table stays.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&self, dm: &Dm, job: &mut Job) -> Result<()> {
        self.restore(dm, job)?;
        *locked(&self.claim) = None;
        let mut runner = Runner::new(dm, self.budget, &|| Ok(()));
        let mut change = dismantling(&self.names);
        let names = self.names.removable().into_iter();
        let left = names.map(|(_, name)| Ok((name, dm.info(name)?.is_some()))).collect::<Result<Vec<_>>>()?;
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

    /// Restores the origin's own table and nothing more: the devices below stay. Waits only for the origin
    /// and, for a logical volume, for lvm2.
    ///
    /// # Errors
    /// The kernel's.
    pub fn restore(&self, dm: &Dm, job: &mut Job) -> Result<()> {
        self.put_back(dm, job).map_err(|error| {
            let error = error
                .context(format!("putting back the table of {}", self.origin))
                .state(format!("{} stays in use, with the snapshot in place", self.origin))
                .next("run 'tidemark recover'");
            explain_missing_disk(error, &self.origin, &self.lower.own)
        })?;
        // No copy depends on the volume any more, so LVM may change it.
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
        // Interrupts are ignored here: the table is restored, or the error reports that it is not.
        let _lvm = match self.keeps_lvm_away() {
            true => None,
            false => Some(LvmLock::hold(dm, owner.number(), &|| Ok(()))?),
        };
        let begin = Instant::now();
        let mut attempt = 1;
        let mut budget = self.budget;
        loop {
            // Use the current name. If the device is gone, there is no table to restore.
            let Some(origin) = owner.device(dm)? else { return Ok(()) };
            let active =
                dm.table(origin.number, Slot::Active)?.filter(|table| self.lower.is_stack_table(table));
            let Some(active) = active else { return Ok(()) };
            let mut runner = Runner::new(dm, budget, &|| Ok(()));
            runner.standby = self.standby.clone();
            // The device `real` holds the table to restore, so this works even if the record cannot be
            // written.
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
                // No attempt brings a disk back.
                Err(error) if attempt >= RESTORE_ATTEMPTS || missing_disk(&self.lower.own).is_some() => {
                    return Err(error);
                }
                Err(error) => tracing::warn!("{error}; trying again"),
            }
            attempt += 1;
            budget = budget.saturating_mul(RESTORE_BUDGET_FACTOR);
        }
    }
}

/// Adds advice to `error`, which came from restoring table `own` of `origin`, if one of the table's disks is
/// gone. The kernel then loads no table that uses that disk, and the stack stays as long as the origin
/// exists.
pub fn explain_missing_disk(error: Error, origin: &str, own: &Table) -> Error {
    match missing_disk(own) {
        None => error,
        Some(disk) => error
            .context(format!("the disk {disk} under {origin} was removed"))
            .state(format!(
                "{origin} still maps to the copy's devices, and its I/O fails because of that disk"
            ))
            .next(missing_disk_remedy(origin)),
    }
}

/// A disk of table `own` that was removed.
pub fn missing_disk(own: &Table) -> Option<DeviceNumber> {
    own.devices().into_iter().find(|disk| !Topology::default().node(*disk).exists())
}

/// What to do with `origin` after one of its disks was removed.
pub fn missing_disk_remedy(origin: &str) -> String {
    format!("unmount {origin}, remove it ('dmsetup remove {origin}'), and run 'tidemark recover'")
}

fn released(lower: &LowerDevices, current: &Table, skipped: &[Extent]) -> Vec<Extent> {
    let mut preserved: ExtentSet = lower.preserved(current).into_iter().collect();
    preserved.extend(skipped.iter().copied());
    let whole = Extent::new(Bytes::ZERO, lower.own.length().bytes());
    whole.into_iter().flat_map(|whole| preserved.gaps_in(whole)).collect()
}

fn cannot_resume(job: &str, what: String) -> Error {
    Error::refused(format!("job {job} cannot be resumed: {what}"))
        .state("nothing was changed")
        .next("run 'tidemark recover', which undoes what is left of it, then copy again")
}

/// The complete stack of a job whose process died. Held by its claim; nothing is changed.
pub struct FoundStack<'a> {
    record: &'a OriginRecord,
    origin: DeviceInfo,
    names: StackNames,
    lower: LowerDevices,
    /// The origin's active table.
    current: Table,
    claim: File,
}

impl<'a> FoundStack<'a> {
    /// Finds the stack.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if the kernel no longer has such a stack; the kernel's.
    pub fn find(dm: &Dm, job: &'a JobRecord) -> Result<Self> {
        let cannot_resume = |what: String| cannot_resume(&job.job, what);
        let record =
            job.origin.as_ref().ok_or_else(|| cannot_resume("its record names no origin".to_owned()))?;
        if !job.further_origins.is_empty() {
            return Err(cannot_resume("it holds several origins".to_owned()));
        }
        let names = StackNames::new(&record.device, &job.job);
        // By number: the origin may have been renamed.
        let origin = check_adoptable(dm.info(record.number)?, &record.device, &cannot_resume)?;
        for (_, name) in names.removable() {
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
            return Err(cannot_resume(format!("{} no longer preserves anything", names.preserve)));
        }
        let current = dm
            .table(origin.number, Slot::Active)?
            .filter(|table| lower.is_stack_table(table))
            .ok_or_else(|| {
                cannot_resume(format!(
                    "{} no longer writes through its snapshot: another tool replaced its table",
                    origin.name
                ))
            })?;
        let status = dm.snapshot_status(&names.snap)?;
        if !status.is_usable() {
            return Err(cannot_resume(format!("the snapshot was lost ({status:?})")));
        }
        let claim = dm.claim(number(&names.snap)?)?;
        Ok(Self { record, origin, names, lower, current, claim })
    }

    /// The number of the device that carries the origin's own table.
    #[must_use]
    pub fn number(&self) -> DeviceNumber {
        self.lower.real
    }

    /// As [`Stack::released`]; `skipped` was never preserved.
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

    /// Refuses what would stop [`Stack::adopt`]: a table loaded by another tool, or a suspension.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`]; the kernel's.
    pub fn check_adoptable(&self, dm: &Dm) -> Result<()> {
        let loaded = dm.table(self.origin.number, Slot::Inactive)?;
        if loaded.is_some_and(|table| self.lower.is_copy_table(&table)) {
            // Loaded by the dead process; the adoption drops it.
            return Ok(());
        }
        Owner::new(dm, self.origin.number, self.current.clone())?.check(dm)
    }
}

/// Checks a device of a stack that is to be adopted. `cannot_resume` makes the error.
fn check_adoptable(
    found: Option<DeviceInfo>,
    name: &str,
    cannot_resume: &dyn Fn(String) -> Error,
) -> Result<DeviceInfo> {
    let info = found.ok_or_else(|| {
        cannot_resume(format!("there is no device {name} any more")).next(
            "run 'tidemark recover', which undoes what is left, and copy again. If the process died while it \
             restored the origin's table, the copy had already finished or failed: a file with the final \
             name is complete, but may be an older one; check its modification time",
        )
    })?;
    if !info.has_active {
        return Err(cannot_resume(format!("{name} was replaced by another device")));
    }
    if info.suspended {
        return Err(cannot_resume(format!("{name} is suspended")));
    }
    Ok(info)
}

/// The owner of an origin whose process died, with the queue settings that the process recorded.
fn take_over(
    dm: &Dm,
    origin: &DeviceInfo,
    current: Table,
    lower: &LowerDevices,
    queue: QueueSettings,
) -> Result<Owner> {
    // The dead process may have loaded a table of the copy. Any other table belongs to another tool.
    if dm.table(origin.number, Slot::Inactive)?.is_some_and(|table| lower.is_copy_table(&table)) {
        dm.clear(origin.number)?;
    }
    let mut owner = Owner::new(dm, origin.number, current)?;
    owner.check(dm)?;
    owner.take_over_settings(lower.own.clone(), queue);
    Ok(owner)
}

fn locked<T>(part: &Mutex<Option<T>>) -> MutexGuard<'_, Option<T>> {
    // Set in one assignment, so it is never half-written.
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lock(owner: &Mutex<Owner>) -> MutexGuard<'_, Owner> {
    // Usable after a panic: before each step the owner compares what it knows with the kernel's state.
    owner.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which targets the origin's tables use. `switch` has no direct access to memory (DAX), and the kernel does
/// not load it into a device that has DAX.
pub fn form(dm: &Dm, origin: DeviceNumber) -> Form {
    Form::new(!Topology::default().is_dax(origin) && dm.has_target("switch"))
}

/// The origin's table, if it can carry a stack.
fn own_table(dm: &Dm, origin: &str) -> Result<Table> {
    let info = dm.info_of(origin)?;
    let table = dm.active_table(origin)?;
    if info.suspended || info.has_inactive {
        return Err(Error::refused(format!(
            "another tool is changing {origin}: it is suspended or has an inactive table"
        ))
        .state("nothing was changed")
        .next("wait until that is done; after a crash: 'tidemark recover', or 'dmsetup resume'"));
    }
    for line in table.lines() {
        if !matches!(line.target, Target::Linear { .. } | Target::Striped { .. } | Target::Switch { .. }) {
            // No copy is planned for such a target, so the table has changed since.
            return Err(Error::refused(format!(
                "{origin} was changed since the copy was planned: it has a '{}' target, and only linear and striped \
                 devices can be copied live",
                line.target.kind()
            ))
            .state("nothing was changed")
            .next("copy again when no other tool changes the volume; remove LVM snapshots first"));
        }
    }
    Ok(table)
}

/// Those of `filesystems`, mount points, that are on the origin `number`: all if it is the only one.
fn filesystems_above(filesystems: &[PathBuf], number: DeviceNumber, is_only: bool) -> Vec<PathBuf> {
    if is_only {
        return filesystems.to_vec();
    }
    let above = Topology::default().above(number);
    // A path that cannot be examined is not lost: the freeze, which opens it, reports that.
    let is_above = |path: &&PathBuf| {
        std::fs::metadata(path).is_ok_and(|meta| above.contains(&DeviceNumber::from_dev(meta.dev())))
    };
    filesystems.iter().filter(is_above).cloned().collect()
}

/// Origins that cannot be held at one instant.
fn refuse_as_group(request: &InsertRequest, numbers: &[DeviceNumber], job: &str) -> Result<()> {
    // One origin needs no look at what is above it, which asks every loop device.
    if request.stacks.len() == 1 {
        return Ok(());
    }
    let refused = |what: String| Error::refused(what).state("nothing was changed");
    if request.stacks.len() > ORIGINS_MAX {
        return Err(refused(format!("{} origins at once: {ORIGINS_MAX} are possible", request.stacks.len())));
    }
    let (mut seen, mut identities) = (BTreeSet::new(), BTreeSet::new());
    for (stack, number) in request.stacks.iter().zip(numbers) {
        if !seen.insert(number) {
            return Err(refused(format!("{} is named twice", stack.origin)));
        }
        // Two devices cannot have one UUID, which holds the beginning of the name.
        if !identities.insert(DeviceIdentity::new(&stack.origin, ROLE_REAL, job).uuid()) {
            return Err(refused(format!(
                "the name of {} begins like that of another origin of the group",
                stack.origin
            ))
            .next("rename one of them"));
        }
    }
    let topology = Topology::default();
    for (stack, number) in request.stacks.iter().zip(numbers) {
        let above = topology.above(*number);
        let upper =
            request.stacks.iter().zip(numbers).find(|(_, other)| *other != number && above.contains(other));
        if let Some((upper, _)) = upper {
            return Err(refused(format!(
                "{} is on {}: both cannot be held at once",
                upper.origin, stack.origin
            ))
            .next("copy only one of them"));
        }
    }
    Ok(())
}

/// An origin carries one stack at a time.
fn refuse_second_stack(dm: &Dm, request: &InsertRequest, job: &str) -> Result<()> {
    for stack in &request.stacks {
        for (_, name) in StackNames::new(&stack.origin, job).removable() {
            if dm.info(name)?.is_some() {
                return Err(Error::refused(format!("a device {name} exists already for {}", stack.origin))
                    .state("nothing was changed")
                    .next("wait for the copy in progress ('tidemark status'), or run 'tidemark recover'"));
            }
        }
    }
    Ok(())
}

/// The job record must not be on a filesystem that is about to be frozen.
fn refuse_own_record(job: &Job, filesystems: &[PathBuf]) -> Result<()> {
    let record = job.filesystem()?;
    for path in filesystems {
        let meta = std::fs::metadata(path).io_context(|| format!("examining {}", path.display()))?;
        if DeviceNumber::from_dev(meta.dev()) == record {
            return Err(Error::refused(format!(
                "{} is on the filesystem {} that is to be frozen",
                super::job::RUN_DIR,
                path.display()
            ))
            .next("mount a tmpfs on /run, as every distribution does"));
        }
    }
    Ok(())
}
