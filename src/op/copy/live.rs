//! A live origin during a copy: the job, the store, the stack, and their removal.
//!
//! Order of creation; removal is in the reverse order:
//! 1. the job (lock and intent record), which exists before;
//! 2. the COW store;
//! 3. the stack; the instant is part of its insertion.
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
use crate::job::Job;
use crate::op::admission::{Admission, Question, WAITING_FOR_OTHERS};
use crate::op::memory;
use crate::progress::{Event, Observer, Phase};
use crate::stack::hooks::{Deadline, Hook};
use crate::stack::watchdog::Standby;
use crate::stack::{InstantContext, Stack};
use crate::store::{CowStore, KeptStore, StoreConfig};
use crate::sys::process::{LockedMemory, crash_point};

/// A live origin that is held, or is about to be.
pub struct Live {
    dm: Dm,
    job: Arc<Mutex<Job>>,
    store: Option<Arc<CowStore>>,
    stack: Option<Stack>,
    probe: Option<OriginProbe>,
    latency_before: Option<Duration>,
    /// Set if memory may wait for the origin (swap space on it).
    memory: Option<LockedMemory>,
}

impl Live {
    /// Prepares the copy of `job`; creates nothing yet.
    #[must_use]
    pub fn new(dm: Dm, plan: &CopyPlan, job: Job) -> Self {
        Self {
            dm,
            job: Arc::new(Mutex::new(job)),
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
            store: Some(store),
            stack: Some(stack),
            probe: origin.and_then(OriginProbe::new),
            latency_before: None,
            memory,
        }
    }

    /// Creates the store and inserts the stack; the instant is part of the insertion.
    ///
    /// # Errors
    /// The first failure. What was created stays until it is removed by [`Live::end`] or [`Live::put_back_after`].
    pub fn insert(
        &mut self,
        plan: &CopyPlan,
        live: &LivePlan,
        observer: &dyn Observer,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let admission = self.admit(live, observer, interrupt)?;
        // The standby starts up while the store is created.
        let standby = Standby::start(self.job().id());
        let config = StoreConfig { id: self.job().id().to_owned(), ..live.config.clone() };
        crash_point("copy.store.before");
        let store = Arc::new(CowStore::create(&config)?);
        self.store = Some(Arc::clone(&store));
        self.check_circles(plan, live, &store)?;
        crash_point("copy.store.after");
        for warning in store.warnings() {
            observer.event(&Event::Warning { text: warning.clone() });
        }
        interrupt()?;
        self.latency_before = self.probe.as_mut().and_then(OriginProbe::mean);
        observer.event(&Event::Phase { phase: Phase::Instant, total: None });
        let request = live.insert.with_stores(&[store.number()]);
        let mut at_instant = |instant: &InstantContext<'_>| match &plan.request.hooks.frozen {
            None => Ok(()),
            Some(command) => Hook {
                option: "--hook-frozen",
                command,
                origin: &plan.origin.path,
                below: instant.below.first().map(PathBuf::as_path),
                deadline: Some(Deadline { at: instant.deadline, option: "--freeze-budget" }),
                variables: &[],
            }
            .run(interrupt),
        };
        let inserted =
            Stack::insert(&self.dm, &mut self.job(), &request, &standby, &mut at_instant, interrupt);
        let stack = inserted?.remove(0);
        let times = stack.times();
        self.stack = Some(stack);
        drop(admission);
        observer.event(&Event::Instant {
            utc_ns: times.instant_utc_ns,
            frozen: times.frozen,
            suspended: times.suspended,
        });
        Ok(())
    }

    /// Admits this process alone: no other process may place a store until the stack is in place.
    fn admit(
        &mut self,
        live: &LivePlan,
        observer: &dyn Observer,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Admission> {
        let note = |text: &str| observer.event(&Event::Note { text: text.to_owned() });
        let admission = Admission::enter(&|| note(WAITING_FOR_OTHERS), interrupt)?;
        // Checked again, because things may have changed since the plan was made.
        self.question(live)?.check_place(&live.config.place)?;
        if live.memory_waits {
            note("memory may wait for the origin (swap space): no part of the store is in memory");
            self.memory = Some(
                memory::lock()
                    .map_err(|error| error.state("nothing was frozen, and the origin was not changed"))?,
            );
        }
        Ok(admission)
    }

    fn question(&self, live: &LivePlan) -> Result<Question> {
        Question::of(&self.dm, self.dm.info_of(live.config.origin_name.as_str())?.number)
    }

    /// Checks the created devices themselves: a path may have been redirected since the plan was made.
    fn check_circles(&self, plan: &CopyPlan, live: &LivePlan, store: &CowStore) -> Result<()> {
        self.question(live)?.check_copy(store, &plan.request)
    }

    /// The store.
    pub fn store(&self) -> &Arc<CowStore> {
        self.store.as_ref().expect("the store was made, or the copy had ended")
    }

    /// The stack.
    pub fn stack(&self) -> &Stack {
        self.stack.as_ref().expect("the stack is in place, or the copy had ended")
    }

    /// The path of the progress file.
    pub fn progress_path(&self) -> PathBuf {
        self.job().progress_path()
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

    /// Restores the origin: first its own table, then removes the devices below, the store and the job. With `keep`, a
    /// store that was created to be kept stays.
    ///
    /// # Errors
    /// The first failure; `recover` finds what is left.
    pub fn end(mut self, keep: bool) -> Result<Option<KeptStore>> {
        let kept = self.put_back(keep)?;
        self.into_job().finish()?;
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
        let ended: Result<()> = self.into_job().conclude(Err(give_up(error)));
        ended.expect_err("what began as an error stays one")
    }
}
