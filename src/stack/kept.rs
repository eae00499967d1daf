//! The layers of a volume whose snapshots are kept, and the instant of a new snapshot.
//!
//! ```text
//!   volume            linear -> keep
//!   keep              snapshot-origin -> data         only the newest store receives originals
//!   data              the volume's own table
//!   view of newest    snapshot <data> <its store>
//!   view of an older  snapshot <view of the next newer> <its store>
//! ```
//!
//! So a first write costs one preservation, however many snapshots there are. An older snapshot is read through its own
//! store, then through the newer ones in the order of their instants, then from `data`.
//!
//! The first snapshot puts `data` and `keep` below the volume, as a copy does with its stack: everything is made
//! before, and the instant is the suspension of the volume, which is resumed with its new table. For a further one the
//! layers exist. Its view is loaded before, but not resumed, so it receives nothing; it is resumed while the volume is
//! suspended: from then on it receives. The former newest view still receives as well, until [`op::snapshot`] lets it
//! read through the new one. That costs time, but is never wrong.
//!
//! [`op::snapshot`]: crate::op::snapshot

use std::path::PathBuf;
use std::time::Duration;

use crate::base::{ChunkSize, DeviceNumber, Result, Sectors};
use crate::dm::naming::{ROLE_DATA, ROLE_KEEP, ROLE_VIEW, SnapshotNames, VolumeNames};
use crate::dm::target::Persistence;
use crate::dm::{DeviceIdentity, Dm, Table, Target, Template, Udev};
use crate::format::state::OriginRecord;
use crate::job::Job;
use crate::sys::queue::QueueSettings;
use crate::volume::FreezeSet;

use super::change::{Action, Change, IntentLog, Step};
use super::member::Member;
use super::model::{AtInstant, HoldTimes, StackRequest};
use super::plan::{own, restoration, resume, resume_with_own_table, suspend, undo_by_reload};
use super::runner::Runner;
use super::watchdog::Standby;
use super::{RESTORE_ATTEMPTS, RESTORE_BUDGET_FACTOR, form, own_table, refuse_own_record};

/// A snapshot to be created.
#[derive(Clone, Debug)]
pub struct Capture {
    /// The volume's device-mapper name.
    pub volume: String,
    /// The id of its set of snapshots.
    pub set: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// Its id.
    pub id: String,
    /// Its store's device.
    pub store: DeviceNumber,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// Mount points of the filesystems on the volume, in the order of freezing.
    pub filesystems: Vec<PathBuf>,
    /// The filesystems as found by the plan, checked again before anything is done.
    pub planned: FreezeSet,
    /// Let the suspension freeze what is mounted on the volume itself.
    pub lock_filesystem: bool,
    /// Longest time that anything may be frozen or suspended.
    pub budget: Duration,
}

/// The table of a view that reads through `upper`.
///
/// # Errors
/// As [`Table::new`].
pub fn view_table(
    length: Sectors,
    upper: DeviceNumber,
    store: DeviceNumber,
    chunk: ChunkSize,
) -> Result<Table> {
    let target = Target::Snapshot {
        origin: upper,
        cow: store,
        persistence: Persistence::PersistentOverflow,
        chunk: chunk.sectors(),
    };
    Table::single(length, target)
}

/// True for the table of a volume that leads to `keep`, and through it to `data`.
#[must_use]
pub fn leads_to(table: &Table, keep: DeviceNumber) -> bool {
    matches!(table.lines(), [line] if line.target == Target::Linear { device: keep, offset: Sectors::ZERO })
}

/// The plan of a capture: the value that [`run`] executes. `own_table` is the volume's active table; `is_first`: it
/// does not lead to `keep` yet.
#[must_use]
pub fn capture(capture: &Capture, own_table: &Table, is_first: bool) -> Change {
    let plan = Plan { capture, own_table, names: VolumeNames::new(&capture.volume, &capture.set) };
    let change = Change::new("capture").then(Step::new("own", own(&capture.volume, own_table)));
    let change = if is_first { plan.layer(change, ROLE_DATA, own_table.into(), true) } else { change };
    let length = own_table.length().get();
    let chunk = capture.chunk.sectors().get();
    let view = format!("0 {length} snapshot {{{}}} {} PO {chunk}", plan.names.data, capture.store);
    let change = plan.layer(change, ROLE_VIEW, Template::new(view), is_first);
    if is_first { plan.first(change) } else { plan.further(change) }
}

struct Plan<'a> {
    capture: &'a Capture,
    own_table: &'a Table,
    names: VolumeNames,
}

impl Plan<'_> {
    fn view(&self) -> String {
        SnapshotNames::new(&self.capture.volume, &self.capture.snapshot, &self.capture.id).view
    }

    /// Creates a device and loads its table; resumes it if `is_resumed`.
    fn layer(&self, change: Change, role: &'static str, table: Template, is_resumed: bool) -> Change {
        let (device, id) = match role {
            ROLE_DATA => (self.names.data.clone(), &self.capture.set),
            ROLE_KEEP => (self.names.keep.clone(), &self.capture.set),
            _ => (self.view(), &self.capture.id),
        };
        let uuid = DeviceIdentity::new(&self.capture.volume, role, id).uuid();
        let remove = Action::Remove { device: device.clone(), udev: Udev::Internal };
        let change = change
            .then(
                Step::new(&format!("create-{role}"), Action::Create { device: device.clone(), uuid })
                    .undo(remove),
            )
            .then(Step::new(&format!("load-{role}"), Action::Load { device: device.clone(), table }));
        if is_resumed {
            let resume = Action::Resume { device, udev: Udev::Internal };
            change.then(Step::new(&format!("resume-{role}"), resume))
        } else {
            change
        }
    }

    fn freeze(&self, change: Change) -> Change {
        let filesystems = || self.capture.filesystems.clone();
        let guard = Action::Guard { devices: vec![self.capture.volume.clone()], filesystems: filesystems() };
        change.then(Step::new("guard", guard).undo(Action::Dismiss)).then(
            Step::new("freeze", Action::Freeze { filesystems: filesystems() })
                .undo(Action::Thaw { filesystems: filesystems() }),
        )
    }

    fn thaw(&self, change: Change) -> Change {
        let volume = || self.capture.volume.clone();
        change
            .then(Step::new("thaw", Action::Thaw { filesystems: self.capture.filesystems.clone() }))
            .then(Step::new("unguard", Action::Unguard))
            .then(Step::new("expect", Action::ExpectOver { device: volume() }))
    }

    fn suspend(&self) -> Step {
        let volume = &self.capture.volume;
        let action = suspend(volume, true, self.capture.lock_filesystem);
        resume_with_own_table(volume).into_iter().fold(Step::new("suspend", action), Step::undo)
    }

    fn first(&self, change: Change) -> Change {
        let volume = &self.capture.volume;
        let length = self.own_table.length().get();
        let keep = Template::new(format!("0 {length} snapshot-origin {{{}}}", self.names.data));
        let change = self.freeze(self.layer(change, ROLE_KEEP, keep, true));
        let through = Template::new(format!("0 {length} linear {{{}}} 0", self.names.keep));
        let load = Action::Load { device: volume.clone(), table: through };
        let switch = Step::new("switch", resume(volume));
        let switch = undo_by_reload(switch, volume, self.own_table, &self.capture.filesystems);
        let change = change
            .then(Step::new("load-volume", load).undo(Action::Clear { device: volume.clone() }))
            .then(self.suspend())
            .then(Step::new("instant", Action::Instant))
            .then(switch);
        self.thaw(change)
    }

    fn further(&self, change: Change) -> Change {
        // Without a cookie: nothing may wait for udev while the volume is suspended.
        let activate = Action::Resume { device: self.view(), udev: Udev::None };
        let change = self
            .freeze(change)
            .then(self.suspend())
            .then(Step::new("activate", activate))
            .then(Step::new("instant", Action::Instant))
            .then(Step::new("resume", resume(&self.capture.volume)));
        self.thaw(change)
    }
}

/// Takes the instant: afterwards the snapshot's view receives originals. Returns how long the volume was held.
///
/// # Errors
/// [`ErrorKind::Timeout`](crate::base::ErrorKind::Timeout) if the budget runs out, refusals, those of `at_instant` and
/// `interrupt`, the kernel's. After an error everything was put back.
pub fn run(
    dm: &Dm,
    job: &mut Job,
    request: &Capture,
    standby: &Standby,
    at_instant: AtInstant<'_>,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<HoldTimes> {
    let number = dm.info_of(request.volume.as_str())?.number;
    let table = own_table(dm, &request.volume)?;
    let names = VolumeNames::new(&request.volume, &request.set);
    let uuid = DeviceIdentity::new(&request.volume, ROLE_KEEP, &request.set).uuid();
    let keep = dm.info(names.keep.as_str())?.filter(|info| info.uuid == uuid);
    let is_first = !keep.is_some_and(|keep| leads_to(&table, keep.number));
    let frozen = request.planned.recheck(&[number], "since the snapshot was planned")?;
    let request = &Capture {
        lock_filesystem: frozen.frozen_by_suspension.contains(&number),
        filesystems: frozen.points.clone(),
        planned: frozen,
        ..request.clone()
    };
    refuse_own_record(job, &request.filesystems)?;
    job.set_origins(vec![OriginRecord {
        device: request.volume.clone(),
        number,
        table: table.to_string(),
        queue: QueueSettings::read(number).to_record(),
    }])?;
    job.note_expedited();
    let change = capture(request, &table, is_first);
    let mut runner = Runner::new(dm, request.budget, interrupt);
    runner.standby = standby.clone();
    runner.at_instant = Some(at_instant);
    runner.frozen = Some(request.planned.clone());
    let member = StackRequest {
        origin: request.volume.clone(),
        cow: request.store,
        chunk: request.chunk,
        lock_filesystem: request.lock_filesystem,
        all: true,
        planned_table: None,
    };
    runner.members.push(Member::new(&member, (number, table), &request.filesystems, form(dm, number))?);
    change.run(&mut runner, job)?;
    runner.report();
    Ok(runner.times)
}

/// Gives the volume its own table back, which `data` carries. Nothing preserves originals any more then.
///
/// # Errors
/// The kernel's. The volume stays in use in any case.
pub fn restore(
    dm: &Dm,
    volume: &str,
    names: &VolumeNames,
    budget: Duration,
    journal: &mut dyn IntentLog,
) -> Result<()> {
    lead(dm, volume, &dm.active_table(&names.data)?, budget, journal)
}

/// Gives the volume the table `to`, which shows the same as the one that it has.
///
/// # Errors
/// As [`restore`].
pub fn lead(dm: &Dm, volume: &str, to: &Table, budget: Duration, journal: &mut dyn IntentLog) -> Result<()> {
    let current = dm.active_table(volume)?;
    let mut budget = budget;
    let mut attempt = 1;
    loop {
        let mut runner = Runner::new(dm, budget, &|| Ok(()));
        match restoration(volume, &current, to).run(&mut runner, journal) {
            Ok(()) => return Ok(()),
            Err(error) if attempt >= RESTORE_ATTEMPTS => {
                return Err(error
                    .context(format!("replacing the table of {volume}"))
                    .state(format!("{volume} stays in use as it was")));
            }
            Err(error) => tracing::warn!("{error}; trying again"),
        }
        attempt += 1;
        budget = budget.saturating_mul(RESTORE_BUDGET_FACTOR);
    }
}
