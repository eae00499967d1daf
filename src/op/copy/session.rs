//! A copy in progress: what it owns, and its one way out.
//!
//! Whatever happens to a copy, [`Session::finish`] ends it: the origin gets its own table back first, then the secondary is
//! given up where the copy failed, then the job ends, then --hook-after runs where it has not run yet.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use super::live::Live;
use super::plan::{CopyPlan, LivePlan};
use super::report::{CopyOutcome, CopyResult};
use crate::base::clock::Stopwatch;
use crate::base::limits::{COPY_BUFFER_BYTES_MAX, LIVE_COPY_BUFFER_BYTES_MAX};
use crate::base::{Error, Result};
use crate::dm::Dm;
use crate::io::{Engine, EnginePreference, open_engine};
use crate::job::{Job, conclude};
use crate::op::targets::naming_job;
use crate::op::{interruptible, memory};
use crate::progress::{Event, Observer, Phase};
use crate::secondary::{self, Secondary, SecondaryTarget, engine_config};
use crate::stack::hooks::Hook;

/// How long `--hook-after` may go on once the copy is to stop: it undoes what `--hook-before` did.
const HOOK_AFTER_GRACE: Duration = Duration::from_secs(10);

/// What moves the bytes, and where to.
pub struct Transfer {
    /// With buffers for the plan's segments.
    pub engine: Box<dyn Engine>,
    /// The secondary, opened and checked.
    pub secondary: Box<dyn Secondary>,
}

/// A copy in progress.
pub struct Session<'a> {
    pub(super) plan: &'a CopyPlan,
    pub(super) observer: &'a dyn Observer,
    pub(super) interrupt: &'a dyn Fn() -> Result<()>,
    clock: Stopwatch,
    /// None where the origin is held, whose holder has the job then, or where there is none.
    job: Option<Job>,
    /// The origin, if it is live and was begun to be held.
    pub(super) live: Option<Live>,
    /// None before it is opened, and from when the copier has it.
    pub(super) transfer: Cell<Option<Transfer>>,
    /// --hook-before has run, and --hook-after has not.
    is_hook_due: Cell<bool>,
    /// What a killed copy has left cannot be trusted now: it stays as it is.
    pub(super) is_doubted: Cell<bool>,
}

impl<'a> Session<'a> {
    /// Carries out `plan`: prepares the copy, takes the instant of a live origin, calls `copy`, and ends the copy, whatever
    /// happened.
    ///
    /// # Errors
    /// The first failure; the error says in which state origin and secondary are.
    pub fn carry_out(
        plan: &'a CopyPlan,
        observer: &'a dyn Observer,
        interrupt: &'a dyn Fn() -> Result<()>,
        copy: impl FnOnce(&mut Self) -> Result<CopyResult>,
    ) -> Result<CopyOutcome> {
        Self::begin(plan, observer, interrupt)?.ending_with(|session| {
            session.open()?;
            session.hook_before()?;
            if let Some(live_plan) = &plan.live {
                session.hold(live_plan)?;
            }
            copy(session)
        })
    }

    /// As [`Session::carry_out`], for the copy of a process that died, whose instant is over. `is_hook_due`: it did not run
    /// --hook-after.
    ///
    /// # Errors
    /// As [`Session::carry_out`].
    pub fn resume(
        plan: &'a CopyPlan,
        (live, transfer): (Live, Transfer),
        is_hook_due: bool,
        observer: &'a dyn Observer,
        interrupt: &'a dyn Fn() -> Result<()>,
        copy: impl FnOnce(&mut Self) -> Result<CopyResult>,
    ) -> Result<CopyOutcome> {
        let mut session = Self::new(plan, observer, interrupt);
        session.live = Some(live);
        session.transfer.set(Some(transfer));
        session.is_hook_due.set(is_hook_due);
        session.ending_with(copy)
    }

    /// Runs `copy`, then ends the session. A panic would leave the stack in place: it is removed before the panic continues.
    fn ending_with(mut self, copy: impl FnOnce(&mut Self) -> Result<CopyResult>) -> Result<CopyOutcome> {
        match catch_unwind(AssertUnwindSafe(|| copy(&mut self))) {
            Ok(result) => self.finish(result),
            Err(panic) => {
                self.abort();
                resume_unwind(panic)
            }
        }
    }

    /// Begins a copy. First takes the origin's lock, so that of two copies that begin at once one is refused with nothing
    /// made. The job knows all that is made from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) where another job has the origin; I/O errors.
    fn begin(
        plan: &'a CopyPlan,
        observer: &'a dyn Observer,
        interrupt: &'a dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        observer.event(&Event::Phase { phase: Phase::Prepare, total: None });
        for text in plan.origin.not_frozen.iter().chain(&plan.target.warnings) {
            observer.event(&Event::Warning { text: text.clone() });
        }
        let number = plan.origin.number.filter(|_| plan.live.is_some());
        let job = number.map(|number| Job::begin_for_origins("copy", &[number])).transpose();
        let job = job.map_err(|error| error.state("nothing was frozen, and the origin was not changed"))?;
        let mut session = Self::new(plan, observer, interrupt);
        session.job = job;
        Ok(session)
    }

    fn new(plan: &'a CopyPlan, observer: &'a dyn Observer, interrupt: &'a dyn Fn() -> Result<()>) -> Self {
        Self {
            plan,
            observer,
            interrupt,
            clock: Stopwatch::start(),
            job: None,
            live: None,
            transfer: Cell::new(None),
            is_hook_due: Cell::new(false),
            is_doubted: Cell::new(false),
        }
    }

    /// Opens engine and secondary, before the instant and before --hook-before makes applications wait: from the instant
    /// on writers pay for every moment in which nothing is copied, and the buffers alone take a tenth of a second to be
    /// zeroed and pinned.
    ///
    /// # Errors
    /// The secondary's refusals, the engine's.
    fn open(&mut self) -> Result<()> {
        let engine = engine_for(self.plan)
            .map_err(|error| error.state("nothing was frozen, and the origin was not changed"))?;
        let secondary = open_secondary(self.plan, self.interrupt)?;
        // A copy of an origin at rest has a job for its partial file alone.
        match (&mut self.job, secondary.partial_path()) {
            (Some(job), Some(partial)) => job.note_partial(partial),
            (Some(_), None) => {}
            (job, partial) if !secondary.is_stream() => *job = Job::begin_for_target("copy", partial),
            _ => {}
        }
        self.transfer.set(Some(Transfer { engine, secondary }));
        Ok(())
    }

    /// Runs --hook-before. From then on --hook-after is due.
    ///
    /// # Errors
    /// The hook's.
    fn hook_before(&self) -> Result<()> {
        if let Some(command) = &self.plan.request.hooks.before {
            let hook = self.hook("--hook-before", command);
            hook.run(self.interrupt)
                .map_err(|error| error.state("nothing was frozen, and the origin was not changed"))?;
        }
        self.is_hook_due.set(true);
        Ok(())
    }

    /// Runs --hook-after where it is due, whatever came of the instant: it undoes what --hook-before did. Its failure does
    /// not undo the copy. Where `stop` says that the copy is to end (a signal, a lost snapshot), a hook that does not
    /// return is killed after [`HOOK_AFTER_GRACE`].
    pub fn hook_after(&self, stop: &dyn Fn() -> Result<()>) {
        if !self.is_hook_due.replace(false) {
            return;
        }
        let Some(command) = &self.plan.request.hooks.after else { return };
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
        if let Err(error) = self.hook("--hook-after", command).run(&patience) {
            self.observer.event(&Event::Warning { text: error.to_string() });
        }
    }

    fn hook<'h>(&'h self, option: &'static str, command: &'h str) -> Hook<'h> {
        Hook { option, command, origin: &self.plan.origin.path, below: None, deadline: None }
    }

    /// Takes the live origin: makes store and stack. The instant is when this returns.
    ///
    /// # Errors
    /// The first failure; [`Session::finish`] puts back what was made.
    fn hold(&mut self, live_plan: &LivePlan) -> Result<()> {
        let dm = Dm::open()?;
        let job = self.job.take().expect("the copy of a live origin has a job");
        let live = Live::new(dm, self.plan, job);
        self.live.insert(live).insert(self.plan, live_plan, self.observer, self.interrupt)
    }

    /// Ends the copy: see the invariants of this module.
    ///
    /// # Errors
    /// `result`'s, with what could not be undone; what fails when a complete copy's origin is put back.
    fn finish(mut self, result: Result<CopyResult>) -> Result<CopyOutcome> {
        let result = match result {
            // To be tried again, or given up by `recover`: as if this process had been killed.
            Err(error) if self.is_doubted.get() => return Err(error),
            result => self.put_back(result),
        };
        self.hook_after(self.interrupt);
        Ok(CopyOutcome::of(self.plan, result?, self.clock.elapsed()))
    }

    fn put_back(&mut self, result: Result<CopyResult>) -> Result<CopyResult> {
        let unused = self.transfer.take();
        let give_up = |error: Error| match unused.map(|Transfer { mut secondary, .. }| secondary.abandon()) {
            None | Some(Ok(_)) => error,
            Some(Err(undo)) => error.with_failed_undo(undo),
        };
        match (self.live.take(), result) {
            (None, result) => conclude(self.job.take(), result.map_err(give_up)),
            (Some(live), Err(error)) => Err(live.put_back_after(error, give_up)),
            (Some(live), Ok(mut result)) => {
                result.kept = live.end(self.plan.request.store.keep).map_err(|error| {
                    error.context("the copy is complete, but restoring the origin failed")
                })?;
                Ok(result)
            }
        }
    }

    /// Puts the origin back after a panic, and nothing more.
    fn abort(mut self) {
        if let Some(Err(error)) = self.live.take().map(|live| live.end(false)) {
            tracing::error!("{error}; run 'tidemark recover'");
        }
    }
}

/// An engine with buffers for the segments of `plan`.
///
/// # Errors
/// As [`open_engine`].
pub fn engine_for(plan: &CopyPlan) -> Result<Box<dyn Engine>> {
    let most = if plan.live.is_some() { LIVE_COPY_BUFFER_BYTES_MAX } else { COPY_BUFFER_BYTES_MAX };
    let buffers = memory::for_buffers(plan.segment, most)?;
    open_engine(engine_config(plan.segment, buffers), EnginePreference::Auto)
}

/// It may never answer: a signal ends the wait.
fn open_secondary(plan: &CopyPlan, interrupt: &dyn Fn() -> Result<()>) -> Result<Box<dyn Secondary>> {
    plan.check_store()?;
    let request = plan.secondary_request(plan.forbidden_with_store());
    let unwanted = |mut late: Box<dyn Secondary>| drop(late.abandon());
    let opened = interruptible::unless_interrupted(interrupt, move || secondary::open(&request), unwanted);
    opened.map_err(|error| match &plan.request.secondary {
        SecondaryTarget::Path(path) => naming_job(error, path),
        SecondaryTarget::Pipe => error,
    })
}
