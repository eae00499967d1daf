//! Several origins, copied from one instant, each to its own secondary.
//!
//! Order:
//! 1. one job for all origins, with the lock of each; it waits for its turn at their rotating disks;
//! 2. the secondary of each origin is opened, and its engine;
//! 3. --hook-before, once;
//! 4. the stores, then all stacks with one instant ([`live::hold`]): all origins are held, or none;
//! 5. --hook-after, once, while the copies begin;
//! 6. each origin is copied in a thread of its own, as a copy of it alone would be; those on one rotating disk take
//!    turns ([`Turns`]);
//! 7. the job ends.
//!
//! A failure up to 4 ends the whole: nothing is copied. After that each origin has its own fate: if its store is lost
//! or its secondary is full, it alone is given up, and the others are finished, because their instant is as good as
//! before. A signal gives up all that have not ended. After a crash at any point, `recover` finds everything by the
//! job: the stacks and stores by their UUIDs, the partial files by its record.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::group_plan::GroupCopyPlan;
use super::live::{self, Live};
use super::plan::CopyPlan;
use super::report::{CopyOutcome, GroupOutcome, OriginOutcome};
use super::run::{begin_copy, copy_live};
use super::session::{Session, Shared};
use super::turns::{Turns, enter_queue};
use crate::base::clock::Stopwatch;
use crate::base::{Error, ErrorKind, Result};
use crate::dm::Dm;
use crate::job::disk_queue::Place;
use crate::job::{self, Job};
use crate::progress::{Event, Observer, OfOrigin, Phase};
use crate::stack::HoldTimes;
use crate::stack::hooks::AroundInstant;
use crate::sys::process::crash_point;
use crate::sys::signal;

/// `interrupt`, polled by the threads of all origins.
pub type Interrupt = dyn Fn() -> Result<()> + Sync;

/// Executes `plan`. The outcome has the failures of single origins.
///
/// # Errors
/// The first failure up to the instant: nothing is copied then. A failure to end the job.
pub fn run(plan: &GroupCopyPlan, observer: &dyn Observer, interrupt: &Interrupt) -> Result<GroupOutcome> {
    let clock = Stopwatch::start();
    observer.event(&Event::Phase { phase: Phase::Prepare, total: None });
    let warnings = plan.copies.iter().flat_map(|copy| &copy.target.warnings);
    for text in plan.not_frozen.iter().chain(warnings) {
        observer.event(&Event::Warning { text: text.clone() });
    }
    let job = Job::begin_for_origins("copy", &plan.numbers())
        .map_err(|error| error.state("nothing was frozen, and no origin was changed"))?;
    let place = enter_queue(&plan.copies, Some(job.id()), observer, &|| interrupt());
    let place = match place {
        Ok(place) => place,
        Err(error) => return job.conclude(Err(error.state("nothing was frozen, and no origin was changed"))),
    };
    let job = Arc::new(Mutex::new(job));
    let origins = plan.origins();
    let first = &plan.copies[0];
    let hooks = AroundInstant {
        variables: &[("TIDEMARK_ORIGINS", &origins)],
        ..first.request.hooks.around(&first.origin.path)
    };
    let group = Group { plan, observer, interrupt, job: &job, hooks: &hooks };
    let copied = group.copy(place);
    end(job, &copied)?;
    // What was begun is ended: if the copies began, this was done already.
    run_after(&hooks, observer, interrupt);
    let outcome = copied.map(|(times, origins)| GroupOutcome {
        instant: times.into(),
        origins,
        total_seconds: clock.elapsed().as_secs_f64(),
    });
    outcome.map_err(job::with_advice)
}

/// Runs --hook-after if it is due.
fn run_after(hooks: &AroundInstant<'_>, observer: &dyn Observer, interrupt: &Interrupt) {
    if let Err(error) = hooks.after(&|| interrupt()) {
        observer.event(&Event::Warning { text: error.to_string() });
    }
}

/// Ends the job, unless something could not be undone: then only its record names it, for `recover`.
fn end(job: Arc<Mutex<Job>>, copied: &Result<(HoldTimes, Vec<OriginOutcome>)>) -> Result<()> {
    let is_undone = |error: &Error| error.failed_undos().is_empty();
    let is_all_undone = match copied {
        Ok((_, origins)) => origins.iter().all(OriginOutcome::is_put_back),
        Err(error) => is_undone(error),
    };
    let job = Arc::try_unwrap(job).expect("the threads that share the job have ended");
    if !is_all_undone {
        return Ok(());
    }
    let job = job.into_inner().unwrap_or_else(PoisonError::into_inner);
    match (job.finish(), copied) {
        (Err(error), Ok(_)) => Err(error.context("the copies have ended").next("run 'tidemark recover'")),
        _ => Ok(()),
    }
}

/// A copy of several origins in progress.
struct Group<'a> {
    plan: &'a GroupCopyPlan,
    observer: &'a dyn Observer,
    interrupt: &'a Interrupt,
    job: &'a Arc<Mutex<Job>>,
    hooks: &'a AroundInstant<'a>,
}

/// The thread of one origin, as seen by the one that takes the instant.
struct Copier<'scope> {
    /// Disconnected without a message if the secondary cannot be opened.
    is_open: Receiver<()>,
    /// Passes the origin on once it is held. Dropped: there is no instant.
    held: Sender<Live>,
    thread: thread::ScopedJoinHandle<'scope, Result<CopyOutcome>>,
}

impl Group<'_> {
    fn copy(&self, place: Option<Place>) -> Result<(HoldTimes, Vec<OriginOutcome>)> {
        let turns = Turns::of(&self.plan.copies, place);
        let await_turn = |index: usize, observer: &dyn Observer, stop: &dyn Fn() -> Result<()>| {
            turns.wait(index, observer, stop)
        };
        let (plan, observer, interrupt) = (self.plan, self.observer, self.interrupt);
        let opening = Mutex::new(());
        let (turns, await_turn, opening) = (&turns, &await_turn, &opening);
        thread::scope(|scope| {
            let mut copiers = Vec::new();
            for (index, copy) in plan.copies.iter().enumerate() {
                let (tell, is_open) = mpsc::channel();
                let (held, take) = mpsc::channel();
                let (job, count) = (Arc::clone(self.job), plan.copies.len());
                let shared = Shared { job, count, index, opening, await_turn };
                let thread = scope.spawn(move || {
                    let _turn = turns.until_dropped(index);
                    copy_one(copy, shared, (tell, take), observer, interrupt)
                });
                copiers.push(Copier { is_open, held, thread });
            }
            let held = self.hold(&copiers);
            self.join(copiers, held)
        })
    }

    /// Steps 3 and 4 at the head of this module, once all secondaries are open.
    fn hold(&self, copiers: &[Copier<'_>]) -> Result<(HoldTimes, Vec<Live>)> {
        if copiers.iter().any(|copier| copier.is_open.recv().is_err()) {
            // The thread has the reason.
            return Err(not_all());
        }
        let interrupt = || (self.interrupt)();
        self.hooks
            .before(&interrupt)
            .map_err(|error| error.state("nothing was frozen, and no origin was changed"))?;
        let plans: Vec<&CopyPlan> = self.plan.copies.iter().collect();
        let mut lives = Vec::new();
        for plan in &plans {
            lives.push(Live::one_of_several(Dm::open()?, plan, Arc::clone(self.job)));
        }
        let held = live::hold(&plans, &mut lives, &self.plan.insert, self.hooks, self.observer, &interrupt);
        match held {
            Ok(times) => Ok((times, lives)),
            Err(error) => Err(put_back(lives, error)),
        }
    }

    /// Steps 5 and 6: passes the origins on, and waits for the copies. Without an instant, the reason is returned.
    fn join(
        &self,
        copiers: Vec<Copier<'_>>,
        held: Result<(HoldTimes, Vec<Live>)>,
    ) -> Result<(HoldTimes, Vec<OriginOutcome>)> {
        let mut threads = Vec::new();
        let times = match held {
            Ok((times, lives)) => {
                crash_point("copy.group.held");
                for (copier, live) in copiers.into_iter().zip(lives) {
                    if let Err(mpsc::SendError(live)) = copier.held.send(live) {
                        // Its thread has panicked.
                        tracing::error!("{}", put_back(vec![live], not_all()));
                    }
                    threads.push(copier.thread);
                }
                run_after(self.hooks, self.observer, self.interrupt);
                Ok(times)
            }
            Err(error) => {
                threads.extend(copiers.into_iter().map(|copier| copier.thread));
                Err(error)
            }
        };
        // All are waited for before a panic of one goes on.
        let ended: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        let ended: Vec<Result<CopyOutcome>> = ended
            .into_iter()
            .map(|ended| ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        match times {
            Ok(times) => {
                let outcome = |(plan, copied)| OriginOutcome::of(plan, copied);
                Ok((times, self.plan.copies.iter().zip(ended).map(outcome).collect()))
            }
            Err(error) => Err(first_reason(error, ended)),
        }
    }
}

/// Restores the origins after `error`.
fn put_back(lives: Vec<Live>, error: Error) -> Error {
    lives.into_iter().fold(error, |error, live| live.put_back_after(error, |error| error))
}

/// What ends the copy of one origin if there is no instant. It is never shown alone.
fn not_all() -> Error {
    Error::new(ErrorKind::External, "the instant was not taken")
}

/// The reason why there is no instant: `error`, or that of the first thread which could not open its secondary.
fn first_reason(error: Error, ended: Vec<Result<CopyOutcome>>) -> Error {
    let is_empty = |error: &Error| error.what() == not_all().what();
    let (mut first, mut undos) = (error, Vec::new());
    for failed in ended.into_iter().filter_map(Result::err) {
        if is_empty(&first) && !is_empty(&failed) {
            first = failed;
        } else if !failed.failed_undos().is_empty() {
            undos.push(failed);
        }
    }
    undos.into_iter().fold(first, Error::with_failed_undo)
}

/// Copies one origin, from the opening of its secondary to its end.
fn copy_one(
    plan: &CopyPlan,
    shared: Shared<'_>,
    (tell, held): (Sender<()>, Receiver<Live>),
    observer: &dyn Observer,
    interrupt: &Interrupt,
) -> Result<CopyOutcome> {
    signal::block_in_this_thread();
    let origin = plan.origin.path.display().to_string();
    let observer = OfOrigin { origin: &origin, inner: observer };
    let interrupt = || interrupt();
    let hold = || {
        // The other side waits for this.
        let _ = tell.send(());
        held.recv().map_err(|_| not_all())
    };
    Session::carry_out_one_of_several(plan, shared, &observer, &interrupt, hold, |session| {
        let log = begin_copy(session)?;
        crash_point("copy.data.before");
        copy_live(session, log, None)
    })
}
