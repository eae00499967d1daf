//! Carries a plan out: hooks, secondary, copy, report.
//!
//! A panic while a stack is in place would leave it there: it is caught, the stack is taken away,
//! and the panic goes on.

use std::cell::Cell;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use super::cold::ColdOrigin;
use super::live::Live;
use super::originals::{StoreOriginals, StoreReleases};
use super::plan::{CopyPlan, LivePlan, is_rotating};
use super::rescue::Rescue;
use crate::base::clock::{self, Stopwatch};
use crate::base::limits::{
    COPY_BUFFER_BYTES_MAX, LIVE_COPY_BUFFER_BYTES_MAX, LIVE_READ_BYTES, LIVE_READ_ROTATING_BYTES,
};
use crate::base::{Bytes, Error, Result, ResultExt as _};
use crate::copy::{
    self, CopyJob, CopyReport, Impact, ImpactWatch, OriginalsProvider, PlacementLog, Releases, ResumePoint,
};
use crate::dm::Dm;
use crate::extent::free::needed;
use crate::extent::{BlockList, Extent};
use crate::format::segment_log::{Header, SecondaryForm};
use crate::format::state::CopyRecord;
use crate::io::{Engine, EnginePreference, open_engine};
use crate::job::published::ProgressFile;
use crate::job::segment_log::SegmentLog;
use crate::job::{Job, conclude};
use crate::op::leave;
use crate::op::memory;
use crate::op::request::{OnFull, SecondaryFormat, SecondaryTarget};
use crate::op::targets::naming_job;
use crate::progress::{Event, Observer, Phase, StoreFill};
use crate::secondary::engine_config;
use crate::secondary::{self, Secondary};
use crate::stack::gate::{Gate, GateEvent, GateReport, HoldPolicy};
use crate::stack::hooks::Hook;
use crate::stack::{HoldTimes, Skipped};
use crate::store::{CowStore, Fill, KeptStore, Monitor, StoreEvent};
use crate::sys::process::crash_point;
use crate::volume::OriginKind;

/// What a copy did. Times in milliseconds where named so.
#[derive(Clone, Debug, Serialize)]
pub struct CopyOutcome {
    /// The origin.
    pub origin: String,
    /// Its size, bytes.
    pub origin_bytes: Bytes,
    /// The instant that the copy shows.
    pub instant: InstantReport,
    /// The copier's part.
    #[serde(flatten)]
    pub copy: CopyReport,
    /// The COW store's part; None for an origin at rest.
    pub store: Option<StoreFill>,
    /// How the origin was given back while it was copied; None for an origin at rest.
    pub release: Option<GateReport>,
    /// What was neither copied nor preserved, because nothing there was in use.
    pub skipped: SkippedReport,
    /// What of the filesystems on the origin was not frozen at the instant, and why.
    pub not_frozen: Vec<String>,
    /// Where the store was kept.
    pub kept_store: Option<String>,
    /// The whole command, seconds.
    pub total_seconds: f64,
}

/// Free space that a copy left out.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SkippedReport {
    /// Its bytes.
    pub bytes: Bytes,
    /// In so many ranges.
    pub ranges: usize,
    /// Why nothing, or not more, was left out.
    pub notes: Vec<String>,
}

impl SkippedReport {
    fn of(skipped: &Skipped) -> Self {
        Self {
            bytes: skipped.extents.iter().map(|extent| extent.length()).sum(),
            ranges: skipped.extents.len(),
            notes: skipped.notes.clone(),
        }
    }
}

/// When the instant was, and how long the origin was held for it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct InstantReport {
    /// RFC 3339, UTC.
    pub utc: String,
    /// Filesystems written back before anything was held.
    pub synced_ms: f64,
    /// From the first freeze to the last thaw.
    pub frozen_ms: f64,
    /// From the suspension to the resume.
    pub suspended_ms: f64,
}

impl From<HoldTimes> for InstantReport {
    fn from(times: HoldTimes) -> Self {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Self {
            utc: clock::utc_text(times.instant_utc_ns).unwrap_or_default(),
            synced_ms: ms(times.synced),
            frozen_ms: ms(times.frozen),
            suspended_ms: ms(times.suspended),
        }
    }
}

/// What came of the part between the hooks.
struct Made {
    instant: HoldTimes,
    copy: CopyReport,
    store: Option<StoreFill>,
    release: Option<GateReport>,
    skipped: SkippedReport,
    kept: Option<KeptStore>,
}

/// Carries out `plan`.
///
/// # Errors
/// See the exit codes of [`ErrorKind`](crate::base::ErrorKind); the error says in which state origin and secondary are.
pub fn run(
    plan: &CopyPlan,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<CopyOutcome> {
    let watch = clock::Stopwatch::start();
    observer.event(&Event::Phase { phase: Phase::Prepare, total: None });
    for text in plan.origin.not_frozen.iter().chain(&plan.target.warnings) {
        observer.event(&Event::Warning { text: text.clone() });
    }
    // First, with the origin's lock: of two copies that begin at once one is refused with nothing made.
    let mut job = begin_live_job(plan).map_err(|error| error.state("nothing was frozen or inserted"))?;
    let (engine, secondary) = match open_both(plan, interrupt) {
        Ok(both) => both,
        Err(error) => return conclude(job, Err(error)),
    };
    note_secondary(&mut job, secondary.as_ref());
    if let Some(command) = &plan.request.hooks.before {
        let hook =
            Hook { option: "--hook-before", command, origin: &plan.origin.path, below: None, deadline: None };
        if let Err(error) = hook.run(interrupt) {
            return conclude(job, Err(abandon(secondary, error.state("nothing was frozen or inserted"))));
        }
    }
    let made = match &plan.live {
        Some(live) => {
            let job = job.expect("a live copy has a job");
            copy_live(plan, live, job, secondary, engine, observer, interrupt)
        }
        None => {
            let made = copy_cold(plan, secondary, engine, observer, interrupt);
            hook_after(plan, observer, interrupt);
            conclude(job, made)
        }
    };
    Ok(outcome(plan, made?, watch.elapsed()))
}

/// The job of a live copy, from which `recover` knows all that is made from now on if we die.
fn begin_live_job(plan: &CopyPlan) -> Result<Option<Job>> {
    let number = plan.origin.number.filter(|_| plan.live.is_some());
    number.map(|number| Job::begin_for_origin("copy", number)).transpose()
}

/// Before the instant, and before --hook-before makes anybody wait: from the instant on writers pay for every moment in
/// which nothing is copied, and the buffers alone take a tenth of a second to be zeroed and pinned.
fn open_both(
    plan: &CopyPlan,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<(Box<dyn Engine>, Box<dyn Secondary>)> {
    let engine = engine_for(plan).map_err(|error| error.state("nothing was frozen or inserted"))?;
    Ok((engine, open_secondary(plan, interrupt)?))
}

/// Notes the partial file with the job, which a copy of an origin at rest has for that alone.
fn note_secondary(job: &mut Option<Job>, secondary: &dyn Secondary) {
    match (job, secondary.partial_path()) {
        (Some(job), Some(partial)) => job.note_partial(partial),
        (Some(_), None) => {}
        (job, partial) if !secondary.is_stream() => *job = Job::begin_for_target("copy", partial),
        _ => {}
    }
}

/// An engine with buffers for the segments of `plan`.
///
/// # Errors
/// As [`open_engine`].
pub(in crate::op) fn engine_for(plan: &CopyPlan) -> Result<Box<dyn Engine>> {
    let most = if plan.live.is_some() { LIVE_COPY_BUFFER_BYTES_MAX } else { COPY_BUFFER_BYTES_MAX };
    let buffers = memory::for_buffers(plan.segment, most)?;
    open_engine(engine_config(plan.segment, buffers), EnginePreference::Auto)
}

/// It may never answer: a signal ends the wait.
fn open_secondary(plan: &CopyPlan, interrupt: &dyn Fn() -> Result<()>) -> Result<Box<dyn Secondary>> {
    plan.check_store()?;
    let request = plan.secondary_request(plan.forbidden_with_store());
    let unwanted = |mut late: Box<dyn Secondary>| drop(late.abandon());
    let opened = leave::unless_interrupted(interrupt, move || secondary::open(&request), unwanted);
    opened.map_err(|error| match &plan.request.secondary {
        SecondaryTarget::Path(path) => naming_job(error, path),
        SecondaryTarget::Pipe => error,
    })
}

/// Gives up a secondary that nothing was copied to.
fn abandon(mut secondary: Box<dyn Secondary>, error: Error) -> Error {
    give_up(secondary.as_mut(), error)
}

fn give_up(secondary: &mut dyn Secondary, error: Error) -> Error {
    match secondary.abandon() {
        Ok(_) => error,
        Err(undo) => error.with_failed_undo(undo),
    }
}

/// How long `--hook-after` may go on once the copy is to stop: it undoes what `--hook-before` did.
const HOOK_AFTER_GRACE: Duration = Duration::from_secs(10);

/// Runs `--hook-after` once the origin goes on, whatever came of the instant: what --hook-before
/// prepared must be undone. Its failure does not undo the copy. Where `stop` says that the copy is to
/// end (a signal, a lost snapshot), a hook that does not return is killed after a grace.
fn hook_after(plan: &CopyPlan, observer: &dyn Observer, stop: &dyn Fn() -> Result<()>) {
    let Some(command) = &plan.request.hooks.after else { return };
    let hook =
        Hook { option: "--hook-after", command, origin: &plan.origin.path, below: None, deadline: None };
    let stopped = Cell::new(None);
    let patience = || match (stop(), stopped.get()) {
        (Ok(()), _) => Ok(()),
        (Err(_), None) => {
            stopped.set(Some(Stopwatch::start()));
            Ok(())
        }
        (Err(error), Some(since)) if since.elapsed() >= HOOK_AFTER_GRACE => Err(error),
        (Err(_), Some(_)) => Ok(()),
    };
    if let Err(error) = hook.run(&patience) {
        observer.event(&Event::Warning { text: error.to_string() });
    }
}

fn copy_live(
    plan: &CopyPlan,
    live_plan: &LivePlan,
    job: Job,
    mut secondary: Box<dyn Secondary>,
    engine: Box<dyn Engine>,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Made> {
    let without = |error| give_up(secondary.as_mut(), error);
    let live = match Live::begin(plan, live_plan, job, without, observer, interrupt) {
        Ok(live) => live,
        Err(error) => {
            hook_after(plan, observer, interrupt);
            return Err(error);
        }
    };
    secondary.begin(live.stack().times().instant_utc_ns);
    tell_skipped(plan, &SkippedReport::of(live.stack().skipped()), observer);
    let journal = match note_copy(plan, &live, secondary.as_ref()) {
        Ok(journal) => journal,
        Err(error) => {
            hook_after(plan, observer, interrupt);
            return Err(live.put_back_after(error, |error| give_up(secondary.as_mut(), error)));
        }
    };
    crash_point("copy.data.before");
    copy_and_put_back(
        plan,
        live,
        Way { secondary, engine, journal, from: None, hook: true },
        observer,
        interrupt,
    )
}

/// Goes on with a copy whose process died; `hook`: --hook-after was not run yet.
///
/// # Errors
/// As [`run`].
pub(in crate::op) fn resume_copy(
    plan: &CopyPlan,
    live: Live,
    way: Way,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<CopyOutcome> {
    let watch = clock::Stopwatch::start();
    let made = copy_and_put_back(plan, live, way, observer, interrupt)?;
    Ok(outcome(plan, made, watch.elapsed()))
}

fn outcome(plan: &CopyPlan, made: Made, total: Duration) -> CopyOutcome {
    CopyOutcome {
        origin: plan.origin.path.display().to_string(),
        origin_bytes: plan.origin.size,
        instant: made.instant.into(),
        copy: made.copy,
        store: made.store,
        release: made.release,
        skipped: made.skipped,
        not_frozen: plan.origin.not_frozen.clone(),
        kept_store: made.kept.map(|kept| kept.path.display().to_string()),
        total_seconds: total.as_secs_f64(),
    }
}

/// Notes what another process would need to go on. None where none could: what went down a pipe is gone.
fn note_copy(plan: &CopyPlan, live: &Live, secondary: &dyn Secondary) -> Result<Option<SegmentLog>> {
    if secondary.is_stream() {
        return Ok(None);
    }
    let times = live.stack().times();
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let request = serde_json::to_string(&plan.request)
        .map_err(|source| Error::bad_data("the request cannot be written down").with_source(source))?;
    let range = |extent: &Extent| (extent.start().get(), extent.end().get());
    let mut job = live.job();
    let header = Header {
        job: Uuid::parse_str(job.id())
            .map_err(|source| Error::bad_data("the job's id").with_source(source))?,
        form: match plan.request.format {
            SecondaryFormat::Raw => SecondaryForm::Raw,
            SecondaryFormat::Archive => SecondaryForm::Archive,
        },
        archive: secondary.archive_id(),
        origin_size: plan.origin.size,
        segment: plan.segment,
        instant_ns: times.instant_utc_ns,
    };
    // The journal first: a record of a copy has one.
    let journal = SegmentLog::create(&job.segments_path(), &header)?;
    job.set_copy(CopyRecord {
        request,
        origin_path: plan.origin.path.display().to_string(),
        segment_bytes: plan.segment.bytes().get(),
        region_bytes: plan.region.get(),
        instant_utc_ns: times.instant_utc_ns,
        held_ns: [nanos(times.synced), nanos(times.frozen), nanos(times.suspended)],
        archive: secondary.archive_id().map(|id| id.to_string()),
        partial: secondary.partial_path().map(|path| path.display().to_string()),
        skipped: live.stack().skipped().extents.iter().map(range).collect(),
        hook_after_done: false,
        target: secondary.target().cloned(),
    })?;
    Ok(Some(journal))
}

/// How a copy is made once the origin is held: from its beginning or from where another process stopped.
pub(in crate::op) struct Way {
    pub(in crate::op) secondary: Box<dyn Secondary>,
    /// With buffers for the plan's segments.
    pub(in crate::op) engine: Box<dyn Engine>,
    /// None where nobody could go on with it.
    pub(in crate::op) journal: Option<SegmentLog>,
    pub(in crate::op) from: Option<ResumePoint>,
    /// --hook-after is to be run.
    pub(in crate::op) hook: bool,
}

/// The copy proper, then everything is put back, however it went.
fn copy_and_put_back(
    plan: &CopyPlan,
    live: Live,
    way: Way,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Made> {
    let instant = live.stack().times();
    let skipped = SkippedReport::of(live.stack().skipped());
    let shown = ProgressFile::new(observer, live.progress_path());
    let observer: &dyn Observer = &shown;
    let doubted = Cell::new(false);
    let on_doubt = || doubted.set(true);
    let copied =
        catch_unwind(AssertUnwindSafe(|| copy_below(plan, &live, way, observer, (interrupt, &on_doubt))));
    crash_point("copy.data.after");
    match copied {
        Ok(Ok(Copied { copy, store, release })) => {
            let kept = live.end(plan.request.store.keep).map_err(|error| {
                error.context("the copy is complete, but putting the origin's stack back failed")
            })?;
            Ok(Made { instant, copy, store: Some(store), release: Some(release), skipped, kept })
        }
        // To be tried again, or given up by `recover`: as if this process had died in its turn.
        Ok(Err(error)) if doubted.get() => Err(error),
        // The secondary was given up by whoever had it.
        Ok(Err(error)) => Err(live.put_back_after(error, |error| error)),
        Err(panic) => {
            if let Err(error) = live.end(false) {
                tracing::error!("{error}; run 'tidemark recover'");
            }
            resume_unwind(panic)
        }
    }
}

fn tell_skipped(plan: &CopyPlan, skipped: &SkippedReport, observer: &dyn Observer) {
    for text in &skipped.notes {
        observer.event(&Event::Note { text: format!("free space: {text}; all of it is copied") });
    }
    let text = if plan.request.all {
        "free space is copied and preserved as well (--all)".to_owned()
    } else if skipped.bytes == Bytes::ZERO {
        "no free space is known: everything is copied".to_owned()
    } else {
        format!("{} of free space are not copied", skipped.bytes)
    };
    observer.event(&Event::Note { text });
}

/// What came of the copy proper.
struct Copied {
    copy: CopyReport,
    store: StoreFill,
    release: GateReport,
}

/// The origin gets its own table back before anything waits for the secondary. Where that fails, it is tried again, and
/// reported, when the rest is put back.
fn restore_first(live: &Live) {
    if let Err(error) = live.stack().restore(live.dm(), &mut live.job()) {
        tracing::warn!("{error}");
    }
}

/// The copy proper, with the monitor and the gate beside it; all have ended when this returns.
fn copy_below(
    plan: &CopyPlan,
    live: &Live,
    way: Way,
    observer: &dyn Observer,
    (interrupt, on_doubt): (&dyn Fn() -> Result<()>, &dyn Fn()),
) -> Result<Copied> {
    let Way { mut secondary, engine, mut journal, from, hook } = way;
    // The monitor first: the store fills, and must grow, while --hook-after runs.
    let beside = match Beside::start(plan, live) {
        Ok(beside) => beside,
        Err(error) => {
            restore_first(live);
            if hook {
                hook_after(plan, observer, interrupt);
            }
            return Err(abandon(secondary, error));
        }
    };
    let stop = || {
        beside.relay(plan, observer);
        interrupt().and_then(|()| beside.monitor.check())
    };
    if hook {
        hook_after(plan, observer, &stop);
    }
    let opened = open_below(live).and_then(|below| live.job().set_hook_after_done().map(|()| below));
    let below = match opened {
        Ok(below) => below,
        Err(error) => {
            beside.rescue.restore();
            return Err(abandon(secondary, error));
        }
    };
    let block_list = block_list_of(plan, &live.stack().skipped().extents);
    secondary.restrict(&block_list);
    let (monitor, gate) = (&beside.monitor, &beside.gate);
    let mut originals = StoreOriginals::new(live, monitor, gate);
    let mut releases = StoreReleases::new(live, gate, plan.order == copy::Order::Hot);
    let impact = impact_watch(plan, live);
    if impact.is_none() && plan.request.impact != Impact::None {
        observer.event(&Event::Note { text: blind_text(plan) });
    }
    let before_publish = || StoreOriginals::new(live, monitor, gate).check_valid();
    let on_failure = || beside.rescue.restore();
    let report = copy_with(
        plan,
        below,
        Some(Preserved {
            originals: &mut originals,
            releases: &mut releases,
            progress: journal.as_mut().map(|journal| journal as &mut dyn PlacementLog),
            from,
            impact,
            block_list,
            first: live.stack().logs().to_vec(),
        }),
        (secondary, engine),
        &Watch {
            observer,
            interrupt: &stop,
            before_publish: &before_publish,
            on_failure: &on_failure,
            on_doubt,
        },
    );
    drop((originals, releases));
    let (store, release) = beside.stop(plan, observer);
    Ok(Copied { copy: report?, store, release })
}

/// How the applications fare; None where the kernel does not tell.
fn impact_watch(plan: &CopyPlan, live: &Live) -> Option<ImpactWatch> {
    live.probe().map(|probe| ImpactWatch {
        impact: plan.request.impact,
        before: live.latency_before(),
        probe: Box::new(probe),
        read_max: if is_rotating(&plan.origin) { LIVE_READ_ROTATING_BYTES } else { LIVE_READ_BYTES },
    })
}

fn blind_text(plan: &CopyPlan) -> String {
    format!(
        "the kernel keeps no statistics of {} (queue/iostats is 0): --impact cannot see how its applications \
         fare, and the copier does not give way",
        plan.origin.path.display()
    )
}

/// What is copied: everything but what was not in use at the instant, as far as the secondary's form can tell
/// it apart.
pub(in crate::op) fn block_list_of(plan: &CopyPlan, skipped: &[Extent]) -> Vec<Extent> {
    let form = plan.secondary_request(Vec::new()).form;
    BlockList::new(needed(skipped, plan.origin.size))
        .with_parts_max(plan.segment, secondary::parts_max(form))
        .runs()
        .to_vec()
}

/// Who works beside the copier, and what they tell.
struct Beside {
    monitor: Arc<Monitor>,
    gate: Gate,
    rescue: Rescue,
    store_events: Receiver<StoreEvent>,
    gate_events: Receiver<GateEvent>,
}

impl Beside {
    fn start(plan: &CopyPlan, live: &Live) -> Result<Self> {
        let dm = Dm::open()?;
        let snap = live.stack().snap().to_owned();
        let (say, store_events) = mpsc::channel();
        let store: Arc<CowStore> = Arc::clone(live.store());
        let monitor = Arc::new(Monitor::start(
            store,
            move || dm.snapshot_status(&snap),
            // Nobody listening any more means that the copy is over.
            move |event| drop(say.send(event)),
        )?);
        let hold = (plan.request.on_full == OnFull::Hold).then(|| {
            let monitor = Arc::clone(&monitor);
            HoldPolicy { is_short: Box::new(move || monitor.is_short()), budget: plan.request.hold_budget }
        });
        let (say, gate_events) = mpsc::channel();
        let gate = Gate::start(live.stack(), live.stack().released(), hold, move |event| {
            // Nobody listening any more means that the copy is over.
            let _ = say.send(event);
        })?;
        let rescue = Rescue::start(live, &gate)?;
        Ok(Self { monitor, gate, rescue, store_events, gate_events })
    }

    fn relay(&self, plan: &CopyPlan, observer: &dyn Observer) {
        for event in self.store_events.try_iter() {
            tell(observer, event);
        }
        for event in self.gate_events.try_iter() {
            tell_gate(plan, observer, event);
        }
    }

    /// Ends all of them; the gate before the monitor, which asks the monitor.
    fn stop(self, plan: &CopyPlan, observer: &dyn Observer) -> (StoreFill, GateReport) {
        self.relay(plan, observer);
        drop(self.rescue);
        let release = self.gate.stop();
        let fill = match Arc::try_unwrap(self.monitor) {
            Ok(monitor) => monitor.stop(),
            Err(monitor) => monitor.fill(),
        };
        for event in self.store_events.try_iter() {
            tell(observer, event);
        }
        (progress_of(fill), release)
    }
}

/// The device beneath, for direct reading.
fn open_below(live: &Live) -> Result<OwnedFd> {
    let path = live.stack().below();
    let below = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
        .open(path)
        .io_context(|| format!("opening {}", path.display()))?;
    Ok(below.into())
}

fn tell_gate(plan: &CopyPlan, observer: &dyn Observer, event: GateEvent) {
    let regions = |bytes: Bytes| bytes.get().div_ceil(plan.region.get().max(1));
    match event {
        GateEvent::Released(report, stall) => observer.event(&Event::Regions {
            released: regions(report.released_bytes),
            total: regions(plan.origin.size),
            released_bytes: report.released_bytes,
            stall,
            longest_stall: report.longest_stall,
        }),
        GateEvent::Holding => observer.event(&Event::Warning {
            text: "the store is about to fill: writers of the origin are held until the copy has caught up"
                .to_owned(),
        }),
        GateEvent::HoldSpent => observer.event(&Event::Warning {
            text: "writers have been held for as long as --hold-budget allows: they go on, and the snapshot \
                   is lost when the store is full"
                .to_owned(),
        }),
    }
}

fn tell(observer: &dyn Observer, event: StoreEvent) {
    match event {
        StoreEvent::Fill(fill) => observer.event(&Event::Store(progress_of(fill))),
        StoreEvent::Grown(grown) => observer
            .event(&Event::Note { text: format!("the store has grown from {} to {}", grown.from, grown.to) }),
        StoreEvent::Warning(text) => observer.event(&Event::Warning { text }),
    }
}

fn progress_of(fill: Fill) -> StoreFill {
    StoreFill {
        used_bytes: fill.used_bytes,
        total_bytes: fill.total_bytes,
        ram_bytes: fill.ram_bytes,
        ram_used_bytes: fill.used_ram_bytes,
        disk_used_bytes: fill.used_disk_bytes,
        exceptions: fill.exceptions,
        fill_bytes_per_second: fill.fill_bytes_per_second,
        exceptions_per_second: fill.exceptions_per_second,
    }
}

/// Reads an origin at rest; the instant is the beginning of the reading.
fn copy_cold(
    plan: &CopyPlan,
    mut secondary: Box<dyn Secondary>,
    engine: Box<dyn Engine>,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Made> {
    let device = match plan.origin.kind {
        OriginKind::ColdFile => None,
        _ => plan.origin.number,
    };
    let cold = match ColdOrigin::open(&plan.origin.path, device) {
        Ok(cold) => cold,
        Err(error) => return Err(abandon(secondary, error)),
    };
    let instant = HoldTimes { instant_utc_ns: clock::utc_now_ns(), ..HoldTimes::default() };
    secondary.begin(instant.instant_utc_ns);
    let before_publish = || cold.check_unchanged(device);
    let origin = match cold.descriptor() {
        Ok(origin) => origin,
        Err(error) => return Err(abandon(secondary, error)),
    };
    let nothing = || ();
    let watch = Watch {
        observer,
        interrupt,
        before_publish: &before_publish,
        on_failure: &nothing,
        on_doubt: &nothing,
    };
    let copy = copy_with(plan, origin, None, (secondary, engine), &watch)?;
    Ok(Made { instant, copy, store: None, release: None, skipped: SkippedReport::default(), kept: None })
}

/// Who is told, and who is asked, while a copy runs.
struct Watch<'a> {
    observer: &'a dyn Observer,
    interrupt: &'a dyn Fn() -> Result<()>,
    before_publish: &'a dyn Fn() -> Result<()>,
    on_failure: &'a dyn Fn(),
    on_doubt: &'a dyn Fn(),
}

/// What only a live origin has.
struct Preserved<'a> {
    originals: &'a mut dyn OriginalsProvider,
    releases: &'a mut dyn Releases,
    progress: Option<&'a mut dyn PlacementLog>,
    from: Option<ResumePoint>,
    impact: Option<ImpactWatch>,
    block_list: Vec<Extent>,
    first: Vec<Extent>,
}

fn copy_with(
    plan: &CopyPlan,
    origin: OwnedFd,
    preserved: Option<Preserved<'_>>,
    (secondary, mut engine): (Box<dyn Secondary>, Box<dyn Engine>),
    watch: &Watch<'_>,
) -> Result<CopyReport> {
    let is_stream = secondary.is_stream();
    let mut job = CopyJob::new(engine.as_mut(), origin, plan.origin.size, plan.segment, secondary)?;
    job.origin_description = plan.origin.path.display().to_string();
    job.region = plan.region;
    job.order = plan.order;
    job.rate = plan.request.rate;
    job.verify = plan.request.verify;
    job.observer = watch.observer;
    job.interrupt = watch.interrupt;
    job.before_publish = watch.before_publish;
    job.on_failure = watch.on_failure;
    job.on_doubt = watch.on_doubt;
    if let Some(preserved) = preserved {
        job.block_list = preserved.block_list;
        job.first = preserved.first;
        job.originals = Some(preserved.originals);
        job.releases = Some(preserved.releases);
        job.progress = preserved.progress.map(|it| it as &mut dyn PlacementLog);
        job.resumed = preserved.from;
        job.impact = preserved.impact;
    }
    let copied = copy::run(job);
    if engine.in_flight() > 0 && !is_stream {
        // The kernel may still read from these buffers: they stay until the process has ended, which waits for that.
        std::mem::forget(engine);
    }
    copied
}
