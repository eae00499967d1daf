//! Owns everything of a copy in progress, and ends it.
//!
//! Every copy ends in [`Session::finish`], in this order: the origin's own table is restored, the secondary of a failed
//! copy is abandoned, the job ends, and --hook-after runs if it is still due.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use super::live::{self, Live};
use super::plan::{CopyPlan, LivePlan};
use super::report::{CopyOutcome, CopyResult};
use super::turns::{enter_queue, join_queue};
use super::update::{Reading, Update};
use crate::base::clock::Stopwatch;
use crate::base::limits::{COPY_BUFFER_BYTES_MAX, LIVE_COPY_BUFFER_BYTES_MAX};
use crate::base::{Error, Result};
use crate::dm::Dm;
use crate::io::{Engine, EnginePreference, open_engine};
use crate::job::disk_queue::Place;
use crate::job::{Job, conclude};
use crate::op::targets::naming_job;
use crate::op::{interruptible, memory};
use crate::progress::{Event, Observer, Phase};
use crate::secondary::{self, Secondary, SecondaryTarget, engine_config};
use crate::stack::hooks::AroundInstant;

/// The engine and the secondary.
pub struct Transfer {
    /// Its buffers fit the plan's segments.
    pub engine: Box<dyn Engine>,
    /// The secondary, opened and checked.
    pub secondary: Box<dyn Secondary>,
    /// The update of a secondary that holds a copy, which was compared with its record.
    pub update: Option<Update>,
}

/// What an origin has in common with others that are copied from the same instant. All of it is ended by their owner.
#[derive(Clone)]
pub(super) struct Shared<'a> {
    /// Their job.
    pub job: Arc<Mutex<Job>>,
    /// How many origins there are.
    pub count: usize,
    /// Which of them this one is.
    pub index: usize,
    /// Locked while one of them opens its engine and its secondary: each sees how much memory the others have left.
    pub opening: &'a Mutex<()>,
    /// Returns when the origin at an index may be read. Polls its second argument, and passes its errors on.
    pub await_turn: &'a Turn<'a>,
}

/// See [`Shared::await_turn`].
pub(super) type Turn<'a> = dyn Fn(usize, &dyn Observer, &dyn Fn() -> Result<()>) -> Result<()> + Sync + 'a;

/// A copy in progress.
pub struct Session<'a> {
    pub(super) plan: &'a CopyPlan,
    pub(super) observer: &'a dyn Observer,
    pub(super) interrupt: &'a dyn Fn() -> Result<()>,
    clock: Stopwatch,
    /// None while the origin is held, because [`Live`] owns the job then, and if there is no job.
    job: Option<Job>,
    /// Set for one origin of several.
    pub(super) shared: Option<Shared<'a>>,
    /// The place in the queue at the rotating disks of the origin.
    place: Option<Place>,
    /// The live origin, once holding it has begun.
    pub(super) live: Option<Live>,
    /// None before it is opened, and after it was passed to the copier.
    pub(super) transfer: Cell<Option<Transfer>>,
    hooks: AroundInstant<'a>,
    /// What a killed copy has left cannot be verified now, so it stays as it is.
    pub(super) is_doubted: Cell<bool>,
}

impl<'a> Session<'a> {
    /// Executes `plan`: prepares the copy, takes the instant of a live origin, calls `copy`, and ends the copy in any
    /// case.
    ///
    /// # Errors
    /// The first failure, with the state of the origin and of the secondary.
    pub fn carry_out(
        plan: &'a CopyPlan,
        observer: &'a dyn Observer,
        interrupt: &'a dyn Fn() -> Result<()>,
        copy: impl FnOnce(&mut Self) -> Result<CopyResult>,
    ) -> Result<CopyOutcome> {
        Self::begin(plan, observer, interrupt)?.ending_with(|session| {
            session.enter_queue()?;
            session.open()?;
            session.hook_before()?;
            if let Some(live_plan) = &plan.live {
                session.hold(live_plan)?;
            }
            copy(session)
        })
    }

    /// As [`Session::carry_out`], for one origin of several. `hold` returns the origin, held, once that is done for all
    /// of them; it is called when the engine and the secondary are open.
    ///
    /// # Errors
    /// As [`Session::carry_out`].
    pub(super) fn carry_out_one_of_several(
        plan: &'a CopyPlan,
        shared: Shared<'a>,
        observer: &'a dyn Observer,
        interrupt: &'a dyn Fn() -> Result<()>,
        hold: impl FnOnce() -> Result<Live>,
        copy: impl FnOnce(&mut Self) -> Result<CopyResult>,
    ) -> Result<CopyOutcome> {
        let mut session = Self::new(plan, observer, interrupt);
        session.shared = Some(shared);
        session.ending_with(|session| {
            session.open()?;
            session.live = Some(hold()?);
            copy(session)
        })
    }

    /// As [`Session::carry_out`], for the copy of a dead process that has passed its instant. `is_hook_due`: that
    /// process had not run --hook-after. It waits for no turn, as the store fills: others wait for it.
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
        session.place = join_queue(std::slice::from_ref(plan), Some(live.job().id()))
            .inspect_err(|error| tracing::debug!(%error, "other copies do not wait for this one"))
            .ok()
            .flatten();
        session.live = Some(live);
        session.transfer.set(Some(transfer));
        session.hooks.is_due.set(is_hook_due);
        session.ending_with(copy)
    }

    /// Runs `copy`, then ends the session. If `copy` panics, the stack is removed before the panic continues.
    fn ending_with(mut self, copy: impl FnOnce(&mut Self) -> Result<CopyResult>) -> Result<CopyOutcome> {
        match catch_unwind(AssertUnwindSafe(|| copy(&mut self))) {
            Ok(result) => self.finish(result),
            Err(panic) => {
                self.abort();
                resume_unwind(panic)
            }
        }
    }

    /// Begins a copy. Locks the origin first: if two copies begin at the same time, one is refused before it has
    /// created anything. The job records everything that is created from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if another job uses the origin; I/O errors.
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
            shared: None,
            place: None,
            live: None,
            transfer: Cell::new(None),
            hooks: plan.request.hooks.around(&plan.origin.path),
            is_doubted: Cell::new(false),
        }
    }

    /// Waits for its turn at the rotating disks of the origin, before anything else is done: nothing is held meanwhile
    /// but the lock of a live origin.
    ///
    /// # Errors
    /// As [`enter_queue`].
    fn enter_queue(&mut self) -> Result<()> {
        let job = self.job.as_ref().map(|job| job.id().to_owned());
        let plans = std::slice::from_ref(self.plan);
        self.place = enter_queue(plans, job.as_deref(), self.observer, self.interrupt)
            .map_err(|error| error.state("nothing was frozen, and the origin was not changed"))?;
        Ok(())
    }

    /// Opens the engine and the secondary before the instant, and before --hook-before makes applications wait. After
    /// the instant every delay costs the writers, and zeroing and pinning the buffers alone takes a tenth of a second.
    ///
    /// # Errors
    /// The errors of opening the engine and the secondary.
    fn open(&mut self) -> Result<()> {
        let opening = self.shared.as_ref().map(|shared| shared.opening);
        // It guards nothing that a panic could leave inconsistent.
        let _alone = opening.map(|opening| opening.lock().unwrap_or_else(PoisonError::into_inner));
        let mut engine = engine_for(self.plan, self.shared.as_ref().map_or(1, |shared| shared.count))
            .map_err(|error| error.state("nothing was frozen, and the origin was not changed"))?;
        let mut secondary = open_secondary(self.plan, self.interrupt)?;
        if let Some(shared) = &self.shared {
            // A panic leaves the job consistent: its record is replaced atomically.
            let mut job = shared.job.lock().unwrap_or_else(PoisonError::into_inner);
            secondary.partial_path().into_iter().for_each(|partial| job.note_partial(partial));
            drop(job);
            self.transfer.set(Some(Transfer { engine, secondary, update: None }));
            return Ok(());
        }
        let (observer, interrupt) = (self.observer, self.interrupt);
        let mut reading = Reading { engine: engine.as_mut(), observer, interrupt };
        let update = Update::begin(self.plan, secondary.as_mut(), &mut reading)?;
        // The job of a cold copy records only the partial file.
        match (&mut self.job, secondary.partial_path()) {
            (Some(job), Some(partial)) => job.note_partial(partial),
            (Some(_), None) => {}
            (job, partial) if !secondary.is_stream() => *job = Job::begin_for_target("copy", partial),
            _ => {}
        }
        self.transfer.set(Some(Transfer { engine, secondary, update }));
        Ok(())
    }

    /// Runs --hook-before. From now on --hook-after is due.
    ///
    /// # Errors
    /// Those of [`AroundInstant::before`].
    fn hook_before(&self) -> Result<()> {
        let run = self.hooks.before(self.interrupt);
        run.map_err(|error| error.state("nothing was frozen, and the origin was not changed"))
    }

    /// Runs --hook-after if it is due. Its failure does not undo the copy. `stop`: see [`AroundInstant::after`].
    pub fn hook_after(&self, stop: &dyn Fn() -> Result<()>) {
        if let Err(error) = self.hooks.after(stop) {
            self.observer.event(&Event::Warning { text: error.to_string() });
        }
    }

    /// Holds the live origin: creates the store and inserts the stack. When this returns, the instant is over.
    ///
    /// # Errors
    /// The first failure; [`Session::finish`] removes what was created.
    fn hold(&mut self, live_plan: &LivePlan) -> Result<()> {
        let dm = Dm::open()?;
        let job = self.job.take().expect("the copy of a live origin has a job");
        let live = self.live.insert(Live::new(dm, self.plan, job));
        let lives = std::slice::from_mut(live);
        live::hold(&[self.plan], lives, &live_plan.insert, &self.hooks, self.observer, self.interrupt)
            .map(drop)
    }

    /// Ends the copy, in the order that the module documentation states.
    ///
    /// # Errors
    /// The error of `result`, with what could not be undone. For a complete copy, the error of restoring the origin.
    fn finish(mut self, result: Result<CopyResult>) -> Result<CopyOutcome> {
        let result = match result {
            // As if this process had been killed: the copy can be resumed again, or abandoned by `recover`.
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
                result.kept =
                    live.end(self.plan.request.store.keep).map_err(|error| self.not_restored(error))?;
                Ok(result)
            }
        }
    }

    /// The error of a complete copy whose origin could not be restored because of `error`. Among several, it tells the
    /// owner of the job that its record is still needed.
    fn not_restored(&self, error: Error) -> Error {
        const WHAT: &str = "the copy is complete, but restoring the origin failed";
        if self.shared.is_none() {
            return error.context(WHAT);
        }
        Error::new(error.kind(), WHAT).next("run 'tidemark recover'").with_failed_undo(error)
    }

    /// Restores the origin after a panic, runs --hook-after if it is due, and does nothing else.
    fn abort(mut self) {
        if let Some(Err(error)) = self.live.take().map(|live| live.end(false)) {
            tracing::error!("{error}; run 'tidemark recover'");
        }
        self.hook_after(self.interrupt);
    }
}

/// An engine with buffers for the segments of `plan`, which is one of `copies` at once.
///
/// # Errors
/// As [`open_engine`].
pub fn engine_for(plan: &CopyPlan, copies: usize) -> Result<Box<dyn Engine>> {
    let most = if plan.live.is_some() { LIVE_COPY_BUFFER_BYTES_MAX } else { COPY_BUFFER_BYTES_MAX };
    let buffers = memory::for_buffers(plan.segment, most, u64::try_from(copies).unwrap_or(u64::MAX))?;
    open_engine(engine_config(plan.segment, buffers), EnginePreference::Auto)
}

/// The secondary may never answer, so a signal ends the wait.
fn open_secondary(plan: &CopyPlan, interrupt: &dyn Fn() -> Result<()>) -> Result<Box<dyn Secondary>> {
    plan.check_store()?;
    let request = plan.secondary_request(plan.forbidden_with_store());
    let unwanted = |mut late: Box<dyn Secondary>| drop(late.abandon());
    let opened = interruptible::unless_interrupted(interrupt, move || secondary::open(&request), unwanted);
    let opened = opened.and_then(|mut opened| match &plan.request.secondary {
        SecondaryTarget::Path(path) => match plan.target.check_same(path) {
            Ok(()) => Ok(opened),
            Err(error) => Err(error.after_undo(opened.abandon().map(drop))),
        },
        SecondaryTarget::Pipe => Ok(opened),
    });
    opened.map_err(|error| match &plan.request.secondary {
        SecondaryTarget::Path(path) => naming_job(error, path),
        SecondaryTarget::Pipe => error,
    })
}
