//! Recovers from dead commands: from the kernel's tables first, from recorded intents second.
//!
//! A job is alive if its lock is held; if its record is not visible (another mount namespace), it is alive if its
//! snapshot's device is held open ([`Action::Claim`](crate::stack::Action::Claim)). The order is safe against crashes:
//! 1. Turn off expedited RCU grace periods if a job may have left them on.
//! 2. Put back origins and remove devices ([`stack::recovery`](crate::stack::recovery)).
//! 3. Release RAM disks and loop devices, and complete what commands of `snapshot` have begun.
//! 4. Remove the partial files of abandoned copies and restores, and the records. (If one of 1 to 3 failed, only those
//!    of jobs that never used a device.)

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::interruptible;
use super::snapshot::settle;
use crate::base::{DeviceNumber, Error, ErrorKind, Result, ResultExt as _};
use crate::dm::naming::{ROLE_DATA, ROLE_KEEP};
use crate::dm::{DeviceIdentity, Dm, Slot, Table};
use crate::format::state::{JobRecord, OriginRecord};
use crate::job::disk_queue;
use crate::job::{FoundJob, find_jobs, find_one, is_expedited, list_jobs, partials, record_of};
use crate::secondary::partial;
use crate::stack::recovery::{Machine, Scene, living_elsewhere, look_at, recover_devices};
use crate::stack::{Executor, Owner, Runner, explain_missing_disk};
use crate::sys::privilege;
use crate::sys::queue::QueueSettings;
use crate::sys::rcu::{self, Expedite};
use crate::volume::lvm_lock::LvmLock;

/// Maximum time of an origin's suspension while its table is put back.
const BUDGET: Duration = Duration::from_secs(2);

/// Maximum wait for the end of a killed process, which may still have I/O in flight.
const DYING_MAX: Duration = Duration::from_secs(60);

/// Interval between checks whether it has ended.
const DYING_PAUSE: Duration = Duration::from_millis(20);

/// The result of a recovery.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RecoverReport {
    /// The actions taken, in words; empty if there was nothing to do.
    pub done: Vec<String>,
    /// Running jobs, which were left alone.
    pub running: Vec<String>,
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
    // One that cannot be examined must not keep the others from it.
    let dropped = record.origins().map(|origin| drop_loaded_into(&dm, id, origin)).collect::<Vec<_>>();
    dropped.into_iter().try_fold(false, |any, dropped| Ok(any | dropped?))
}

fn drop_loaded_into(dm: &Dm, id: &str, origin: &OriginRecord) -> Result<bool> {
    let Some(loaded) = dm.table(origin.number, Slot::Inactive)? else { return Ok(false) };
    // A table of the volume over the layers of its snapshots is loaded by us alone, and they have ids of their own.
    let of_job = |uuid: &str| {
        DeviceIdentity::parse(uuid).is_some_and(|identity| {
            identity.id == id || [ROLE_KEEP, ROLE_DATA].contains(&identity.role.as_str())
        })
    };
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
    // Without the locks of lvm2: it may have to copy originals.
    if only.is_none() && Dm::is_available() {
        match Dm::open().and_then(|dm| settle::settle_all(&dm)) {
            Ok(done) => report.done.extend(done),
            Err(error) => failures.push(error),
        }
    }
    let is_all = give_up(jobs, &mut report, &mut failures);
    failures.extend(disk_queue::remove_dead().err());
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
    let numbers: Vec<DeviceNumber> = numbers.into_iter().collect();
    let _lvm = LvmLock::hold_all(dm, &numbers, &interrupt)?;
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

/// Removes the partial files of an abandoned job, then its record. The record is kept if a file cannot be
/// removed; both are kept if the file's disk or server does not answer.
fn remove_files(job: FoundJob) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let has_origin = job.record.as_ref().is_ok_and(|record| record.origin.is_some());
    for partial in job.record.iter().flat_map(partials) {
        // If the filesystem did not answer, the removal would hang in the kernel, with the locks of all dead jobs held.
        if !interruptible::does_answer(partial, vec![0], &|| Ok(()))? {
            let put_back = if has_origin { "the origin has its own table again; " } else { "" };
            return Err(Error::new(ErrorKind::Timeout, interruptible::no_answer(partial))
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
