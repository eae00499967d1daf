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

use super::cold::ColdOrigin;
use super::live::Live;
use super::originals::StoreOriginals;
use super::plan::{CopyPlan, LivePlan};
use crate::base::clock::{self, Stopwatch};
use crate::base::{Bytes, Error, Result, ResultExt as _};
use crate::copy::progress::{Event, Observer, Phase, StoreFill};
use crate::copy::{self, CopyJob, CopyReport, Impact, ImpactWatch, OriginalsProvider, engine_config};
use crate::dm::Dm;
use crate::io::{EnginePreference, open_engine};
use crate::op::hooks::Hook;
use crate::op::stack::HoldTimes;
use crate::secondary::{self, Secondary};
use crate::store::{CowStore, Fill, KeptStore, Monitor, StoreEvent, TailPlace};
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
    /// Where the store was kept.
    pub kept_store: Option<String>,
    /// The whole command, seconds.
    pub total_seconds: f64,
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
    kept: Option<KeptStore>,
}

/// Carries out `plan`.
///
/// # Errors
/// See the exit codes of [`ErrorKind`]; the error says in which state origin and secondary are.
pub fn run(
    plan: &CopyPlan,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<CopyOutcome> {
    let watch = clock::Stopwatch::start();
    observer.event(&Event::Phase { phase: Phase::Prepare, total: None });
    let secondary = open_secondary(plan)?;
    if let Some(command) = &plan.request.hooks.before {
        let hook =
            Hook { option: "--hook-before", command, origin: &plan.origin.path, below: None, deadline: None };
        if let Err(error) = hook.run(interrupt) {
            return Err(abandon(secondary, error.state("nothing was frozen or inserted")));
        }
    }
    let made = match &plan.live {
        Some(live) => copy_live(plan, live, secondary, observer, interrupt),
        None => {
            let made = copy_cold(plan, secondary, observer, interrupt);
            hook_after(plan, observer, interrupt);
            made
        }
    };
    let made = made?;
    Ok(CopyOutcome {
        origin: plan.origin.path.display().to_string(),
        origin_bytes: plan.origin.size,
        instant: made.instant.into(),
        copy: made.copy,
        store: made.store,
        kept_store: made.kept.map(|kept| kept.path.display().to_string()),
        total_seconds: watch.elapsed().as_secs_f64(),
    })
}

fn open_secondary(plan: &CopyPlan) -> Result<Box<dyn Secondary>> {
    let mut forbidden = plan.forbidden.clone();
    if let Some(live) = &plan.live
        && let TailPlace::Device { number, .. } = &live.store.place
    {
        forbidden.push(*number);
    }
    secondary::open(&plan.secondary_request(forbidden))
}

/// Gives up a secondary that nothing was copied to.
fn abandon(mut secondary: Box<dyn Secondary>, error: Error) -> Error {
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
    mut secondary: Box<dyn Secondary>,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Made> {
    let live = match Live::begin(plan, live_plan, observer, interrupt) {
        Ok(live) => live,
        Err(error) => {
            hook_after(plan, observer, interrupt);
            return Err(abandon(secondary, error));
        }
    };
    let instant = live.stack().times();
    secondary.begin(instant.instant_utc_ns);
    crash_point("copy.data.before");
    let copied = catch_unwind(AssertUnwindSafe(|| copy_below(plan, &live, secondary, observer, interrupt)));
    crash_point("copy.data.after");
    match copied {
        Ok(Ok((copy, store))) => {
            let kept = live.end(plan.request.store.keep).map_err(|error| {
                error.context("the copy is complete, but putting the origin's stack back failed")
            })?;
            Ok(Made { instant, copy, store: Some(store), kept })
        }
        Ok(Err(error)) => Err(live.put_back_after(error)),
        Err(panic) => {
            if let Err(error) = live.end(false) {
                tracing::error!("{error}; run 'tidemark recover'");
            }
            resume_unwind(panic)
        }
    }
}

/// The copy proper, with the monitor beside it; both have ended when this returns.
fn copy_below(
    plan: &CopyPlan,
    live: &Live,
    secondary: Box<dyn Secondary>,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<(CopyReport, StoreFill)> {
    // The monitor first: the store fills, and must grow, while --hook-after runs.
    let (below, monitor, heard) = match open_below(live) {
        Ok(opened) => opened,
        Err(error) => {
            hook_after(plan, observer, interrupt);
            return Err(abandon(secondary, error));
        }
    };
    let relay = || {
        for event in heard.try_iter() {
            tell(observer, event);
        }
    };
    let stop = || {
        relay();
        interrupt().and_then(|()| monitor.check())
    };
    hook_after(plan, observer, &stop);
    let mut originals = StoreOriginals::new(live, &monitor);
    let impact = live.probe().map(|probe| ImpactWatch {
        impact: plan.request.impact,
        before: live.latency_before(),
        probe: Box::new(probe),
    });
    if impact.is_none() && plan.request.impact != Impact::None {
        observer.event(&Event::Note { text: blind_text(plan) });
    }
    let before_publish = || StoreOriginals::new(live, &monitor).check_valid();
    let report = copy_with(
        plan,
        below,
        Some(&mut originals),
        impact,
        secondary,
        &Watch { observer, interrupt: &stop, before_publish: &before_publish },
    );
    drop(originals);
    let fill = progress_of(monitor.stop());
    relay();
    Ok((report?, fill))
}

fn blind_text(plan: &CopyPlan) -> String {
    format!(
        "the kernel keeps no statistics of {} (queue/iostats is 0): --impact cannot see how its applications \
         fare, and the copier does not give way",
        plan.origin.path.display()
    )
}

/// The device beneath, the store's monitor, and what the monitor tells.
fn open_below(live: &Live) -> Result<(OwnedFd, Monitor, Receiver<StoreEvent>)> {
    let path = live.stack().below();
    let below = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
        .open(path)
        .io_context(|| format!("opening {}", path.display()))?;
    let dm = Dm::open()?;
    let snap = live.stack().snap().to_owned();
    let (say, heard) = mpsc::channel();
    let store: Arc<CowStore> = Arc::clone(live.store());
    let monitor = Monitor::start(
        store,
        move || dm.snapshot_status(&snap),
        // Nobody listening any more means that the copy is over.
        move |event| drop(say.send(event)),
    )?;
    Ok((below.into(), monitor, heard))
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
    let watch = Watch { observer, interrupt, before_publish: &before_publish };
    let copy = copy_with(plan, origin, None, None, secondary, &watch)?;
    Ok(Made { instant, copy, store: None, kept: None })
}

/// Who is told, and who is asked, while a copy runs.
struct Watch<'a> {
    observer: &'a dyn Observer,
    interrupt: &'a dyn Fn() -> Result<()>,
    before_publish: &'a dyn Fn() -> Result<()>,
}

fn copy_with(
    plan: &CopyPlan,
    origin: OwnedFd,
    originals: Option<&mut StoreOriginals<'_>>,
    impact: Option<ImpactWatch>,
    secondary: Box<dyn Secondary>,
    watch: &Watch<'_>,
) -> Result<CopyReport> {
    let mut engine = match open_engine(engine_config(plan.segment), EnginePreference::Auto) {
        Ok(engine) => engine,
        Err(error) => return Err(abandon(secondary, error)),
    };
    let origin_size = plan.origin.size;
    let job = CopyJob::new(engine.as_mut(), origin, origin_size, plan.segment, secondary)?;
    copy::run(CopyJob {
        origin_description: plan.origin.path.display().to_string(),
        originals: originals.map(|it| it as &mut dyn OriginalsProvider),
        rate: plan.request.rate,
        impact,
        verify: plan.request.verify,
        observer: watch.observer,
        interrupt: watch.interrupt,
        before_publish: watch.before_publish,
        ..job
    })
}
