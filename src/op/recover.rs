//! Recovers from dead commands: from the kernel's tables first, from recorded intents second.
//!
//! A UUID shows that a device is ours, and contains the id of its job. A job is alive if its lock is held; if its
//! record is not visible (another mount namespace), if its snapshot's device is held open ([`Action::Claim`]). Devices
//! of living jobs and attached volumes are not touched. The order is safe against crashes:
//! 1. Turn off expedited RCU grace periods if a job may have left them on. Resume what is suspended (dropping a loaded
//!    table first, so that a half-made stack is not activated), then thaw, because a thaw writes to the device.
//! 2. Give every origin its own table back, from the `real` device, under a watchdog.
//! 3. Remove the devices that preserved originals and the snapshots, then the devices beneath them.
//! 4. Release RAM disks and loop devices.
//! 5. Remove the partial files of copies and restores that are given up, and the records. (If one of 1 to 4 failed,
//!    only those of jobs that never used a device.)
//!
//! Each step is planned from the current state, so a recover that dies can be run again: as long as a device of a dead
//! job exists, its step is not done.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::base::{DeviceNumber, Error, ErrorKind, Result, ResultExt as _};
use crate::dm::naming::{ROLE_KEPT, ROLE_PRESERVE, ROLE_REAL, ROLE_SNAP, ROLE_VOLUME, is_ours};
use crate::dm::{DeviceIdentity, Dm, Slot, Table, Udev};
use crate::format::state::{JobRecord, OriginRecord};
use crate::secondary::partial;
use crate::stack::origin_table::LowerDevices;
use crate::stack::{Action, Change, Executor, IntentLog, NoIntents, Owner, Step};
use crate::sys::dm_ioctl::Key;
use crate::sys::queue::QueueSettings;
use crate::sys::rcu::{self, Expedite};
use crate::volume::lvm_lock::LvmLock;

use super::leave;
use crate::job::{FoundJob, find_jobs, find_one, is_expedited, list_jobs, partials, record_of};
use crate::stack::{Runner, explain_missing_disk, restoration};
use crate::sys::privilege;

/// Maximum time of an origin's suspension while its table is put back.
const BUDGET: Duration = Duration::from_secs(2);

/// Maximum wait for the end of a killed process, which may still have I/O in flight.
const DYING_MAX: Duration = Duration::from_secs(60);

/// Interval between checks whether it has ended.
const DYING_PAUSE: Duration = Duration::from_millis(20);

/// A device as reported by the kernel.
#[derive(Clone, Debug)]
pub(super) struct SeenDevice {
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) number: DeviceNumber,
    pub(super) suspended: bool,
    pub(super) active: Option<Table>,
    pub(super) inactive: Option<Table>,
}

impl SeenDevice {
    fn identity(&self) -> Option<DeviceIdentity> {
        DeviceIdentity::parse(&self.uuid)
    }

    fn is_active_on(&self, number: DeviceNumber) -> bool {
        self.active.as_ref().is_some_and(|table| table.maps_to(number))
    }

    fn is_loaded_on(&self, number: DeviceNumber) -> bool {
        self.inactive.as_ref().is_some_and(|table| table.maps_to(number))
    }
}

/// The state from which recovery is planned.
#[derive(Clone, Debug, Default)]
pub(super) struct Scene {
    pub(super) devices: Vec<SeenDevice>,
    /// Jobs whose lock is held.
    pub(super) alive: BTreeSet<String>,
    /// The readable records of dead jobs.
    pub(super) dead: Vec<JobRecord>,
}

impl Scene {
    /// True for a device of a dead job, except volumes and kept stores.
    fn is_leftover(&self, device: &SeenDevice) -> bool {
        device.identity().is_some_and(|identity| {
            let stays = identity.role == ROLE_KEPT || identity.role == ROLE_VOLUME && device.active.is_some();
            !stays && !self.alive.contains(&identity.id)
        })
    }

    fn leftovers(&self) -> Vec<&SeenDevice> {
        self.devices.iter().filter(|device| self.is_leftover(device)).collect()
    }

    /// The stacks of dead jobs, each with its job's id.
    fn stacks(&self) -> Vec<(String, LowerDevices)> {
        let leftovers = self.leftovers();
        let with_role = |role: &'static str| {
            let identities = leftovers.iter().filter_map(|device| Some((*device, device.identity()?)));
            identities.filter(move |(_, identity)| identity.role == role)
        };
        let stack = |(real, identity): (&SeenDevice, DeviceIdentity)| {
            let is_same_stack =
                |other: &DeviceIdentity| other.id == identity.id && other.volume == identity.volume;
            let preserve = with_role(ROLE_PRESERVE).find(|(_, other)| is_same_stack(other));
            let preserve = preserve.map(|(device, _)| device.number);
            // Without a table it is not beneath anything yet.
            let own = real.active.clone()?;
            Some((identity.id, LowerDevices { own, real: real.number, preserve }))
        };
        with_role(ROLE_REAL).filter_map(stack).collect()
    }

    /// The origins of dead jobs, each with the devices beneath it.
    fn origins(&self) -> Vec<(&SeenDevice, LowerDevices)> {
        let mut found = Vec::new();
        for (job, lower) in self.stacks() {
            let over = self.devices.iter().filter(|device| !self.is_leftover(device));
            let over = over.filter(|device| self.is_origin_over(device, &job, &lower));
            found.extend(over.map(|origin| (origin, lower.clone())));
        }
        found
    }

    /// True if an active or inactive table of `device` is one that a copy loads into its origin above `lower`, and the
    /// record of `job` does not name another origin. Other tools' devices may map to the same devices (for example to
    /// look at one): these are not changed, and a device that they use is not removed.
    fn is_origin_over(&self, device: &SeenDevice, job: &str, lower: &LowerDevices) -> bool {
        let tables = [&device.active, &device.inactive].into_iter().flatten();
        let mut ours = tables.filter(|table| lower.is_stack_table(table)).peekable();
        if ours.peek().is_none() {
            return false;
        }
        let record = self.dead.iter().find(|record| record.job == job);
        match record.filter(|record| record.origin.is_some()) {
            // By number, which cannot change: the device may have been renamed.
            Some(record) => record.origins().any(|origin| origin.number == device.number),
            // Only a copy's table maps to `preserve`. A table on `real` alone, with everything released, could be
            // another tool's: then the name decides, as far as the UUID contains it.
            None => {
                ours.any(|table| !lower.preserved(table).is_empty()) || self.is_named_by(job, &device.name)
            }
        }
    }

    /// Devices that a dead job may have suspended for its insertion. They are identified by number and by the table
    /// that the job found, because name or number may belong to another device by now. A resume would activate another
    /// tool's loaded table, so a device with one is left alone.
    fn held_origins(&self) -> Vec<&SeenDevice> {
        let held = self.dead.iter().flat_map(|record| {
            let suspended = record.change.iter().flat_map(|change| &change.suspended).collect::<Vec<_>>();
            // By its name at that time. A single origin is the suspended one, even if it was renamed.
            let is_held = move |origin: &&OriginRecord| match suspended.as_slice() {
                [] => false,
                names => record.further_origins.is_empty() || names.contains(&&origin.device),
            };
            record.origins().filter(is_held)
        });
        held.filter_map(|origin| {
            let own: Table = origin.table.parse().ok()?;
            let device = self.devices.iter().find(|device| device.number == origin.number)?;
            let may_load = |table: &Table| self.stacks().iter().any(|(_, lower)| lower.is_copy_table(table));
            let is_ours =
                device.active.as_ref() == Some(&own) && device.inactive.as_ref().is_none_or(may_load);
            (device.suspended && is_ours).then_some(device)
        })
        .collect()
    }

    fn is_named_by(&self, job: &str, name: &str) -> bool {
        let of_job = |identity: &DeviceIdentity| identity.id == job && identity.role == ROLE_REAL;
        let mut identities = self.devices.iter().filter_map(SeenDevice::identity);
        let volume = DeviceIdentity::new(name, ROLE_REAL, job).volume;
        identities.any(|identity| of_job(&identity) && identity.volume == volume)
    }
}

/// Plans step 1: resume and thaw.
pub(super) fn plan_release(scene: &Scene) -> Change {
    let mut change = Change::new("recover-release");
    let mut seen = BTreeSet::new();
    for (origin, lower) in scene.origins() {
        let drop_loaded = origin.inactive.as_ref().is_some_and(|table| lower.is_copy_table(table));
        if origin.inactive.is_some() && !drop_loaded {
            // A resume would activate another tool's table, so this device is left alone.
            continue;
        }
        if (drop_loaded || origin.suspended) && seen.insert(&origin.name) {
            change = resume_if_suspended(change, origin, drop_loaded);
        }
    }
    for device in scene.leftovers() {
        if device.suspended && device.active.is_some() && seen.insert(&device.name) {
            // A store that was being enlarged: both its old and its new table are valid.
            change = resume_if_suspended(change, device, false);
        }
    }
    for device in scene.held_origins() {
        if seen.insert(&device.name) {
            let drop_loaded = device.inactive.is_some();
            change = resume_if_suspended(change, device, drop_loaded);
        }
    }
    let frozen: Vec<PathBuf> = scene
        .dead
        .iter()
        .filter_map(|record| record.change.as_ref())
        .flat_map(|record| record.frozen.iter().map(PathBuf::from))
        .collect();
    if frozen.is_empty() {
        return change;
    }
    change.then(Step::new("thaw", Action::Thaw { filesystems: frozen }))
}

fn resume_if_suspended(change: Change, device: &SeenDevice, drop_loaded: bool) -> Change {
    let name = device.name.clone();
    let change = if drop_loaded && device.inactive.is_some() {
        change.then(Step::new("clear", Action::Clear { device: name.clone() }))
    } else {
        change
    };
    if device.suspended {
        change.then(Step::new("resume", Action::Resume { device: name, udev: Udev::None }))
    } else {
        change
    }
}

/// Plans step 2: one change for every origin that still writes through a stack.
pub(super) fn plan_restore(scene: &Scene) -> Vec<Change> {
    scene
        .origins()
        .into_iter()
        .filter_map(|(origin, lower)| {
            let current = origin.active.as_ref().filter(|table| lower.is_stack_table(table))?;
            let mut change = restoration(&origin.name, current, &lower.own);
            change.name = "recover-restore".to_owned();
            Some(change)
        })
        .collect()
}

/// Plans step 3: one change for each device, unused devices first.
pub(super) fn plan_remove(scene: &Scene) -> Vec<Change> {
    let mut left = scene.leftovers();
    let mut plan = Vec::new();
    while !left.is_empty() {
        let free = left.iter().position(|device| {
            !left.iter().any(|other| other.is_active_on(device.number) || other.is_loaded_on(device.number))
        });
        // Tables form no circle. If they did, the kernel would report that the device is busy.
        let device = left.remove(free.unwrap_or(0));
        let action = Action::Remove { device: device.name.clone(), udev: Udev::Internal };
        plan.push(Change::new("recover-remove").then(Step::new("remove", action)));
    }
    plan
}

/// The result of a recovery.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RecoverReport {
    /// The actions taken, in words; empty if there was nothing to do.
    pub done: Vec<String>,
    /// Running jobs, which were left alone.
    pub running: Vec<String>,
}

/// The kernel, or a test's fake of it.
pub(super) trait Machine {
    fn scene(&mut self) -> Result<Scene>;
    fn executor(&mut self) -> &mut dyn Executor;
}

/// Runs steps 1 to 3.
///
/// # Errors
/// The first failure, with the others as failed undos. All steps are attempted.
pub(super) fn recover_devices(machine: &mut dyn Machine) -> Result<Vec<String>> {
    let mut done = Vec::new();
    let mut errors = Vec::new();
    let mut run = |machine: &mut dyn Machine, change: Change| {
        if change.steps.is_empty() {
            return;
        }
        let journal: &mut dyn IntentLog = &mut NoIntents;
        match change.run(machine.executor(), journal) {
            Ok(()) => done.extend(change.steps.iter().map(|step| step.action.to_string())),
            Err(error) => errors.push(error),
        }
    };
    let release = plan_release(&machine.scene()?);
    run(machine, release);
    for change in plan_restore(&machine.scene()?) {
        run(machine, change);
    }
    for change in plan_remove(&machine.scene()?) {
        run(machine, change);
    }
    Error::first_of(errors).map(|()| done).map_err(|error| {
        error.next(
            "find the users of the devices (dmsetup ls --tree, fuser), then run 'tidemark recover' again",
        )
    })
}

/// `tidemark recover`.
///
/// # Errors
/// The first failure, with the others as failed undos. It can be run again at any time.
pub fn recover() -> Result<RecoverReport> {
    privilege::require_root("recovering")?;
    recover_jobs(None)
}

/// Recovers only job `id`, whose process is dying.
///
/// # Errors
/// [`ErrorKind::Timeout`] if the process does not end; else as [`recover`].
pub(super) fn recover_job(id: &str) -> Result<()> {
    let end = Instant::now() + DYING_MAX;
    // Only a check: the lock of a dead job is released again.
    while find_one(id)?.is_some_and(|job| job.alive) {
        if Instant::now() >= end {
            return Err(Error::new(ErrorKind::Timeout, format!("the process of job {id} has not exited")));
        }
        thread::sleep(DYING_PAUSE);
    }
    recover_jobs(Some(id)).map(drop)
}

/// Drops the tables that the dead process `process` of job `id` has loaded into its origins but not activated. Returns
/// whether there were any.
///
/// lvm2 takes any table in the inactive slot for its own, loads none (`dm_tree_preload_children` in its
/// `libdm/libdm-deptree.c`) and activates it: an `lvextend` would report success without a change of the volume's size.
/// An lvm2 command that waits for our lock continues as soon as the process is dead, so this cannot wait for `recover`.
///
/// # Errors
/// I/O errors; errors of the kernel.
pub(super) fn drop_loaded(id: &str, process: u32) -> Result<bool> {
    let record = record_of(id)?;
    // Another process may have resumed the job by now.
    if record.process != process || record.origin.is_none() {
        return Ok(false);
    }
    let dm = Dm::open()?;
    record.origins().try_fold(false, |any, origin| Ok(any | drop_loaded_into(&dm, id, origin)?))
}

fn drop_loaded_into(dm: &Dm, id: &str, origin: &OriginRecord) -> Result<bool> {
    let Some(loaded) = dm.table(origin.number, Slot::Inactive)? else { return Ok(false) };
    let of_job = |uuid: &str| DeviceIdentity::parse(uuid).is_some_and(|identity| identity.id == id);
    let is_ours = origin.table.parse().is_ok_and(|own: Table| own == loaded)
        || dm.list_ours()?.iter().any(|device| of_job(&device.uuid) && loaded.maps_to(device.number));
    if is_ours {
        dm.clear(origin.number)?;
    }
    Ok(is_ours)
}

/// Recovers all jobs, or only job `only`.
fn recover_jobs(only: Option<&str>) -> Result<RecoverReport> {
    let mut report = RecoverReport { done: Vec::new(), running: Vec::new() };
    let mut failures = Vec::new();
    // This comes first, because it does not depend on what may fail below.
    if let Err(error) = end_hurry(only, &mut report.done) {
        failures.push(error);
    }
    let jobs = match Dm::open().and_then(|dm| put_back(&dm, only, &mut report)) {
        Ok(jobs) => jobs,
        // Some jobs have nothing to do with device-mapper.
        Err(error) => {
            failures.push(error);
            find(only)?
        }
    };
    let is_all = give_up(jobs, &mut report, &mut failures);
    if is_all && failures.len() == 1 && !Dm::is_available() {
        // Without device-mapper there can be no device of ours.
        failures.clear();
    }
    Error::first_of(failures).map(|()| report)
}

/// Turns off the kernel's switch for expedited grace periods if the watchdog, which normally does so, died too.
fn end_hurry(only: Option<&str>, done: &mut Vec<String>) -> Result<()> {
    let is_meant = |job: &FoundJob| only.is_none_or(|only| job.id == only);
    let left = |job: &FoundJob| is_meant(job) && !job.alive && job.record.as_ref().is_ok_and(is_expedited);
    if !list_jobs()?.iter().any(left) {
        return Ok(());
    }
    let what = || format!("writing 0 to {}", rcu::PATH);
    let switch = Expedite::open().io_context(what)?;
    if switch.is_ours().io_context(what)? {
        switch.turn_off().io_context(what)?;
        done.push(format!("write 0 to {}", rcu::PATH));
    }
    Ok(())
}

/// Puts back devices and stores. Returns the jobs that were found, with the dead ones locked.
fn put_back(dm: &Dm, only: Option<&str>, report: &mut RecoverReport) -> Result<Vec<FoundJob>> {
    let interrupt = || Ok(());
    let runner = Runner::new(dm, BUDGET, &interrupt);
    let mut machine = KernelMachine { dm, runner, only, jobs: Vec::new(), elsewhere: BTreeSet::new() };
    // From here on no command of lvm2 changes these groups: a suspended origin was suspended by a dead job.
    let scene = machine.scene()?;
    let mut numbers: BTreeSet<DeviceNumber> =
        scene.origins().iter().map(|(origin, _)| origin.number).collect();
    numbers.extend(scene.dead.iter().flat_map(JobRecord::origins).map(|origin| origin.number));
    let lock = |number| LvmLock::hold(dm, number, &interrupt);
    let _lvm = numbers.into_iter().map(lock).collect::<Result<Vec<_>>>()?;
    report.running.extend(machine.elsewhere.iter().cloned());
    let origins = scene.origins().into_iter();
    let tell_gone_disks = |error| {
        origins.fold(error, |error, (origin, lower)| explain_missing_disk(error, &origin.name, &lower.own))
    };
    report.done.extend(recover_devices(&mut machine).map_err(tell_gone_disks)?);
    put_back_settings(dm, &scene.dead)?;
    report.done.extend(crate::store::release_leftovers()?);
    Ok(machine.jobs)
}

/// Puts back queue settings of dead jobs' origins, which are lost when the table is replaced. An origin whose table is
/// not the one that the job found keeps its settings.
fn put_back_settings(dm: &Dm, dead: &[JobRecord]) -> Result<()> {
    for origin in dead.iter().flat_map(JobRecord::origins) {
        let Some(device) = look_at(dm, origin.number)? else { continue };
        let Some(own) = origin.table.parse().ok().filter(|own| device.active.as_ref() == Some(own)) else {
            continue;
        };
        if !device.suspended && device.inactive.is_none() {
            let settings = QueueSettings::from_record(origin.number, &origin.queue);
            Owner::new(dm, origin.number, own.clone())?.take_over_settings(own, settings);
        }
    }
    Ok(())
}

/// Removes files and records of the dead jobs among `jobs`. After an earlier failure, only of jobs that never used a
/// device: the records of the others are still needed. Returns whether no dead job is left.
fn give_up(jobs: Vec<FoundJob>, report: &mut RecoverReport, failures: &mut Vec<Error>) -> bool {
    let failed_before = !failures.is_empty();
    let mut is_all = true;
    for job in jobs {
        if job.alive {
            report.running.push(job.id);
        } else if !failed_before || job.record.as_ref().is_ok_and(is_without_device) {
            let id = job.id.clone();
            match remove_files(job) {
                Ok(removed) => {
                    report.done.extend(removed);
                    report.done.push(format!("remove the record of job {id}"));
                }
                Err(error) => {
                    is_all = false;
                    failures.push(error);
                }
            }
        } else {
            is_all = false;
        }
    }
    is_all
}

/// Removes the partial files of a job that is given up, then its record. The record is kept if a file cannot be
/// removed; both are kept if the file's disk or server does not answer.
fn remove_files(job: FoundJob) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let has_origin = job.record.as_ref().is_ok_and(|record| record.origin.is_some());
    for partial in job.record.iter().flat_map(partials) {
        // If the filesystem did not answer, the removal would hang in the kernel, with the locks of all dead jobs held.
        if !leave::does_answer(partial, vec![0], &|| Ok(()))? {
            let put_back = if has_origin { "the origin has its own table again; " } else { "" };
            return Err(Error::new(ErrorKind::Timeout, leave::no_answer(partial))
                .state(format!("{put_back}this file and the record of job {} are still there", job.id))
                .next("check its disk or server, then run 'tidemark recover' again, which removes both"));
        }
        if partial::remove_leftover(partial)? {
            removed.push(format!("remove {}", partial.display()));
        }
    }
    job.remove()?;
    Ok(removed)
}

fn is_without_device(record: &JobRecord) -> bool {
    record.origin.is_none() && record.change.is_none() && record.copy.is_none()
}

/// Finds all jobs, or one; the dead ones are locked by us.
fn find(only: Option<&str>) -> Result<Vec<FoundJob>> {
    only.map_or_else(find_jobs, |id| Ok(find_one(id)?.into_iter().collect()))
}

struct KernelMachine<'a> {
    dm: &'a Dm,
    /// Only this job is recovered; others count as alive.
    only: Option<&'a str>,
    runner: Runner<'a>,
    /// The jobs found so far. Dead ones stay locked by us.
    jobs: Vec<FoundJob>,
    /// Jobs in another mount namespace: their records are not visible here, but their snapshots are held open.
    elsewhere: BTreeSet<String>,
}

/// The living jobs in other mount namespaces among the jobs of `devices` (UUID and number). A job without a visible
/// record is alive if its snapshot is claimed.
///
/// # Errors
/// I/O errors.
pub(super) fn living_elsewhere<'a>(
    dm: &Dm,
    devices: impl Iterator<Item = (&'a str, DeviceNumber)>,
    is_known: impl Fn(&str) -> bool,
) -> Result<BTreeSet<String>> {
    let mut living = BTreeSet::new();
    for (uuid, number) in devices {
        let Some(identity) = DeviceIdentity::parse(uuid) else { continue };
        if identity.role == ROLE_SNAP && !is_known(&identity.id) && dm.is_claimed(number)? {
            living.insert(identity.id);
        }
    }
    Ok(living)
}

impl Machine for KernelMachine<'_> {
    fn scene(&mut self) -> Result<Scene> {
        // List devices first, then jobs: a job takes its lock before it creates its first device. So the job of a
        // listed device is locked by now, unless it has ended. Then its devices are gone too, as the second look at
        // each shows.
        let names = self.dm.list()?;
        // Search for jobs again each time, so that one that began meanwhile does not count as dead. Dead jobs are kept:
        // they are locked by us, and a new search would take them for living ones.
        self.jobs.retain(|job| !job.alive);
        let fresh = find(self.only)?;
        let known = |job: &FoundJob| self.jobs.iter().any(|dead| dead.id == job.id);
        let fresh: Vec<FoundJob> = fresh.into_iter().filter(|job| !known(job)).collect();
        self.jobs.extend(fresh);
        let mut scene = Scene {
            devices: Vec::new(),
            alive: self.jobs.iter().filter(|job| job.alive).map(|job| job.id.clone()).collect(),
            dead: Vec::new(),
        };
        for job in self.jobs.iter().filter(|job| !job.alive) {
            match &job.record {
                Ok(record) => scene.dead.push(record.clone()),
                Err(error) if error.kind() == ErrorKind::BadData => {
                    tracing::warn!("{error}; using the kernel's tables alone");
                }
                Err(_) => {}
            }
        }
        for (name, _) in names {
            if let Some(device) = look_at(self.dm, name.as_str())? {
                scene.devices.push(device);
            }
        }
        let seen = scene.devices.iter().filter(|device| device.active.is_some());
        let seen = seen.map(|device| (device.uuid.as_str(), device.number));
        let is_known = |id: &str| self.jobs.iter().any(|job| job.id == id);
        self.elsewhere = living_elsewhere(self.dm, seen, is_known)?;
        scene.alive.extend(self.elsewhere.iter().cloned());
        if let Some(only) = self.only {
            let ids = scene.devices.iter().filter_map(|device| Some(device.identity()?.id));
            let others: Vec<String> = ids.filter(|id| id != only).collect();
            scene.alive.extend(others);
        }
        Ok(scene)
    }

    fn executor(&mut self) -> &mut dyn Executor {
        &mut self.runner
    }
}

/// A device with its tables; None if it has gone meanwhile.
fn look_at<'a>(dm: &Dm, device: impl Into<Key<'a>>) -> Result<Option<SeenDevice>> {
    let Some(info) = dm.info(device)? else { return Ok(None) };
    let table = |slot| match dm.table(info.number, slot) {
        Err(error) if error.errno() == Some(libc::ENXIO) => Ok(None),
        // Another tool's table that exceeds our bounds is ignored.
        Err(error) if error.kind() == ErrorKind::BadData && !is_ours(&info.uuid) => Ok(None),
        result => result,
    };
    Ok(Some(SeenDevice {
        active: table(Slot::Active)?,
        inactive: if info.has_inactive { table(Slot::Inactive)? } else { None },
        name: info.name.clone(),
        number: info.number,
        suspended: info.suspended && info.has_active,
        uuid: info.uuid.clone(),
    }))
}

#[cfg(test)]
#[path = "recover_tests.rs"]
mod tests;
