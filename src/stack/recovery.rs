//! Finds what dead commands left in the kernel, and plans the steps that undo it.
//!
//! A UUID shows that a device is ours, and contains the id of its job. The caller says which jobs are alive; their
//! devices and attached volumes are not touched. The order is safe against crashes:
//! 1. Resume what is suspended (dropping a loaded table first, so that a half-made stack is not activated), then thaw,
//!    because a thaw writes to the device.
//! 2. Give every origin its own table back, from the `real` device, under a watchdog.
//! 3. Remove the devices that preserved originals and the snapshots, then the devices below them.
//!
//! Each step is planned from the current state, so a recovery that dies can be run again: as long as a device of a dead
//! job exists, its step is not done.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::base::{DeviceNumber, Error, ErrorKind, Result};
use crate::dm::naming::{ROLE_KEEP, ROLE_PRESERVE, ROLE_REAL, ROLE_SNAP, ROLE_VOLUME, is_lasting, is_ours};
use crate::dm::{DeviceIdentity, Dm, Slot, Table, Udev};
use crate::format::state::{JobRecord, OriginRecord};
use crate::sys::dm_ioctl::Key;

use super::change::{Action, Change, Executor, IntentLog, NoIntents, Step};
use super::origin_table::LowerDevices;
use super::plan::restoration;

/// A device as reported by the kernel.
#[derive(Clone, Debug)]
pub struct SeenDevice {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// Its number.
    pub number: DeviceNumber,
    /// True if it is suspended with an active table.
    pub suspended: bool,
    /// Its active table.
    pub active: Option<Table>,
    /// Its inactive table.
    pub inactive: Option<Table>,
}

impl SeenDevice {
    /// Its identity, if it is ours.
    #[must_use]
    pub fn identity(&self) -> Option<DeviceIdentity> {
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
pub struct Scene {
    pub devices: Vec<SeenDevice>,
    /// Jobs whose lock is held.
    pub alive: BTreeSet<String>,
    /// The readable records of dead jobs.
    pub dead: Vec<JobRecord>,
}

impl Scene {
    /// True for a device of a dead job, except those that outlive it.
    fn is_leftover(&self, device: &SeenDevice) -> bool {
        device.identity().is_some_and(|identity| {
            let stays =
                is_lasting(&identity.role) && (identity.role != ROLE_VOLUME || device.active.is_some());
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
            // Without a table it is not below anything yet.
            let own = real.active.clone()?;
            Some((identity.id, LowerDevices { own, real: real.number, preserve }))
        };
        with_role(ROLE_REAL).filter_map(stack).collect()
    }

    /// The origins of dead jobs, each with the devices below it.
    #[must_use]
    pub fn origins(&self) -> Vec<(&SeenDevice, LowerDevices)> {
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
            // The first snapshot of a volume leads it to `keep`.
            let leads_to_keep = |table: &Table| {
                let keeps = self
                    .devices
                    .iter()
                    .filter(|device| device.identity().is_some_and(|identity| identity.role == ROLE_KEEP));
                keeps.into_iter().any(|keep| table.maps_to(keep.number))
            };
            let may_load = |table: &Table| {
                leads_to_keep(table) || self.stacks().iter().any(|(_, lower)| lower.is_copy_table(table))
            };
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

/// Plans step 1: a change for each device to be resumed, then one for the thaw.
pub fn plan_release(scene: &Scene) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut seen = BTreeSet::new();
    for (origin, lower) in scene.origins() {
        let drop_loaded = origin.inactive.as_ref().is_some_and(|table| lower.is_copy_table(table));
        if origin.inactive.is_some() && !drop_loaded {
            // A resume would activate another tool's table, so this device is left alone.
            continue;
        }
        if (drop_loaded || origin.suspended) && seen.insert(&origin.name) {
            changes.push(resume_if_suspended(origin, drop_loaded));
        }
    }
    for device in scene.leftovers() {
        if device.suspended && device.active.is_some() && seen.insert(&device.name) {
            // A store that was being enlarged: both its old and its new table are valid.
            changes.push(resume_if_suspended(device, false));
        }
    }
    for device in scene.held_origins() {
        if seen.insert(&device.name) {
            let drop_loaded = device.inactive.is_some();
            changes.push(resume_if_suspended(device, drop_loaded));
        }
    }
    let frozen: Vec<PathBuf> = scene
        .dead
        .iter()
        .filter_map(|record| record.change.as_ref())
        .flat_map(|record| record.frozen.iter().map(PathBuf::from))
        .collect();
    if !frozen.is_empty() {
        changes.push(release().then(Step::new("thaw", Action::Thaw { filesystems: frozen })));
    }
    changes
}

fn release() -> Change {
    Change::new("recover-release")
}

fn resume_if_suspended(device: &SeenDevice, drop_loaded: bool) -> Change {
    let name = device.name.clone();
    let change = release();
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
pub fn plan_restore(scene: &Scene) -> Vec<Change> {
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
pub fn plan_remove(scene: &Scene) -> Vec<Change> {
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

/// The kernel, or a test's fake of it.
pub trait Machine {
    fn scene(&mut self) -> Result<Scene>;
    fn executor(&mut self) -> &mut dyn Executor;
}

/// Runs steps 1 to 3.
///
/// # Errors
/// The first failure, with the others as failed undos. All steps are attempted.
pub fn recover_devices(machine: &mut dyn Machine) -> Result<Vec<String>> {
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
    for change in plan_release(&machine.scene()?) {
        run(machine, change);
    }
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

/// The living jobs in other mount namespaces among the jobs of `devices` (UUID and number). A job without a visible
/// record is alive if its snapshot is claimed.
///
/// # Errors
/// I/O errors.
pub fn living_elsewhere<'a>(
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

/// A device with its tables; None if it has gone meanwhile.
pub fn look_at<'a>(dm: &Dm, device: impl Into<Key<'a>>) -> Result<Option<SeenDevice>> {
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
#[path = "recovery_tests.rs"]
mod tests;
