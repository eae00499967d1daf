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
//! Snapshots of several volumes have one instant: all volumes are suspended at it, and none is resumed before it. One
//! watchdog with one budget guards all of them. If one cannot be held, the others are released, and no view receives.
//!
//! # Snapshots of a subset
//!
//! What every snapshot of a volume leaves out leads past `keep`, to `data`: `left_out_by_all`. An older snapshot reads
//! through the newer stores, so a chunk that one of them needs is preserved by the newest. Hence the volume's table is
//! made anew at each instant, from what the new snapshot and all older ones leave out. It is loaded while the
//! filesystems are frozen (the new one's files are mapped then), and in use from the instant on, which waits for writes
//! that went past. Between two instants less is never preserved: a deletion only makes `left_out_by_all` larger than
//! what leads past. If the capture fails, the former table comes back, which preserves what the older snapshots need.
//!
//! [`op::snapshot`]: crate::op::snapshot

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::base::{ChunkSize, DeviceNumber, Error, Result, Sectors};
use crate::dm::naming::{ROLE_DATA, ROLE_KEEP, ROLE_VIEW, SnapshotNames, VolumeNames};
use crate::dm::target::Persistence;
use crate::dm::{DeviceIdentity, Dm, Table, Target, Template, Udev};
use crate::extent::{Extent, ExtentSet};
use crate::format::state::OriginRecord;
use crate::job::Job;
use crate::sys::queue::QueueSettings;
use crate::topology::Topology;
use crate::volume::FreezeSet;
use crate::volume::subset::Omission;

use super::change::{Action, Change, IntentLog, Step};
use super::hold_order::{Held, hold_order};
use super::member::{Older, kept_table, over_data};
use super::model::{AtInstant, HoldTimes, Skipped, StackRequest};
use super::origin_table::Form;
use super::plan::{numbered, own, restoration, resume, resume_with_own_table, suspend, undo_by_reload};
use super::runner::Runner;
use super::watchdog::Standby;
use super::{RESTORE_ATTEMPTS, RESTORE_BUDGET_FACTOR, filesystems_above, form, own_table, refuse_own_record};

/// Snapshots to be created at one instant.
#[derive(Clone, Debug)]
pub struct CaptureRequest {
    /// One for each volume.
    pub captures: Vec<Capture>,
    /// The filesystems on the volumes as found by the plan, checked again before anything is done.
    pub planned: FreezeSet,
    /// Longest time that anything may be frozen or suspended.
    pub budget: Duration,
}

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
    /// What the snapshot leaves out; None if it shows all of the volume.
    pub omission: Option<Arc<Omission>>,
    /// What all of the volume's snapshots so far leave out; None if it has none.
    pub left_out_by_older: Option<ExtentSet>,
}

/// A volume as it is right before the instant.
#[derive(Clone, Debug)]
pub struct FoundVolume {
    /// Its number.
    pub number: DeviceNumber,
    /// Its active table.
    pub table: Table,
    /// The table does not lead to `keep` yet.
    pub is_first: bool,
}

/// The snapshots of [`run`].
#[derive(Clone, Debug)]
pub struct Captured {
    /// How long the volumes were held.
    pub times: HoldTimes,
    /// What each snapshot leaves out, in the order of the request.
    pub left_out: Vec<Skipped>,
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

/// True for the table of a volume that leads to `keep`, and past it to `data` where all snapshots leave something out.
#[must_use]
pub fn leads_to(table: &Table, keep: DeviceNumber, data: DeviceNumber) -> bool {
    over_data(table.length(), data, keep).is_ok_and(|lower| lower.is_stack_table(table))
        && table.maps_to(keep)
}

/// The table of a volume that leads to `keep`, and past it to `data` where all of its snapshots leave something out:
/// `left_out_by_all`.
///
/// # Errors
/// As [`Table::new`].
pub fn volume_table(
    length: Sectors,
    (keep, data): (DeviceNumber, DeviceNumber),
    left_out_by_all: &ExtentSet,
    form: Form,
) -> Result<Table> {
    let by_all: Vec<Extent> = left_out_by_all.iter().collect();
    kept_table(&over_data(length, data, keep)?, &by_all, form)
}

/// The plan of a capture: the value that [`run`] executes. `found` has the volumes in the order of the request. The name
/// of a step that is done for each volume has a number from the second one on: `suspend`, `suspend-2`.
#[must_use]
pub fn capture(request: &CaptureRequest, found: &[FoundVolume]) -> Change {
    let members: Vec<Member> = request.captures.iter().zip(found).enumerate().map(Member::new).collect();
    let points = || request.planned.points.clone();
    let each = |change, add: &dyn Fn(&Member, Change) -> Change| {
        members.iter().fold(change, |change, member| add(member, change))
    };
    let change = each(Change::new("capture"), &|member, change| {
        change.then(member.step("own", own(member.volume(), &member.found.table)))
    });
    let change = each(change, &|member, change| member.make_layers(change));
    let volumes = members.iter().map(|member| member.volume().to_owned()).collect();
    let guard = Action::Guard { devices: volumes, filesystems: points() };
    let change = change.then(Step::new("guard", guard).undo(Action::Dismiss));
    let mut change = each(change, &|member, change| member.load(change));
    let numbers: Vec<DeviceNumber> = found.iter().map(|found| found.number).collect();
    let mut frozen_count = 0;
    let mut suspended: Vec<&Member> = Vec::new();
    for held in hold_order(&request.planned, &numbers) {
        let step = match held {
            Held::Filesystems(filesystems) => {
                frozen_count += 1;
                let undo = Action::Thaw { filesystems: filesystems.clone() };
                Step::new(&numbered("freeze", frozen_count), Action::Freeze { filesystems }).undo(undo)
            }
            Held::Member(index) => {
                change = members[index].load_over(change);
                suspended.push(&members[index]);
                let is_frozen_by_it = request.planned.frozen_by_suspension.contains(&numbers[index]);
                members[index].suspend(is_frozen_by_it)
            }
        };
        change = change.then(step);
    }
    let change =
        each(change, &|member, change| member.activate(change)).then(Step::new("instant", Action::Instant));
    // In the reverse order, so that each is resumed after what it is on.
    let change = (0..suspended.len()).rev().fold(change, |change, at| {
        let still_held: Vec<&str> = suspended[..at].iter().map(|member| member.volume()).collect();
        change.then(suspended[at].resume(&still_held, &request.planned.points))
    });
    let change = change
        .then(Step::new("thaw", Action::Thaw { filesystems: points() }))
        .then(Step::new("unguard", Action::Unguard));
    each(change, &|member, change| {
        change.then(member.step("expect", Action::ExpectOver { device: member.volume().to_owned() }))
    })
}

/// One volume of a capture.
struct Member<'a> {
    index: usize,
    capture: &'a Capture,
    found: &'a FoundVolume,
    names: VolumeNames,
}

impl<'a> Member<'a> {
    fn new((index, (capture, found)): (usize, (&'a Capture, &'a FoundVolume))) -> Self {
        Self { index, capture, found, names: VolumeNames::new(&capture.volume, &capture.set) }
    }

    fn volume(&self) -> &str {
        &self.capture.volume
    }

    fn step(&self, name: &str, action: Action) -> Step {
        Step::new(&numbered(name, self.index + 1), action)
    }

    fn view(&self) -> String {
        SnapshotNames::new(&self.capture.volume, &self.capture.snapshot, &self.capture.id).view
    }

    fn length(&self) -> u64 {
        self.found.table.length().get()
    }

    /// Creates the devices. The view of a further snapshot is not resumed: it receives from then on.
    fn make_layers(&self, change: Change) -> Change {
        let (length, chunk) = (self.length(), self.capture.chunk.sectors().get());
        let view = format!("0 {length} snapshot {{{}}} {} PO {chunk}", self.names.data, self.capture.store);
        if !self.found.is_first {
            return self.layer(change, ROLE_VIEW, Template::new(view), false);
        }
        let keep = format!("0 {length} snapshot-origin {{{}}}", self.names.data);
        let change = self.layer(change, ROLE_DATA, (&self.found.table).into(), true);
        let change = self.layer(change, ROLE_VIEW, Template::new(view), true);
        self.layer(change, ROLE_KEEP, Template::new(keep), true)
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
        let create = Action::Create { device: device.clone(), uuid };
        let change = change
            .then(self.step(&format!("create-{role}"), create).undo(remove))
            .then(self.step(&format!("load-{role}"), Action::Load { device: device.clone(), table }));
        if is_resumed {
            let resume = Action::Resume { device, udev: Udev::Internal };
            change.then(self.step(&format!("resume-{role}"), resume))
        } else {
            change
        }
    }

    /// True if the volume gets a table that depends on what its filesystems use at the instant, or that preserves again
    /// what led past the snapshots: a whole snapshot needs all of it.
    fn leads_past(&self) -> bool {
        self.capture.omission.is_some() || !self.found.is_first && self.found.table.lines().len() > 1
    }

    /// Loads such a table, after the volume's filesystems are frozen and while it still serves reads. It is in use from
    /// the instant on: the suspension waits for writes that went past the snapshots.
    fn load_over(&self, change: Change) -> Change {
        if !self.leads_past() {
            return change;
        }
        let device = self.volume().to_owned();
        let (real, preserve) = (self.names.data.clone(), self.names.keep.clone());
        let clear = Action::Clear { device: device.clone() };
        change.then(self.step("load-volume", Action::LoadOver { device, real, preserve }).undo(clear))
    }

    /// Loads the table that leads the volume to its first snapshot.
    fn load(&self, change: Change) -> Change {
        if !self.found.is_first || self.leads_past() {
            return change;
        }
        let device = self.volume().to_owned();
        let table = Template::new(format!("0 {} linear {{{}}} 0", self.length(), self.names.keep));
        let clear = Action::Clear { device: device.clone() };
        change.then(self.step("load-volume", Action::Load { device, table }).undo(clear))
    }

    fn suspend(&self, lock_filesystem: bool) -> Step {
        let action = suspend(self.volume(), true, lock_filesystem);
        resume_with_own_table(self.volume()).into_iter().fold(self.step("suspend", action), Step::undo)
    }

    /// Lets the view of a further snapshot receive. Without a cookie: nothing may wait for udev while a volume is suspended.
    fn activate(&self, change: Change) -> Change {
        if self.found.is_first {
            return change;
        }
        change.then(self.step("activate", Action::Resume { device: self.view(), udev: Udev::None }))
    }

    /// Ends the suspension, while the volumes `still_held` are suspended.
    fn resume(&self, still_held: &[&str], filesystems: &[PathBuf]) -> Step {
        if !self.found.is_first && !self.leads_past() {
            return self.step("resume", resume(self.volume()));
        }
        let step = self.step("switch", resume(self.volume()));
        let step = still_held.iter().flat_map(|held| resume_with_own_table(held)).fold(step, Step::undo);
        undo_by_reload(step, self.volume(), &self.found.table, filesystems)
    }
}

/// Takes the instant: afterwards the view of each snapshot receives originals. Returns how long the volumes were held,
/// and what is left out.
///
/// # Errors
/// [`ErrorKind::Timeout`](crate::base::ErrorKind::Timeout) if the budget runs out, refusals, those of `at_instant` and
/// `interrupt`, the kernel's. After an error everything was put back, for all volumes.
pub fn run(
    dm: &Dm,
    job: &mut Job,
    request: &CaptureRequest,
    standby: &Standby,
    at_instant: AtInstant<'_>,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Captured> {
    let found = request.captures.iter().map(|capture| find(dm, capture)).collect::<Result<Vec<_>>>()?;
    let numbers: Vec<DeviceNumber> = found.iter().map(|found| found.number).collect();
    refuse_circle(&request.captures, &numbers)?;
    let frozen = request.planned.recheck(&numbers, "since the snapshot was planned")?;
    let request = &CaptureRequest { planned: frozen, ..request.clone() };
    refuse_own_record(job, &request.planned.points)?;
    let record = |(capture, found): (&Capture, &FoundVolume)| OriginRecord {
        device: capture.volume.clone(),
        number: found.number,
        table: found.table.to_string(),
        queue: QueueSettings::read(found.number).to_record(),
    };
    job.set_origins(request.captures.iter().zip(&found).map(record).collect())?;
    job.note_expedited();
    let change = capture(request, &found);
    let mut runner = Runner::new(dm, request.budget, interrupt);
    runner.standby = standby.clone();
    runner.at_instant = Some(at_instant);
    runner.frozen = Some(request.planned.clone());
    for (capture, found) in request.captures.iter().zip(found) {
        let number = found.number;
        let stack = StackRequest {
            origin: capture.volume.clone(),
            cow: capture.store,
            chunk: capture.chunk,
            lock_filesystem: request.planned.frozen_by_suspension.contains(&number),
            all: true,
            omission: capture.omission.clone(),
            planned_table: None,
        };
        let filesystems = filesystems_above(&request.planned.points, number, request.captures.len() == 1);
        let found = (number, found.table);
        let member = super::member::Member::new(&stack, found, &filesystems, form(dm, number))?;
        runner.members.push(member.keeping(Older { left_out: capture.left_out_by_older.clone() }));
    }
    change.run(&mut runner, job)?;
    runner.report();
    let left_out = runner.members.iter_mut().map(|member| std::mem::take(&mut member.skipped)).collect();
    Ok(Captured { times: runner.times, left_out })
}

fn find(dm: &Dm, capture: &Capture) -> Result<FoundVolume> {
    let number = dm.info_of(capture.volume.as_str())?.number;
    let table = own_table(dm, &capture.volume)?;
    let names = VolumeNames::new(&capture.volume, &capture.set);
    let layer = |name: &str, role| -> Result<Option<DeviceNumber>> {
        let uuid = DeviceIdentity::new(&capture.volume, role, &capture.set).uuid();
        Ok(dm.info(name)?.filter(|info| info.uuid == uuid).map(|info| info.number))
    };
    let layers = layer(&names.keep, ROLE_KEEP)?.zip(layer(&names.data, ROLE_DATA)?);
    let is_first = !layers.is_some_and(|(keep, data)| leads_to(&table, keep, data));
    Ok(FoundVolume { number, table, is_first })
}

/// Refuses volumes that lie on each other in a circle: there is no order in which they could be held.
fn refuse_circle(captures: &[Capture], numbers: &[DeviceNumber]) -> Result<()> {
    if captures.len() == 1 {
        return Ok(());
    }
    let topology = Topology::default();
    let above: Vec<_> = numbers.iter().map(|number| topology.above(*number)).collect();
    for (at, number) in numbers.iter().enumerate() {
        let other =
            (0..at).find(|other| above[*other].contains(number) && above[at].contains(&numbers[*other]));
        if let Some(other) = other {
            return Err(Error::refused(format!(
                "{} and {} lie on each other: neither can be held first",
                captures[other].volume, captures[at].volume
            ))
            .state("nothing was frozen")
            .next("end that circle: one of them has to be on another device"));
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::BTreeSet;

    use super::*;
    use crate::base::Bytes;
    use crate::dm::naming::new_id;

    /// Volumes by name, whether the snapshot is their first, and how high they are. A filesystem is mounted on each, at its
    /// name below /.
    type Volumes<'a> = &'a [(&'a str, bool, usize)];

    const GROUPS: &[Volumes<'_>] = &[
        &[("a", true, 0)],
        &[("a", false, 0)],
        &[("a", true, 0), ("b", false, 0), ("c", true, 0)],
        &[("a", false, 0), ("b", false, 0), ("c", false, 0)],
        &[("a", true, 0), ("b", true, 2)],
        &[("a", false, 4), ("b", true, 2), ("c", true, 0)],
    ];

    fn plan(volumes: Volumes<'_>) -> Change {
        plan_of(volumes, None, "0 8192 linear 8:16 2048")
    }

    /// The plan for volumes with this table, of snapshots that leave out `omission`.
    fn plan_of(volumes: Volumes<'_>, omission: Option<Omission>, table: &str) -> Change {
        let omission = omission.map(Arc::new);
        let number = |index: usize| DeviceNumber { major: 253, minor: u32::try_from(index).unwrap() };
        let mut by_height = volumes.to_vec();
        by_height.sort_by_key(|(_, _, height)| Reverse(*height));
        let captures = volumes.iter().map(|(volume, _, _)| Capture {
            volume: (*volume).to_owned(),
            set: new_id(),
            snapshot: "monday".to_owned(),
            id: new_id(),
            store: number(99),
            chunk: ChunkSize::default(),
            omission: omission.clone(),
            left_out_by_older: None,
        });
        let heights = volumes.iter().enumerate().map(|(at, (_, _, height))| (number(at), *height));
        let request = CaptureRequest {
            captures: captures.collect(),
            planned: FreezeSet {
                points: by_height.iter().map(|(volume, _, _)| format!("/{volume}").into()).collect(),
                devices: by_height.iter().map(|_| number(98)).collect(),
                heights: by_height.iter().map(|(_, _, height)| *height).collect(),
                origins: heights.collect(),
                ..FreezeSet::default()
            },
            budget: Duration::from_secs(2),
        };
        let found = volumes.iter().enumerate().map(|(index, (_, is_first, _))| FoundVolume {
            number: number(index),
            table: table.parse().unwrap(),
            is_first: *is_first,
        });
        capture(&request, &found.collect::<Vec<_>>())
    }

    fn names(change: &Change) -> Vec<&str> {
        change.steps.iter().map(|step| step.name.as_str()).collect()
    }

    #[test]
    fn the_steps_of_one_volume_are_these_in_this_order() {
        let first = "own create-data load-data resume-data create-view load-view resume-view create-keep load-keep \
                     resume-keep guard load-volume freeze suspend instant switch thaw unguard expect";
        assert_eq!(names(&plan(&[("a", true, 0)])).join(" "), first);
        let further =
            "own create-view load-view guard freeze suspend activate instant resume thaw unguard expect";
        assert_eq!(names(&plan(&[("a", false, 0)])).join(" "), further);
    }

    #[test]
    fn a_table_that_depends_on_the_instant_is_loaded_after_the_freeze_and_before_the_suspension() {
        let steps = "freeze load-volume suspend instant switch thaw unguard expect";
        let further = "freeze load-volume suspend activate instant switch thaw unguard expect";
        let past = "0 4096 linear 253:8 0\n4096 4096 switch 1 4096 0 253:7 4096";
        let subset = || Some(Omission::default());
        for (volume, omission, table, steps) in [
            (("a", true, 0), subset(), "0 8192 linear 8:16 2048", steps),
            (("a", false, 0), subset(), "0 8192 linear 253:8 0", further),
            // A whole one preserves again what led past the others.
            (("a", false, 0), None, past, further),
        ] {
            let change = plan_of(&[volume], omission, table);
            assert!(names(&change).join(" ").ends_with(&format!("guard {steps}")), "{:?}", names(&change));
            let load = change.steps.iter().find(|step| step.name == "load-volume").unwrap();
            assert!(matches!(load.action, Action::LoadOver { .. }), "{:?}", load.action);
            let switch = change.steps.iter().find(|step| step.name == "switch").unwrap();
            let own =
                Action::Load { device: "a".to_owned(), table: (&table.parse::<Table>().unwrap()).into() };
            assert!(switch.undo.contains(&own), "{:?}", switch.undo);
        }
        let change = plan_of(&[("a", false, 0), ("b", true, 2)], subset(), "0 8192 linear 253:8 0");
        let held = "freeze load-volume-2 suspend-2 freeze-2 load-volume suspend activate instant switch switch-2 thaw";
        assert!(names(&change).join(" ").contains(held), "{:?}", names(&change));
    }

    #[test]
    fn a_volume_leads_past_its_snapshots_only_where_all_leave_something_out() {
        let [keep, data] = [8, 7].map(|minor| DeviceNumber { major: 253, minor });
        let table = |left_out: &[(u64, u64)]| {
            let set =
                left_out.iter().filter_map(|(start, end)| Extent::new(Bytes(*start), Bytes(*end))).collect();
            volume_table(Sectors(64), (keep, data), &set, Form::new(true)).unwrap()
        };
        assert_eq!(table(&[]).to_string(), "0 64 linear 253:8 0");
        let some = table(&[(4096, 8192), (28672, 32768)]);
        let text = "0 8 linear 253:8 0\n8 8 switch 1 8 0 253:7 8\n16 40 switch 1 40 0 253:8 16\n56 8 switch 1 8 0 253:7 56";
        assert_eq!(some.to_string(), text);
        // One that preserves nothing could not be told from a volume without snapshots.
        assert_eq!(table(&[(0, 32768)]), table(&[]));
        for ours in [&some, &table(&[]), &table(&[(0, 4096)])] {
            assert!(leads_to(ours, keep, data), "{ours}");
        }
        for other in [
            "0 64 linear 253:7 0",
            "0 64 linear 253:8 8",
            "0 8 linear 253:8 0\n8 56 linear 8:16 8",
            "0 64 zero",
        ] {
            assert!(!leads_to(&other.parse().unwrap(), keep, data), "{other}");
        }
    }

    #[test]
    fn an_upper_volume_is_held_before_and_released_after_the_lower_one() {
        let change = plan(&[("a", false, 0), ("b", false, 2)]);
        let steps = names(&change).join(" ");
        let held =
            "freeze suspend-2 freeze-2 suspend activate activate-2 instant resume resume-2 thaw unguard";
        assert!(steps.contains(held), "{steps}");
    }

    #[test]
    fn all_volumes_are_suspended_at_the_instant_and_every_step_has_its_own_name() {
        for group in GROUPS {
            let change = plan(group);
            let (mut suspended, mut active) = (Vec::new(), Vec::new());
            for step in &change.steps {
                match &step.action {
                    Action::Suspend { device, .. } => suspended.push(device.as_str()),
                    Action::Resume { device, .. } if group.iter().any(|(name, _, _)| name == device) => {
                        suspended.retain(|held| held != device);
                    }
                    Action::Resume { device, udev } => {
                        active.push(device.as_str());
                        assert!(suspended.is_empty() || *udev == Udev::None, "{group:?}: waits for udev");
                    }
                    Action::Instant => {
                        assert_eq!(suspended.len(), group.len(), "{group:?}");
                        let views = active.iter().filter(|device| device.ends_with("#view")).count();
                        assert_eq!(views, group.len(), "{group:?}: {active:?}");
                    }
                    Action::Create { .. } | Action::Load { .. } => assert!(suspended.is_empty(), "{group:?}"),
                    _ => {}
                }
            }
            assert!(suspended.is_empty(), "{group:?}");
            let distinct: BTreeSet<&str> = names(&change).into_iter().collect();
            assert_eq!(distinct.len(), change.steps.len(), "{group:?}");
        }
    }

    /// A thaw writes to the volume of the filesystem, and to those below it.
    #[test]
    fn nothing_is_thawed_above_a_suspended_volume_and_an_undo_leaves_nothing_held() {
        for group in GROUPS {
            let steps = plan(group).steps;
            let height = |volume: &str| group.iter().find(|(name, _, _)| *name == volume).unwrap().2;
            for failed in 0..=steps.len() {
                let (mut suspended, mut frozen) = (Vec::new(), Vec::new());
                let mut act = |action: &'_ Action| match action {
                    Action::Suspend { device, .. } => suspended.push(device.clone()),
                    Action::Resume { device, .. } => suspended.retain(|held| held != device),
                    Action::Freeze { filesystems } => frozen.extend(filesystems.clone()),
                    Action::Thaw { filesystems } => {
                        for point in filesystems.iter().filter(|point| frozen.contains(point)) {
                            let at = height(point.to_str().unwrap().trim_start_matches('/'));
                            let is_below = |held: &String| height(held) <= at;
                            let below: Vec<&String> =
                                suspended.iter().filter(|held| is_below(held)).collect();
                            assert!(below.is_empty(), "{group:?}, step {failed}: {point:?} over {below:?}");
                        }
                        frozen.retain(|point| !filesystems.contains(point));
                    }
                    _ => {}
                };
                steps[..failed].iter().for_each(|step| act(&step.action));
                steps[..failed].iter().rev().flat_map(|step| &step.undo).for_each(act);
                assert_eq!((suspended.len(), frozen.len()), (0, 0), "{group:?}, step {failed}");
            }
        }
    }
}
