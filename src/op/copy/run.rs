//! Copies the origin that a [`Session`] holds, live or cold.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;

use super::cold::ColdOrigin;
use super::live::Live;
use super::originals::{StoreOriginals, StoreReleases};
use super::placement::note_copy;
use super::plan::{CopyPlan, is_rotating};
use super::raw_parent::RawCheckReport;
use super::report::{CopyOutcome, CopyResult, SkippedReport, tell_skipped};
use super::session::{Session, Transfer};
use super::since::{self, KeptOrigin, Selection};
use super::update::{NewRecord, Reading, Update};
use super::workers::Workers;
use crate::base::clock;
use crate::base::limits::{LIVE_READ_BYTES, LIVE_READ_ROTATING_BYTES};
use crate::base::{Result, ResultExt as _};
use crate::copy::{
    self, CopyJob, CopyReport, Impact, ImpactWatch, OriginalsProvider as _, PlacementLog, ResumePoint,
};
use crate::extent::free::{FreeLimits, needed, skippable};
use crate::extent::{BlockList, Extent, ExtentSet};
use crate::format::raw_copy::Shown;
use crate::format::state::TargetRecord;
use crate::io::Engine;
use crate::job::published::ProgressFile;
use crate::job::segment_log::SegmentLog;
use crate::progress::{Event, Observer};
use crate::secondary;
use crate::stack::{HoldTimes, Skipped};
use crate::sys::process::crash_point;
use crate::volume::OriginKind;

/// Executes `plan`.
///
/// # Errors
/// As [`Session::carry_out`].
pub fn run(
    plan: &CopyPlan,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<CopyOutcome> {
    Session::carry_out(plan, observer, interrupt, |session| {
        if session.live.is_none() {
            return copy_cold(session);
        }
        let log = begin_copy(session)?;
        crash_point("copy.data.before");
        copy_live(session, log, None)
    })
}

/// Called after the instant: passes its time to the secondary, and records what is needed to resume.
pub(super) fn begin_copy(session: &mut Session<'_>) -> Result<Option<SegmentLog>> {
    let Session { plan, observer, live, transfer, .. } = session;
    let live = live.as_ref().expect("the origin is held");
    let secondary = transfer.get_mut().as_mut().expect("the copier does not have it yet").secondary.as_mut();
    secondary.set_instant(live.stack().times().instant_utc_ns);
    tell_skipped(plan, &SkippedReport::of(live.stack().skipped()), *observer);
    note_copy(plan, live, secondary)
}

/// Copies the held origin. The workers run in parallel with the copier, and have ended when this returns. `from`: where
/// a copy whose process died continues.
///
/// # Errors
/// As [`Session::carry_out`].
pub(in crate::op) fn copy_live(
    session: &Session<'_>,
    mut log: Option<SegmentLog>,
    from: Option<ResumePoint>,
) -> Result<CopyResult> {
    let copied = copy_beside_workers(session, log.as_mut(), from);
    crash_point("copy.data.after");
    copied
}

fn copy_beside_workers(
    session: &Session<'_>,
    log: Option<&mut SegmentLog>,
    from: Option<ResumePoint>,
) -> Result<CopyResult> {
    let Session { plan, interrupt, .. } = session;
    let live = session.live.as_ref().expect("the origin is held");
    let shown = progress_file(session, live);
    let observer: &dyn Observer = &shown;
    // The monitor starts first, because the store must be able to grow while --hook-after runs.
    let workers = Workers::start(plan, live)?;
    let (monitor, gate) = (&workers.monitor, &workers.gate);
    let stop = || {
        workers.relay(plan, observer);
        interrupt().and_then(|()| monitor.check())
    };
    session.hook_after(&stop);
    if let Some(shared) = &session.shared {
        (shared.await_turn)(shared.index, observer, &stop)?;
    }
    let selection = selection_of(plan, &live.stack().skipped().extents, &stop)?;
    let below = open_below(live)?;
    live.job().set_hook_after_done()?;
    let impact = impact_watch(plan, live);
    tell_if_blind(plan, impact.as_ref(), observer);
    let (mut originals, mut releases) = (
        StoreOriginals::new(live, monitor, gate),
        StoreReleases::new(live, gate, plan.order == copy::Order::Hot),
    );
    let before_publish = || StoreOriginals::new(live, monitor, gate).check_valid();
    let on_failure = || workers.rescue.restore();
    let on_doubt = || session.is_doubted.set(true);
    let Transfer { mut engine, mut secondary, mut update } =
        session.transfer.take().expect("the copier does not have it yet");
    let target = secondary.target().cloned();
    let shown = (live.stack().times().instant_utc_ns, None);
    let reading = Reading { engine: engine.as_mut(), observer, interrupt: &stop };
    mark(update.as_mut(), &selection, shown, reading)?;
    let Selection { needed: block_list, inherited, changed, .. } = selection;
    secondary.restrict(&block_list);
    secondary.inherit(&inherited);
    let is_stream = secondary.is_stream();
    let mut job = CopyJob::new(engine.as_mut(), below, plan.origin.size, plan.options(), secondary);
    job.origin_description = plan.origin.path.display().to_string();
    job.block_list = block_list;
    job.inherited = inherited;
    job.first = live.stack().logs().to_vec();
    job.originals = Some(&mut originals);
    job.releases = Some(&mut releases);
    job.placements = log.map(|log| log as &mut dyn PlacementLog);
    job.resumed = from;
    job.impact = impact;
    job.observer = observer;
    job.interrupt = &stop;
    job.before_publish = &before_publish;
    job.on_failure = &on_failure;
    job.on_unwritten_failure = &on_doubt;
    let copied = copy::run(job);
    let reading = Reading { engine: engine.as_mut(), observer, interrupt: *interrupt };
    let report = ended(finished(update, copied, (target.as_ref(), None), reading), engine, is_stream);
    drop((originals, releases));
    let (store, release) = workers.stop(plan, observer);
    let (report, check) = report?;
    let since = plan.since.as_ref().map(|since| since.report(changed, report.read_bytes, check));
    Ok(CopyResult {
        instant: live.stack().times(),
        since,
        copy: report,
        store: Some(store),
        release: Some(release),
        skipped: SkippedReport::of(live.stack().skipped()),
        kept: None,
    })
}

/// Publishes the progress; of several origins, each has a file of its own.
fn progress_file<'a>(session: &Session<'a>, live: &Live) -> ProgressFile<'a> {
    match &session.shared {
        None => ProgressFile::new(session.observer, live.job().progress_path()),
        Some(shared) => ProgressFile::of_origin(
            session.observer,
            live.job().progress_path_of(shared.index),
            &session.plan.origin.path.display().to_string(),
        ),
    }
}

/// While requests are in flight, the kernel may read from the engine's buffers. So the engine is leaked; the end of the
/// process waits for the requests.
fn ended<T>(copied: Result<T>, engine: Box<dyn Engine>, is_stream: bool) -> Result<T> {
    if engine.in_flight() > 0 && !is_stream {
        std::mem::forget(engine);
    }
    copied
}

/// Marks the secondary, if it is updated, before anything is written to it.
fn mark(
    update: Option<&mut Update>,
    selection: &Selection,
    (instant_ns, kept): (u64, Option<&KeptOrigin>),
    mut reading: Reading<'_>,
) -> Result<()> {
    let shown = Shown { snapshot: kept.map(|kept| kept.id), instant_ns };
    update.map_or(Ok(()), |update| update.mark(selection, (shown, kept), &mut reading))
}

/// Completes the update of a secondary, if it is one, after the copier has ended with `copied`.
fn finished(
    update: Option<Update>,
    copied: Result<CopyReport>,
    (target, kept): (Option<&TargetRecord>, Option<&KeptOrigin>),
    mut reading: Reading<'_>,
) -> Result<(CopyReport, Option<RawCheckReport>)> {
    let (Some(update), Some(target)) = (update, target) else { return copied.map(|copied| (copied, None)) };
    let (copied, check) = update.finish(copied, (target, kept), &mut reading)?;
    Ok((copied, Some(check)))
}

/// Measures the impact on the applications; None if the kernel keeps no statistics.
fn impact_watch(plan: &CopyPlan, live: &Live) -> Option<ImpactWatch> {
    live.probe().map(|probe| ImpactWatch {
        impact: plan.request.impact,
        before: live.latency_before(),
        probe: Box::new(probe),
        read_max: if is_rotating(&plan.origin) { LIVE_READ_ROTATING_BYTES } else { LIVE_READ_BYTES },
    })
}

fn tell_if_blind(plan: &CopyPlan, impact: Option<&ImpactWatch>, observer: &dyn Observer) {
    if impact.is_some() || plan.request.impact == Impact::None {
        return;
    }
    let text = format!(
        "the kernel keeps no statistics of {} (queue/iostats is 0): --impact cannot measure the latency of \
         applications, and the copier is not throttled",
        plan.origin.path.display()
    );
    observer.event(&Event::Note { text });
}

/// The block list: everything except what was free at the instant, as precisely as the secondary's form can express.
pub(in crate::op) fn block_list_of(plan: &CopyPlan, skipped: &[Extent]) -> Vec<Extent> {
    let form = plan.secondary_request(Vec::new()).form;
    BlockList::new(needed(skipped, plan.origin.size))
        .with_parts_max(plan.segment, secondary::parts_max(form))
        .runs()
        .to_vec()
}

/// What is copied, and what the parent has. To be called after the instant.
fn selection_of(
    plan: &CopyPlan,
    skipped: &[Extent],
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Selection> {
    match &plan.since {
        Some(since) => since.selection(&needed(skipped, plan.origin.size), plan.kept.as_ref(), interrupt),
        None => Ok(Selection { needed: block_list_of(plan, skipped), ..Selection::default() }),
    }
}

/// Opens the device below for direct reads.
fn open_below(live: &Live) -> Result<OwnedFd> {
    let path = live.stack().below();
    let below = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
        .open(path)
        .io_context(|| format!("opening {}", path.display()))?;
    Ok(below.into())
}

/// Copies a cold origin; the instant is the beginning of the first read.
fn copy_cold(session: &Session<'_>) -> Result<CopyResult> {
    let plan = session.plan;
    let device = match plan.origin.kind {
        OriginKind::ColdFile => None,
        _ => plan.origin.number,
    };
    let cold = match &plan.kept {
        Some(_) => ColdOrigin::open_snapshot(&plan.origin.path)?,
        None => ColdOrigin::open(&plan.origin.path, device)?,
    };
    // The copy may have waited for its turn at the disk since it was planned.
    plan.kept.as_ref().map_or(Ok(()), since::check_kept)?;
    cold.check_size(plan.origin.size)?;
    let origin = cold.descriptor()?;
    let instant_utc_ns = plan.kept.as_ref().map_or_else(clock::utc_now_ns, |kept| kept.instant_utc_ns);
    let instant = HoldTimes { instant_utc_ns, ..HoldTimes::default() };
    let before_publish = || {
        plan.kept.as_ref().map_or(Ok(()), since::check_kept)?;
        cold.check_unchanged(device)
    };
    let skipped = ranges_left_out(plan);
    let selection = selection_of(plan, &skipped.extents, session.interrupt)?;
    let Transfer { mut engine, mut secondary, mut update } =
        session.transfer.take().expect("the copier does not have it yet");
    let (target, new_record) = (secondary.target().cloned(), NewRecord::of(plan, secondary.as_ref()));
    let (observer, interrupt, kept) = (session.observer, session.interrupt, plan.kept.as_ref());
    let reading = Reading { engine: engine.as_mut(), observer, interrupt };
    mark(update.as_mut(), &selection, (instant_utc_ns, kept), reading)?;
    secondary.set_instant(instant.instant_utc_ns);
    secondary.restrict(&selection.needed);
    secondary.inherit(&selection.inherited);
    let is_stream = secondary.is_stream();
    let mut job = CopyJob::new(engine.as_mut(), origin, plan.origin.size, plan.options(), secondary);
    job.origin_description = plan.origin.path.display().to_string();
    job.block_list.clone_from(&selection.needed);
    job.inherited = selection.inherited;
    job.keeps_checksums = new_record.is_some();
    job.observer = observer;
    job.interrupt = interrupt;
    job.before_publish = &before_publish;
    let copied = copy::run(job);
    if let (Ok(copied), Some(record)) = (&copied, new_record) {
        record.save(plan, &selection.needed, copied, observer);
    }
    let reading = Reading { engine: engine.as_mut(), observer, interrupt };
    let (copy, check) = ended(finished(update, copied, (target.as_ref(), kept), reading), engine, is_stream)?;
    let since = plan.since.as_ref().map(|since| since.report(selection.changed, copy.read_bytes, check));
    Ok(CopyResult {
        instant,
        since,
        copy,
        store: None,
        release: None,
        skipped: SkippedReport::of(&skipped),
        kept: None,
    })
}

/// What the user leaves out of a cold origin, which has no files that can be looked for: whole chunks of ranges.
fn ranges_left_out(plan: &CopyPlan) -> Skipped {
    let Some(omitted) = &plan.omitted else { return Skipped::default() };
    let limits = FreeLimits::omitted(plan.request.chunk);
    let mut extents: ExtentSet =
        skippable(&omitted.omission.ranges, plan.origin.size, &limits).into_iter().collect();
    // That reads as zeros, whatever the chunks of this copy.
    extents.extend(plan.kept.iter().flat_map(|kept| kept.left_out.iter()));
    let extents: Vec<Extent> = extents.iter().collect();
    let bytes = extents.iter().map(|extent| extent.length()).sum();
    Skipped { extents, omitted: Some(bytes), ..Skipped::default() }
}
