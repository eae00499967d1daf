//! `tidemark status`: volumes, jobs and stacks, from the kernel and the records. Changes nothing.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;

use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, clock, escape};
use crate::dm::naming::{ROLE_PRESERVE, ROLE_REAL, ROLE_SNAP, ROLE_VOLUME, is_lasting};
use crate::dm::{DeviceIdentity, DeviceInfo, Dm, Slot, SnapshotStatus, Table, node};
use crate::format::state::ProgressView;
use crate::stack::origin_table::LowerDevices;
use crate::stack::recovery::living_elsewhere;
use crate::topology::Topology;
use crate::volume::lvm_lock::LvmScope;

use super::attach::recorded_volumes;
use super::raw_secondary::RawSecondary;
use super::request::CopyRequest;
use super::snapshot::list::{SnapshotView, State, views_of};
use super::snapshot::monitor::{self, is_nearly_full};
use super::snapshot::set::read_all;
use crate::job::disk_queue::{Queued, queued};
use crate::job::list_jobs;
use crate::stack::{missing_disk, missing_disk_remedy};
use crate::sys::privilege;

/// The complete status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Attached volumes, and recorded ones that are not attached now.
    pub volumes: Vec<VolumeStatus>,
    /// Commands in progress, and dead ones that left devices or files.
    pub jobs: Vec<JobStatus>,
    /// Snapshot stacks in place.
    pub stacks: Vec<StackStatus>,
    /// Copies that read from rotating disks, and those that wait for them, in their order.
    pub disks: Vec<DiskStatus>,
    /// Snapshots that are kept, the oldest of each volume first.
    pub snapshots: Vec<SnapshotView>,
    /// Raw secondaries onto which increments can be written.
    pub secondaries: Vec<RawSecondary>,
    /// Problems, in words, with what to do.
    pub warnings: Vec<String>,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// /dev/mapper/NAME.
    pub path: PathBuf,
    /// The device below, as recorded.
    pub device: Option<String>,
    /// Its number; None if it is not attached now.
    pub number: Option<DeviceNumber>,
    /// Its size.
    pub size: Option<Bytes>,
    /// Where it is mounted.
    #[serde(serialize_with = "escape::paths")]
    pub mounted_at: Vec<PathBuf>,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct JobStatus {
    /// Its id.
    pub id: String,
    /// Whether its process is alive.
    pub alive: bool,
    /// "copy", "restore", "attach".
    pub command: Option<String>,
    /// Its process id.
    pub process: Option<u32>,
    /// Start, UTC.
    pub started: Option<String>,
    /// The device being copied.
    pub origin: Option<String>,
    /// The change in progress, in words.
    pub step: Option<String>,
    /// Commands that change the origin's volume group wait for the end of this copy (`--lvm-lock copy`).
    pub keeps_lvm_away: bool,
    /// Its progress, now or when it died.
    pub progress: Option<ProgressView>,
    /// That of its other origins, if it copies several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub further_progress: Vec<ProgressView>,
}

/// A copy at the rotating disks of its origins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskStatus {
    /// Its job; of an origin that is not in use, another id.
    pub job: String,
    /// Its process id.
    pub process: u32,
    /// What it copies.
    pub origins: String,
    /// The disks that it reads, or waits for.
    pub disks: Vec<String>,
    /// Why it waits; empty while it reads.
    pub waits: Vec<DiskWait>,
}

/// What a copy waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskWait {
    /// The disk.
    pub disk: String,
    /// The job that comes before it.
    pub job: String,
    /// The process of that job.
    pub process: u32,
}

/// A stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StackStatus {
    /// The job that it belongs to.
    pub job: String,
    /// The current name of its origin; None if no origin writes through it any more.
    pub origin: Option<String>,
    /// The snapshot's device name.
    pub snapshot: String,
    /// The device that holds the origin's data.
    pub below: Option<String>,
    /// The state of the snapshot, and how full its store is.
    pub status: SnapshotStatus,
    /// Bytes of the origin whose originals are still preserved; None if no origin writes through it any more.
    pub preserved: Option<Bytes>,
    /// Size of the origin. If it is not fully preserved (free space, released regions), the snapshot's device does not
    /// show the instant: only the copy does.
    pub size: Option<Bytes>,
}

/// Collects the status.
///
/// # Errors
/// I/O errors; errors of the kernel.
pub fn status() -> Result<Status> {
    privilege::require_root("examining device-mapper")?;
    let mut status = Status::default();
    let mut lost = BTreeSet::new();
    let ours = match Dm::open() {
        Ok(dm) => {
            let ours = dm.list_ours()?;
            lost = stacks(&dm, &ours, &mut status)?;
            snapshots(&dm, &mut status)?;
            ours
        }
        // Without device-mapper there are no volumes and stacks.
        Err(error) => {
            status.warnings.push(error.to_string());
            Vec::new()
        }
    };
    volumes(&ours, &mut status)?;
    let known = jobs(&lost, &mut status)?;
    status.disks = disks()?;
    strays(&ours, &known, &mut status)?;
    secondaries(&mut status)?;
    Ok(status)
}

/// Collects the raw secondaries, and warns of those that are copies of nothing.
fn secondaries(status: &mut Status) -> Result<()> {
    for secondary in RawSecondary::all()? {
        match secondary {
            Ok(secondary) => status.secondaries.push(secondary),
            Err(error) => status.warnings.push(error.to_string()),
        }
    }
    let updating = status.secondaries.iter().filter(|secondary| secondary.is_updating);
    status.warnings.extend(updating.map(|RawSecondary { secondary, text, base, .. }| {
        format!(
            "{} {text}: unless a copy to it is running, run the increment again (tidemark copy ORIGIN --since {base} \
             {})",
            secondary.display(),
            secondary.display()
        )
    }));
    Ok(())
}

/// Collects the stacks. Returns the jobs whose copies are void.
fn stacks(dm: &Dm, ours: &[DeviceInfo], status: &mut Status) -> Result<BTreeSet<String>> {
    let mut lost = BTreeSet::new();
    for info in ours {
        let Some(identity) = DeviceIdentity::parse(&info.uuid) else { continue };
        if info.suspended && info.has_active {
            status.warnings.push(format!("{} is suspended: run 'tidemark recover'", info.name));
        }
        if identity.role != ROLE_SNAP || !info.has_active {
            continue;
        }
        let of_job = |role| {
            ours.iter().find(|other| {
                DeviceIdentity::parse(&other.uuid).is_some_and(|it| it.role == role && it.id == identity.id)
            })
        };
        let below = of_job(ROLE_REAL);
        let preserve = of_job(ROLE_PRESERVE).map(|it| it.number);
        let origin = below.map_or(Ok(None), |real| origin_over(dm, real, preserve))?;
        let preserved =
            |over: &Over| over.lower.preserved(&over.table).iter().map(|extent| extent.length()).sum();
        if let Some(over) = &origin
            && let Some(disk) = missing_disk(&over.lower.own)
        {
            lost.insert(identity.id.clone());
            status.warnings.push(format!(
                "the disk {disk} under {} was removed: {}",
                over.name,
                missing_disk_remedy(&over.name)
            ));
        }
        let snapshot = dm.snapshot_status(&info.name)?;
        if !snapshot.is_usable() {
            lost.insert(identity.id.clone());
        }
        status.stacks.push(StackStatus {
            job: identity.id.clone(),
            origin: origin.as_ref().map(|over| over.name.clone()),
            snapshot: info.name.clone(),
            below: below.map(|other| other.name.clone()),
            status: snapshot,
            preserved: origin.as_ref().map(preserved),
            size: origin.and_then(|over| over.table.length().checked_bytes()),
        });
    }
    Ok(lost)
}

/// Collects the snapshots that are kept, and warns of those that are lost or about to be.
fn snapshots(dm: &Dm, status: &mut Status) -> Result<()> {
    for record in read_all()? {
        match record {
            Ok(record) => status.snapshots.extend(views_of(dm, &record)?),
            Err(error) => status.warnings.push(error.to_string()),
        }
    }
    if status.snapshots.iter().any(|view| view.receives) && !monitor::is_running() {
        status.warnings.push(
            "no monitor is running, so the stores of snapshots do not grow: 'tidemark monitor --install-unit'".to_owned(),
        );
    }
    for view in &status.snapshots {
        let name = &view.snapshot;
        let warning = match (&view.state, view.used, view.total) {
            (State::Invalid | State::NeedsLost, _, _) => {
                Some(format!("the snapshot {name} is lost: 'tidemark snapshot show {name}' says why"))
            }
            (State::Full, _, _) => Some(format!(
                "the store of the clone {name} is full: it takes no writes until there is space for it"
            )),
            (State::Creating | State::Deleting, _, _) => Some(format!(
                "{name} is being created or deleted; if no command is running: 'tidemark recover'"
            )),
            (_, Some(used), Some(total)) if view.receives && view.can_fill && is_nearly_full(used, total) => {
                Some(format!("the store of {name} is nearly full: {used} of {total} are used"))
            }
            _ => None,
        };
        status.warnings.extend(warning);
    }
    Ok(())
}

impl Status {
    /// Fails if a snapshot needs attention.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] with the first reason.
    pub fn verdict(&self) -> Result<()> {
        let is_lost = |view: &&SnapshotView| matches!(view.state, State::Invalid | State::NeedsLost);
        let is_full = |view: &&SnapshotView| {
            let is_full = view.state == State::Full;
            is_full
                || view.receives
                    && view.can_fill
                    && view.used.zip(view.total).is_some_and(|(used, total)| is_nearly_full(used, total))
        };
        let is_receiving = self.snapshots.iter().any(|view| view.receives);
        let why = if let Some(view) = self.snapshots.iter().find(is_lost) {
            format!("the snapshot {} is lost", view.snapshot)
        } else if let Some(view) = self.snapshots.iter().find(is_full) {
            format!("the store of {} is nearly full", view.snapshot)
        } else if is_receiving && !monitor::is_running() {
            "no monitor is running, so the stores of snapshots do not grow".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::StoreInvalid, why)
            .next("'tidemark snapshot list' shows the snapshots; 'tidemark monitor' enlarges their stores"))
    }
}

/// An origin that writes through a stack.
struct Over {
    name: String,
    table: Table,
    lower: LowerDevices,
}

fn origin_over(dm: &Dm, real: &DeviceInfo, preserve: Option<DeviceNumber>) -> Result<Option<Over>> {
    let Some(own) = dm.table(real.number, Slot::Active)? else { return Ok(None) };
    let lower = LowerDevices { own, real: real.number, preserve };
    for (name, number) in dm.list()? {
        // Skip a device that disappears, or whose table we cannot read.
        if let Ok(Some(table)) = dm.table(number, Slot::Active)
            && lower.is_stack_table(&table)
        {
            return Ok(Some(Over { name, table, lower }));
        }
    }
    Ok(None)
}

fn volumes(ours: &[DeviceInfo], status: &mut Status) -> Result<()> {
    let topology = Topology::default();
    let mounts = topology.mounts()?;
    let mut records = Vec::new();
    for record in recorded_volumes()? {
        match record {
            Ok(record) => records.push(record),
            Err(error) => status.warnings.push(error.to_string()),
        }
    }
    for info in ours {
        let Some(identity) = DeviceIdentity::parse(&info.uuid) else { continue };
        if identity.role != ROLE_VOLUME {
            continue;
        }
        // By id, because the device may have been renamed.
        let record = records.iter().position(|record| record.id == identity.id).map(|at| records.remove(at));
        status.volumes.push(VolumeStatus {
            name: info.name.clone(),
            path: node::mapper_path(&info.name),
            number: Some(info.number),
            size: record.as_ref().map(|record| Bytes(record.size_bytes)),
            device: record.map(|record| record.device),
            mounted_at: mounts
                .iter()
                .filter(|mount| mount.is_of(info.number))
                .map(|mount| mount.point.clone())
                .collect(),
        });
    }
    for record in records {
        status.volumes.push(VolumeStatus {
            path: node::mapper_path(&record.name),
            name: record.name,
            device: Some(record.device),
            number: None,
            size: Some(Bytes(record.size_bytes)),
            mounted_at: Vec::new(),
        });
    }
    status.volumes.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(())
}

fn disks() -> Result<Vec<DiskStatus>> {
    let topology = Topology::default();
    let shown = |queued: Queued| DiskStatus {
        disks: queued.ticket.disks.iter().map(|disk| topology.name(*disk)).collect(),
        waits: queued
            .waits
            .iter()
            .map(|wait| DiskWait {
                disk: topology.name(wait.disk),
                job: wait.before.id.clone(),
                process: wait.before.process,
            })
            .collect(),
        job: queued.ticket.id,
        process: queued.ticket.process,
        origins: queued.ticket.origins,
    };
    Ok(queued()?.into_iter().map(shown).collect())
}

/// Collects the recorded jobs. Returns their ids.
fn jobs(lost: &BTreeSet<String>, status: &mut Status) -> Result<Vec<String>> {
    let mut known = Vec::new();
    for job in list_jobs()? {
        known.push(job.id.clone());
        if !job.alive {
            let has_journal = job.segments_path().exists();
            let is_copy = job.record.as_ref().is_ok_and(|record| record.copy.is_some());
            let how = if has_journal && is_copy && !lost.contains(&job.id) {
                "'tidemark resume' resumes it, 'tidemark recover' gives it up"
            } else {
                "run 'tidemark recover'"
            };
            status.warnings.push(format!("job {} died: {how}", job.id));
        }
        let record = job.record.ok();
        let change = record.as_ref().and_then(|record| record.change.as_ref());
        let request = record.as_ref().and_then(|record| record.copy.as_ref());
        let request = request.and_then(|copy| serde_json::from_str::<CopyRequest>(&copy.request).ok());
        status.jobs.push(JobStatus {
            id: job.id,
            alive: job.alive,
            keeps_lvm_away: job.alive && request.is_some_and(|request| request.lvm_lock == LvmScope::Copy),
            progress: job.progress,
            further_progress: job.further_progress,
            step: change.and_then(|change| {
                let step = change.steps.get(change.step)?;
                Some(format!("{}{}: {step}", change.name, if change.undo { ", being undone" } else { "" }))
            }),
            command: record.as_ref().map(|record| record.command.clone()),
            process: record.as_ref().map(|record| record.process),
            started: record.as_ref().and_then(|record| clock::utc_text(record.started_utc_ns)),
            origin: record.filter(|record| record.origin.is_some()).map(|record| {
                record.origins().map(|origin| origin.device.as_str()).collect::<Vec<_>>().join(", ")
            }),
        });
    }
    Ok(known)
}

/// Finds devices of jobs without a record.
fn strays(ours: &[DeviceInfo], known: &[String], status: &mut Status) -> Result<()> {
    let is_known = |id: &str| known.iter().any(|other| other == id);
    let strays: Vec<(&DeviceInfo, DeviceIdentity)> = ours
        .iter()
        .filter_map(|info| Some((info, DeviceIdentity::parse(&info.uuid)?)))
        .filter(|(_, identity)| !is_lasting(&identity.role))
        .filter(|(_, identity)| !is_known(&identity.id))
        .collect();
    if strays.is_empty() {
        return Ok(());
    }
    let devices = ours.iter().filter(|info| info.has_active).map(|info| (info.uuid.as_str(), info.number));
    let living = living_elsewhere(&Dm::open()?, devices, is_known)?;
    for (info, identity) in strays {
        let name = &info.name;
        status.warnings.push(if living.contains(&identity.id) {
            format!("{name} belongs to job {}, which runs in another mount namespace", identity.id)
        } else {
            format!("{name} was left by a command that died: run 'tidemark recover'")
        });
    }
    Ok(())
}
