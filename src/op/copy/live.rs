//! A live origin during a copy: the job, the store, the stack, and their removal.
//!
//! Order of creation; removal is in the reverse order:
//! 1. the job (lock and intent record), which exists before;
//! 2. the COW store;
//! 3. the stack; the instant is part of its insertion.
//!
//! Several origins with one instant share the job: each step is done for all of them before the next begins, and each
//! has a store of its own, with an id of its own. Their removal is independent; the command that began the job ends it.
//!
//! After a crash at any point, `recover` finds these by their UUIDs and records. After an error they are removed here;
//! whatever cannot be removed is reported with the error and left to `recover`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::latency::OriginProbe;
use super::plan::{CopyPlan, LivePlan};
use crate::base::{DeviceNumber, Error, Result};
use crate::dm::Dm;
use crate::dm::naming::new_id;
use crate::job::Job;
use crate::op::admission::{Admission, Question, WAITING_FOR_OTHERS};
use crate::op::memory;
use crate::progress::{Event, Observer, Phase};
use crate::stack::hooks::{AroundInstant, Deadline, Hook};
use crate::stack::watchdog::Standby;
use crate::stack::{HoldTimes, InsertRequest, InstantContext, Stack};
use crate::store::{CowStore, KeptStore, StoreConfig};
use crate::sys::process::{LockedMemory, crash_point};

/// A live origin that is held, or is about to be.
pub struct Live {
    dm: Dm,
    job: Arc<Mutex<Job>>,
    /// The job is that of several origins, and does not end with this one.
    is_one_of_several: bool,
    store: Option<Arc<CowStore>>,
    stack: Option<Stack>,
    probe: Option<OriginProbe>,
    latency_before: Option<Duration>,
    /// Set if memory may wait for the origin (swap space on it).
    memory: Option<Arc<LockedMemory>>,
}

/// Holds the origins of `plans`, all at one instant: creates their stores and inserts their stacks. `hooks` are those
/// of all of them; only --hook-frozen is run here.
///
/// # Errors
/// The first failure. What was created stays until it is removed by [`Live::end`] or [`Live::put_back_after`].
pub(super) fn hold(
    plans: &[&CopyPlan],
    lives: &mut [Live],
    insert: &InsertRequest,
    hooks: &AroundInstant<'_>,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<HoldTimes> {
    let admission = admit(plans, lives, observer, interrupt)?;
    // The standby starts up while the stores are created.
    let standby = Standby::start(lives[0].job().id());
    for (plan, live) in plans.iter().zip(lives.iter_mut()) {
        crash_point("copy.store.before");
        live.create_store(live_part(plan), observer)?;
        crash_point("copy.store.after");
    }
    check_circles(plans, lives)?;
    interrupt()?;
    for live in lives.iter_mut() {
        live.latency_before = live.probe.as_mut().and_then(OriginProbe::mean);
    }
    observer.event(&Event::Phase { phase: Phase::Instant, total: None });
    let stores: Vec<DeviceNumber> = lives.iter().map(|live| live.store().number()).collect();
    let request = insert.with_stores(&stores);
    let frozen = plans[0].request.hooks.frozen.as_deref();
    let mut at_instant = |instant: &InstantContext<'_>| match frozen {
        None => Ok(()),
        Some(command) => run_frozen(command, hooks, instant, interrupt),
    };
    let dm = Dm::open()?;
    let inserted = Stack::insert(&dm, &mut lives[0].job(), &request, &standby, &mut at_instant, interrupt)?;
    let times = inserted[0].times();
    for (live, stack) in lives.iter_mut().zip(inserted) {
        live.stack = Some(stack);
    }
    drop(admission);
    observer.event(&Event::Instant {
        utc_ns: times.instant_utc_ns,
        frozen: times.frozen,
        suspended: times.suspended,
    });
    Ok(times)
}

fn live_part(plan: &CopyPlan) -> &LivePlan {
    plan.live.as_ref().expect("only live origins are held")
}

/// Runs --hook-frozen.
fn run_frozen(
    command: &str,
    hooks: &AroundInstant<'_>,
    instant: &InstantContext<'_>,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let below: Vec<String> = instant.below.iter().map(|path| path.display().to_string()).collect();
    let below = below.join(" ");
    let mut variables = hooks.variables.to_vec();
    if !variables.is_empty() {
        variables.push(("TIDEMARK_ORIGINS_BELOW", &below));
    }
    Hook {
        option: "--hook-frozen",
        command,
        origin: hooks.origin,
        below: instant.below.first().map(PathBuf::as_path),
        deadline: Some(Deadline { at: instant.deadline, option: "--freeze-budget" }),
        variables: &variables,
    }
    .run(interrupt)
}

/// Admits this process alone: no other process may place a store until the stacks are in place.
fn admit(
    plans: &[&CopyPlan],
    lives: &mut [Live],
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Admission> {
    let note = |text: &str| observer.event(&Event::Note { text: text.to_owned() });
    let admission = Admission::enter(&|| note(WAITING_FOR_OTHERS), interrupt)?;
    // Checked again, because things may have changed since the plan was made.
    check_places(plans)?;
    if plans.iter().any(|plan| live_part(plan).memory_waits) {
        note("memory may wait for the origin (swap space): no part of the store is in memory");
        let memory = memory::lock()
            .map_err(|error| error.state("nothing was frozen, and the origin was not changed"))?;
        let memory = Arc::new(memory);
        lives.iter_mut().for_each(|live| live.memory = Some(Arc::clone(&memory)));
    }
    Ok(admission)
}

fn question(plan: &CopyPlan) -> Result<Question> {
    let dm = Dm::open()?;
    let number = dm.info_of(live_part(plan).config.origin_name.as_str())?.number;
    Question::of(&dm, number)
}

/// Refuses a place for a store that may wait for one of the origins: they are held together.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) with the chain of devices; I/O errors.
pub(super) fn check_places(plans: &[&CopyPlan]) -> Result<()> {
    for plan in plans {
        let question = question(plan)?;
        for other in plans {
            question.check_place(&live_part(other).config.place)?;
        }
    }
    Ok(())
}

/// Checks the created devices themselves: a path may have been redirected since the plan was made.
fn check_circles(plans: &[&CopyPlan], lives: &[Live]) -> Result<()> {
    for plan in plans {
        let question = question(plan)?;
        for (other, live) in plans.iter().zip(lives) {
            question.check_copy(live.store(), &other.request)?;
        }
    }
    Ok(())
}

impl Live {
    /// Prepares the copy of `job`; creates nothing yet.
    #[must_use]
    pub fn new(dm: Dm, plan: &CopyPlan, job: Job) -> Self {
        Self { is_one_of_several: false, ..Self::one_of_several(dm, plan, Arc::new(Mutex::new(job))) }
    }

    /// As [`Live::new`], for one of several origins of `job`. The caller ends the job.
    #[must_use]
    pub fn one_of_several(dm: Dm, plan: &CopyPlan, job: Arc<Mutex<Job>>) -> Self {
        Self {
            dm,
            job,
            is_one_of_several: true,
            store: None,
            stack: None,
            // The probe measures the latency before the instant while the store is created.
            probe: plan.origin.number.and_then(OriginProbe::new),
            latency_before: None,
            memory: None,
        }
    }

    /// Takes over everything that a dead process has created.
    #[must_use]
    pub fn adopt(
        dm: Dm,
        job: Job,
        store: Arc<CowStore>,
        stack: Stack,
        origin: Option<DeviceNumber>,
        memory: Option<LockedMemory>,
    ) -> Self {
        Self {
            dm,
            job: Arc::new(Mutex::new(job)),
            is_one_of_several: false,
            store: Some(store),
            stack: Some(stack),
            probe: origin.and_then(OriginProbe::new),
            latency_before: None,
            memory: memory.map(Arc::new),
        }
    }

    /// Creates the store.
    fn create_store(&mut self, live: &LivePlan, observer: &dyn Observer) -> Result<()> {
        let job = self.job().id().to_owned();
        let id = if self.is_one_of_several { new_id() } else { job.clone() };
        let store = Arc::new(CowStore::create(&StoreConfig { id, job, ..live.config.clone() })?);
        for warning in store.warnings() {
            observer.event(&Event::Warning { text: warning.clone() });
        }
        self.store = Some(store);
        Ok(())
    }

    /// The store.
    pub fn store(&self) -> &Arc<CowStore> {
        self.store.as_ref().expect("the store was made, or the copy had ended")
    }

    /// The stack.
    pub fn stack(&self) -> &Stack {
        self.stack.as_ref().expect("the stack is in place, or the copy had ended")
    }

    /// True if the origin shares its instant, and its job, with others.
    pub fn is_one_of_several(&self) -> bool {
        self.is_one_of_several
    }

    /// Measures the latency of applications on the origin; None if the kernel keeps no statistics.
    pub fn probe(&self) -> Option<OriginProbe> {
        self.probe.clone()
    }

    /// Their mean latency before the instant; None if there were too few requests.
    pub fn latency_before(&self) -> Option<Duration> {
        self.latency_before
    }

    /// The job.
    pub fn job(&self) -> MutexGuard<'_, Job> {
        // A panic leaves the job consistent: its record is replaced atomically.
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The job, for the threads that run in parallel with the copier.
    pub(super) fn shared_job(&self) -> Arc<Mutex<Job>> {
        Arc::clone(&self.job)
    }

    fn into_job(self) -> Job {
        let job =
            Arc::try_unwrap(self.job).expect("the threads that share the job have ended with the copier");
        job.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Device-mapper, to query the snapshot.
    pub fn dm(&self) -> &Dm {
        &self.dm
    }

    /// Restores the origin: first its own table, then removes the devices below, the store and the job, unless that is
    /// the job of several origins. With `keep`, a store that was created to be kept stays.
    ///
    /// # Errors
    /// The first failure; `recover` finds what is left.
    pub fn end(mut self, keep: bool) -> Result<Option<KeptStore>> {
        let kept = self.put_back(keep)?;
        if !self.is_one_of_several {
            self.into_job().finish()?;
        }
        Ok(kept)
    }

    fn put_back(&mut self, keep: bool) -> Result<Option<KeptStore>> {
        if let Some(stack) = self.stack.take() {
            stack.remove(&self.dm, &mut self.job())?;
        }
        crash_point("copy.release.before");
        let kept = match self.store.take().map(Arc::try_unwrap) {
            None => None,
            Some(Ok(store)) => store.release(keep)?,
            Some(Err(_)) => unreachable!("the monitor and the originals, which share the store, have ended"),
        };
        crash_point("copy.release.after");
        Ok(kept)
    }

    /// As [`Live::end`], after the failure `error`, which is reported first. `give_up` then removes what else the job's
    /// record names. If an undo fails or has failed before, the record stays: only the record names what is still
    /// frozen, suspended or in place, and `recover` reads it.
    pub fn put_back_after(mut self, error: Error, give_up: impl FnOnce(Error) -> Error) -> Error {
        let error = match self.put_back(false) {
            Ok(_) => error,
            // Added before anything else: what is left prevents the next copy.
            Err(undo) => error.with_failed_undo(undo),
        };
        if self.is_one_of_several {
            return give_up(error);
        }
        let ended: Result<()> = self.into_job().conclude(Err(give_up(error)));
        ended.expect_err("what began as an error stays one")
    }
}
