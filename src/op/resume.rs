//! `tidemark resume`: continues a copy whose process died while the kernel's snapshot was in place.
//!
//! The state then: the origin still writes through its snapshot, and the store fills. Segments that the segment log
//! names are on the secondary (see [`segment_log`]). All others are still preserved, because a region is released only
//! names are on the secondary (see [`segment_log`]). All others are still preserved, because a region is released only
//! after all of it was recorded. So a resume copies the segments that are not recorded, and then applies *every*
//! original, at whatever point the other process died.
//! Until the copier runs, nothing is changed: a resume that is refused leaves everything as it was, to be tried again
//! or recovered with `recover`. From then on it is a normal copy, and puts everything back however it ends.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use super::admission::{Admission, Question, WAITING_FOR_OTHERS};
use super::copy::plan::order_for;
use super::copy::run::{block_list_of, copy_live};
use super::copy::session::{Session, Transfer, engine_for};
use super::copy::{CopyOutcome, CopyPlan, Live};
use super::request::CopyRequest;
use super::targets::TargetFacts;
use super::{interruptible, memory};
use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, SegmentSize};
use crate::copy::{self, ConfirmJob, OriginalsProvider, ResumePoint};
use crate::dm::{Dm, SnapshotStatus};
use crate::extent::{Extent, Original};
use crate::format::archive::frame_offset;
use crate::format::state::CopyRecord;
use crate::job::segment_log::{self, SegmentLog, SegmentLogContent};
use crate::job::{FoundJob, Job, find_jobs};
use crate::progress::{Event, Observer};
use crate::secondary::SecondaryTarget;
use crate::secondary::{self, PlacedSegment, Resumed, Secondary};
use crate::stack::{Adopted, FoundStack, HoldTimes, Skipped, Stack};
use crate::store::{CowStore, ExceptionReader, StoreDevice};
use crate::sys::privilege;
use crate::sys::process::LockedMemory;
use crate::volume::{FreezeSet, Origin, OriginKind};

/// The state after a secondary did not answer.
const AS_IT_WAS: &str = "the copy stays as it was: the origin stays in use, its content at the instant is \
                         still preserved, and nothing of the copy is lost";

/// The advice then.
const SEE_TO_IT: &str = "check the secondary's disk or server and resume again, or run 'tidemark recover', \
                         which gives up the copy and restores the origin's table";

/// The copy that would be resumed. Serialized for `--dry-run --json`.
#[derive(Debug, Serialize)]
pub struct ResumePlan {
    /// The job.
    pub job: String,
    /// When its process began, UTC.
    pub started: String,
    /// The plan of the copy.
    pub copy: CopyPlan,
    /// Segments on the secondary.
    pub placed: usize,
    /// Segments of the origin.
    pub segments: u64,
    /// All segments are on the secondary, and applying the originals had begun.
    pub originals_begun: bool,
    #[serde(skip)]
    found: FoundJob,
    /// Reads that the secondary must answer before it is opened.
    #[serde(skip)]
    asked: Vec<Asked>,
}

/// A path, and offsets to read, to see whether its disk or server answers.
#[derive(Debug)]
struct Asked {
    path: PathBuf,
    offsets: Vec<u64>,
}

/// Finds the copy to resume: the one whose id begins with `id`, or the only one.
///
/// # Errors
/// [`ErrorKind::Refused`] with the reason if there is none, or several, or if it cannot be resumed; I/O errors.
pub fn plan(id: Option<&str>) -> Result<ResumePlan> {
    privilege::require_root("resuming a copy")?;
    let mut found = choose(find_jobs()?, id)?;
    let record = std::mem::replace(&mut found.record, Err(Error::usage("the record was taken")))?;
    let give_up = |what: String| {
        Error::refused(format!("job {} cannot be resumed: {what}", found.id))
            .state("nothing was changed")
            .next(
                "run 'tidemark recover', which undoes what is left, and copy again; run an increment again with the \
                 same --since: an archive begins anew, the update of a raw secondary is completed",
            )
    };
    let copy = record.copy.as_ref().ok_or_else(|| {
        give_up(if record.command == "copy" && !record.further_origins.is_empty() {
            "it copied several origins from one instant, and such a copy cannot be continued".to_owned()
        } else if record.command == "copy" {
            "its process died before the instant was taken, its origin was not in use, it was an increment \
             (--since), which is to be run again, or it copied to a pipe, whose reader is gone"
                .to_owned()
        } else {
            format!("it is not a copy but '{}'", record.command)
        })
    })?;
    if found.is_newer {
        return Err(Error::refused(format!(
            "job {} cannot be resumed: a newer version of tidemark created it",
            found.id
        ))
        .state("nothing was changed")
        .next("resume with that version, or run 'tidemark recover' and copy again"));
    }
    let content = segment_log::read(&found.segments_path())?;
    let origin = record.origin.as_ref().ok_or_else(|| give_up("its record names no origin".to_owned()))?;
    let plan = copy_plan(copy, &origin.device, origin.number, content.header.origin_size)?;
    let asked = asked(copy, &plan, &content);
    let (placed, originals_begun) = (content.placed.len(), content.originals_begun);
    let (segments, started_utc_ns) = (content.header.segment_count(), record.started_utc_ns);
    found.record = Ok(record);
    Ok(ResumePlan {
        job: found.id.clone(),
        started: crate::base::clock::utc_text(started_utc_ns).unwrap_or_default(),
        copy: plan,
        placed,
        segments,
        originals_begun,
        found,
        asked,
    })
}

fn choose(jobs: Vec<FoundJob>, id: Option<&str>) -> Result<FoundJob> {
    let mut fitting: Vec<FoundJob> = match id {
        Some(id) => jobs.into_iter().filter(|job| job.id.starts_with(id)).collect(),
        None => jobs
            .into_iter()
            .filter(|job| !job.alive && job.record.as_ref().is_ok_and(|record| record.copy.is_some()))
            .collect(),
    };
    let named = id.map_or_else(String::new, |id| format!(" whose id begins with '{id}'"));
    if fitting.len() > 1 {
        let ids: Vec<&str> = fitting.iter().map(|job| job.id.as_str()).collect();
        return Err(Error::refused(format!("there are several copies{named}: {}", ids.join(", ")))
            .state("nothing was changed")
            .next("name one: tidemark resume ID"));
    }
    let job = fitting.pop().ok_or_else(|| {
        Error::refused(format!("there is no copy to resume{named}"))
            .state("nothing was changed")
            .next("see 'tidemark status'; a copy does not survive a reboot or 'tidemark recover': copy again")
    })?;
    if job.alive {
        return Err(Error::refused(format!("job {} is running", job.id))
            .state("nothing was changed")
            .next("wait for it ('tidemark status --watch'), or end it first"));
    }
    Ok(job)
}

/// The plan of the copy as its own process made it, from its record.
fn copy_plan(copy: &CopyRecord, device: &str, number: DeviceNumber, size: Bytes) -> Result<CopyPlan> {
    let request: CopyRequest = serde_json::from_str(&copy.request).map_err(|source| {
        Error::bad_data("the recorded request cannot be read: another version of tidemark wrote it")
            .with_source(source)
            .state("nothing was changed")
            .next("resume with that version, or run 'tidemark recover' and copy again")
    })?;
    let origin = Origin {
        path: copy.origin_path.clone().into(),
        kind: OriginKind::Live { name: device.to_owned(), attached: false },
        number: Some(number),
        size,
        filesystems: Vec::new(),
        lock_filesystem: false,
        not_frozen: Vec::new(),
        notes: Vec::new(),
        frozen: FreezeSet::default(),
    };
    Ok(CopyPlan {
        order: order_for(&request, &origin),
        request,
        origin,
        segment: SegmentSize::new(Bytes(copy.segment_bytes))?,
        region: Bytes(copy.region_bytes),
        live: None,
        kept: None,
        since: None,
        forbidden: vec![number],
        target: TargetFacts::default(),
        omitted: None,
    })
}

/// The reads are at the beginning of the file or device, and at the first and last recorded segments: anything not
/// written yet may be a hole, which needs no read from a disk. For a file, the final name is looked up too.
fn asked(copy: &CopyRecord, plan: &CopyPlan, content: &SegmentLogContent) -> Vec<Asked> {
    let SecondaryTarget::Path(target) = &plan.request.secondary else { return Vec::new() };
    let offset = |segment: &PlacedSegment| match (&copy.archive, segment.frame) {
        (Some(_), frame) => frame_offset(frame?, plan.segment),
        (None, _) => plan.segment.offset_of(segment.ix).filter(|_| !segment.zero),
    };
    let mut noted = content.placed.iter().filter_map(offset);
    let offsets = [Some(Bytes::ZERO), noted.next(), noted.next_back()];
    let offsets = offsets.into_iter().flatten().map(Bytes::get).collect();
    let Some(partial) = &copy.partial else { return vec![Asked { path: target.clone(), offsets }] };
    vec![Asked { path: target.clone(), offsets: Vec::new() }, Asked { path: partial.into(), offsets }]
}

/// Refuses a secondary that does not answer, before the job's lock is held during an access to it.
fn check_answers(asked: &[Asked], interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
    for Asked { path, offsets } in asked {
        let is_answered = interruptible::does_answer(path, offsets.clone(), interrupt)
            .map_err(|error| error.state(AS_IT_WAS).next(SEE_TO_IT))?;
        if !is_answered {
            return Err(Error::refused(interruptible::no_answer(path)).state(AS_IT_WAS).next(SEE_TO_IT));
        }
    }
    Ok(())
}

/// Makes all checks of [`run()`] and changes nothing.
///
/// # Errors
/// Those of [`run()`] before the copier runs.
pub fn check(plan: &ResumePlan, observer: &dyn Observer, interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
    let ResumePlan { copy: plan, found, asked, .. } = plan;
    let mut engine = engine_for(plan, 1).map_err(|error| error.state("nothing was changed"))?;
    check_answers(asked, interrupt)?;
    let record = found.record.as_ref().expect("the plan was made from it");
    let copy = record.copy.as_ref().expect("the plan was made from it");
    let content = segment_log::read(&found.segments_path())?;
    let dm = Dm::open()?;
    let standing = FoundStack::find(&dm, record)?;
    standing.check_adoptable(&dm)?;
    let store = CowStore::examine(&found.id)?;
    drop(check_circles(&dm, plan, &store)?);
    let skipped = skipped(copy);
    let block_list = block_list_of(plan, &skipped);
    let secondary = reopen(plan, copy, &content, (standing.number(), block_list.clone()), interrupt)?;
    copy::confirm(ConfirmJob {
        engine: engine.as_mut(),
        origin_size: plan.origin.size,
        block_list,
        segment: plan.segment,
        secondary,
        originals: &mut Preserved { store: &store, status: standing.snapshot_status(&dm)?, reader: None },
        resumed: ResumePoint {
            placed: content.placed,
            originals_begun: content.originals_begun,
            released: standing.released(&skipped),
        },
        observer,
        interrupt,
    })
}

/// The originals of a store that is examined but not adopted.
struct Preserved<'a> {
    store: &'a CowStore,
    status: SnapshotStatus,
    reader: Option<ExceptionReader<'a, StoreDevice>>,
}

impl OriginalsProvider for Preserved<'_> {
    fn open(&mut self) -> Result<(OwnedFd, String)> {
        self.reader = Some(self.store.exceptions(&self.status)?);
        Ok((self.store.open_direct()?, self.store.name().to_owned()))
    }

    fn next_batch(&mut self, max: usize) -> Result<Vec<Original>> {
        self.reader.as_mut().expect("the copier opens the store before it asks for originals").next_batch(max)
    }

    fn check_valid(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Resumes the copy.
///
/// # Errors
/// Before the copier runs: the obstacle, with everything left as it was. Then as a copy.
pub fn run(
    plan: ResumePlan,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<CopyOutcome> {
    let ResumePlan { copy: plan, found, asked, .. } = plan;
    let engine = engine_for(&plan, 1).map_err(|error| error.state("nothing was changed"))?;
    check_answers(&asked, interrupt)?;
    let job = Job::take_over(found)?;
    let copy = job.record().copy.clone().expect("the plan was made from it");
    let (log, content) = SegmentLog::open(&job.segments_path())?;
    let dm = Dm::open()?;
    let stack = Stack::adopt(&dm, &job, adopted(&copy, &plan), interrupt)?;
    let store = Arc::new(CowStore::adopt(job.id())?);
    let memory = {
        let note = || observer.event(&Event::Note { text: WAITING_FOR_OTHERS.to_owned() });
        let _admission = Admission::enter(&note, interrupt)?;
        check_circles(&dm, &plan, &store)?
    };
    let block_list = block_list_of(&plan, &stack.skipped().extents);
    let secondary = reopen(&plan, &copy, &content, (stack.number(), block_list), interrupt)?;
    let live = Live::adopt(dm, job, store, stack, plan.origin.number, memory);
    let from = ResumePoint {
        placed: content.placed,
        originals_begun: content.originals_begun,
        released: live.stack().released(),
    };
    let transfer = Transfer { engine, secondary, update: None };
    let is_hook_due = !copy.hook_after_done;
    Session::resume(&plan, (live, transfer), is_hook_due, observer, interrupt, |session| {
        copy_live(session, Some(log), Some(from))
    })
}

/// Repeats the checks that the copy's own process made at its instant, because mounts, loop devices and swap space may
/// have changed. Returns the memory lock if memory may wait for the origin.
fn check_circles(dm: &Dm, plan: &CopyPlan, store: &CowStore) -> Result<Option<LockedMemory>> {
    let Some(origin) = plan.origin.number else { return Ok(None) };
    let question = Question::of(dm, origin)?;
    question.check_copy(store, &plan.request).map_err(|error| {
        error.state("the copy stays as it was").next(
            "unmount, detach or swapoff what was mounted, attached or used as swap since the copy began, and \
             try again; or run 'tidemark recover', which restores the origin's table, and copy again",
        )
    })?;
    question.objection_to_memory().map(|_| memory::lock()).transpose()
}

/// Opens the secondary again and verifies that it is the one that the copy wrote to. `below` has the device that holds
/// the origin's data, and the ranges that are copied, as in the other process: an archive needs them to count its
/// frames. The secondary may never answer: a signal ends the wait.
fn reopen(
    plan: &CopyPlan,
    copy: &CopyRecord,
    content: &SegmentLogContent,
    (below, block_list): (DeviceNumber, Vec<Extent>),
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Box<dyn Secondary>> {
    let mut request = plan.secondary_request(plan.forbidden_with(below));
    request.block_list = block_list;
    let resumed = Resumed {
        instant_ns: copy.instant_utc_ns,
        archive: copy.archive.as_deref().map(parse_uuid).transpose()?,
        partial: copy.partial.clone().map(Into::into),
        target: copy.target.clone(),
        placed: content.placed.clone(),
        originals_begun: content.originals_begun,
    };
    let open = move || secondary::reopen(&request, &resumed);
    let leave = |mut late: Box<dyn Secondary>| late.leave();
    interruptible::unless_interrupted(interrupt, open, leave).map_err(|error| match error.kind() {
        ErrorKind::Interrupted => error.state(AS_IT_WAS).next(SEE_TO_IT),
        _ => error,
    })
}

fn parse_uuid(text: &str) -> Result<Uuid> {
    Uuid::parse_str(text).map_err(|source| Error::bad_data("the job's archive").with_source(source))
}

/// Ranges that the copy skipped because they were free at its instant.
fn skipped(copy: &CopyRecord) -> Vec<Extent> {
    let extent = |(start, end): &(u64, u64)| Extent::new(Bytes(*start), Bytes(*end));
    copy.skipped.iter().filter_map(extent).collect()
}

fn adopted(copy: &CopyRecord, plan: &CopyPlan) -> Adopted {
    let nanos = |ns| std::time::Duration::from_nanos(ns);
    Adopted {
        skipped: Skipped { extents: skipped(copy), ..Skipped::default() },
        budget: plan.request.freeze_budget,
        lvm_lock: plan.request.lvm_lock,
        times: HoldTimes {
            synced: nanos(copy.held_ns[0]),
            frozen: nanos(copy.held_ns[1]),
            suspended: nanos(copy.held_ns[2]),
            instant_utc_ns: copy.instant_utc_ns,
        },
    }
}
