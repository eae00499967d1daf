//! The gate: changes the origin's table during a copy, for releases and for holds.
//!
//! One thread does both, so that a release never ends a hold by accident, and the copier never waits for the
//! kernel:
//!
//! - **Releases**: one swap of the table makes all regions that the copier has finished since the last
//!   release bypass the snapshot. A swap waits for I/O in flight, at most for the freeze budget. After each
//!   attempt the thread rests for a multiple of its duration, so that the origin is held for a small share of
//!   the time only. Regions that are finished meanwhile go into the next release. A region whose release
//!   failed stays preserved, and is retried with the next release.
//! - **Holds** (`--on-full hold`): while the store is about to fill and cannot grow, the origin is suspended,
//!   some seconds at a time, so that the copier catches up and releases what is about to be written. The
//!   watchdog guards each slice of a hold. A budget bounds all holds together. When it is spent, the origin
//!   stays resumed, and the snapshot is lost when the store is full: a write of an application never fails.
//!
//! Crash argument: a release is one call of the kernel on a device in use ([`Owner`](super::Owner)), so the
//! origin has one of the two tables, whole, and stays resumed. The watchdog ends the suspension of a hold.
//! `recover` recognizes either table as ours, and drops one that is loaded but not active.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::base::clock::{self, Stopwatch};
use crate::base::{Bytes, Error, ErrorKind, Result, ResultExt as _};
use crate::dm::Dm;
use crate::extent::{Extent, ExtentSet};
use crate::stack::watchdog::{Order, Verdict, Watchdog};
use crate::stack::{Hold, Stack};
use crate::sys::nudge::Nudge;
use crate::sys::process::join_worker;

/// A release that holds the origin for longer makes later regions larger.
pub const RELEASE_STALL_MAX: Duration = Duration::from_millis(50);

/// After a release the gate rests for this multiple of its duration, so that the origin is held for at most
/// 1/21 of the time. Until the next release, finished regions stay preserved.
const REST_FACTOR: u32 = 20;

/// Shortest rest after a release or a hold that failed.
const FAILURE_REST_MIN: Duration = Duration::from_secs(2);

/// Interval at which the store is checked while a hold may become necessary.
const HOLD_POLL: Duration = Duration::from_millis(20);

/// Pause after a hold: the store is then as full as before, and the held writes arrive at once.
const HOLD_PAUSE: Duration = Duration::from_millis(1);

/// Length of a slice. After each, the watchdog is armed again or the origin is resumed.
pub const HOLD_SLICE: Duration = Duration::from_millis(500);

/// Longest hold before the origin is briefly resumed, even if the store is still about to fill.
const HOLD_STRETCH_MAX: Duration = Duration::from_secs(5);

/// What the watchdog allows beyond a slice, and how long a hold waits for I/O in flight while new writes are
/// held already.
const HOLD_GRACE: Duration = Duration::from_secs(2);

/// What the gate has done. Durations in seconds in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GateReport {
    /// Table swaps that released something.
    pub releases: u64,
    /// Bytes of the origin that have been released.
    pub released_bytes: Bytes,
    /// The longest time that a release, or an attempt at one, held the origin.
    #[serde(rename = "longest_stall_seconds", serialize_with = "clock::seconds")]
    pub longest_stall: Duration,
    /// The same, summed over all releases and attempts.
    #[serde(rename = "stalled_seconds", serialize_with = "clock::seconds")]
    pub stalled: Duration,
    /// How often the origin was suspended because the store was about to fill.
    pub holds: u64,
    /// Their total duration.
    #[serde(rename = "held_seconds", serialize_with = "clock::seconds")]
    pub held: Duration,
}

/// What a gate reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateEvent {
    /// A release was made. It held the origin for this long.
    Released(GateReport, Duration),
    /// The origin is held, for the first time.
    Holding,
    /// The budget for holds is spent.
    HoldSpent,
}

/// When to hold the origin.
pub struct HoldPolicy {
    /// True while the store is about to fill and cannot grow.
    pub is_short: Box<dyn Fn() -> bool + Send>,
    /// Bound on all holds together.
    pub budget: Duration,
}

#[derive(Default)]
struct State {
    /// Finished by the copier, not yet released by the kernel.
    pending: Vec<Extent>,
    stop: bool,
    /// Why the copy is void.
    lost: Option<(ErrorKind, String)>,
    slow: bool,
    report: GateReport,
}

impl State {
    fn note_stall(&mut self, stall: Duration) {
        self.slow |= stall > RELEASE_STALL_MAX;
        self.report.longest_stall = self.report.longest_stall.max(stall);
        self.report.stalled += stall;
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change leaves the state consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the stop request, for `time`, or, with `or_pending`, for a region to release.
    fn wait(&self, time: Option<Duration>, or_pending: bool) -> MutexGuard<'_, State> {
        let idle = |state: &mut State| !state.stop && (!or_pending || state.pending.is_empty());
        match time {
            None => self.wake.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner),
            Some(time) => {
                let waited = self.wake.wait_timeout_while(self.lock(), time, idle);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }
}

/// A running gate. Dropping it stops and joins its thread, and resumes the origin.
pub struct Gate {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Gate {
    /// Starts the gate over the origin of `stack`, of which `released` has been released already.
    ///
    /// # Errors
    /// If the thread cannot be started or device-mapper cannot be opened.
    pub fn start(
        stack: &Stack,
        released: Vec<Extent>,
        hold: Option<HoldPolicy>,
        events: impl Fn(GateEvent) + Send + 'static,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (dm, stack, thread_shared) = (Dm::open()?, stack.clone(), Arc::clone(&shared));
        let (ready, started) = mpsc::sync_channel(1);
        let starting = || "starting the thread that releases the origin".to_owned();
        let thread = thread::Builder::new()
            .name("origin-gate".to_owned())
            .spawn(move || {
                // A nudge signals the thread that created it.
                let nudge = match Nudge::new() {
                    Ok(nudge) => nudge,
                    Err(error) => return drop(ready.send(Err(error))),
                };
                let _ = ready.send(Ok(()));
                let released = released.into_iter().collect();
                let events = Box::new(events);
                run(
                    GateThread { dm, stack, nudge, released, hold, events, spent_reported: false },
                    &thread_shared,
                );
            })
            .io_context(starting)?;
        started.recv().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())).io_context(starting)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Queues a region for release.
    pub fn release(&self, region: Extent) {
        self.shared.lock().pending.push(region);
        self.shared.wake.notify_all();
    }

    /// Fails once another tool has replaced the origin's table.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`], [`ErrorKind::Kernel`].
    pub fn check(&self) -> Result<()> {
        match &self.shared.lock().lost {
            None => Ok(()),
            Some((kind, what)) => Err(Error::new(*kind, what.clone())
                .state("the origin stays in use; this copy is lost")
                .next("copy again, and do not resize or move the volume meanwhile")),
        }
    }

    /// True if a release since the last call took longer than [`RELEASE_STALL_MAX`].
    #[must_use]
    pub fn take_slow(&self) -> bool {
        std::mem::take(&mut self.shared.lock().slow)
    }

    /// What has been done so far.
    #[must_use]
    pub fn report(&self) -> GateReport {
        self.shared.lock().report
    }

    /// Returns a function that stops the gate from another thread, without waiting. Nothing is released after
    /// that.
    pub fn stopper(&self) -> Box<dyn Fn() + Send + Sync> {
        let shared = Arc::clone(&self.shared);
        Box::new(move || {
            shared.lock().stop = true;
            shared.wake.notify_all();
        })
    }

    /// Stops the gate and returns its report. Pending regions are not released, since the stack is about to
    /// be removed.
    pub fn stop(mut self) -> GateReport {
        self.join();
        self.report()
    }

    fn join(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        join_worker(&mut self.thread, "the thread that releases the origin");
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.join();
    }
}

fn rest_after_failure(took: Duration) -> Duration {
    took.saturating_mul(REST_FACTOR).max(FAILURE_REST_MIN)
}

fn run(mut gate: GateThread, shared: &Shared) {
    // A panic must not leave the origin suspended (the watchdog sees to that), and must not pass for success.
    if catch_unwind(AssertUnwindSafe(|| gate.run(shared))).is_err() {
        shared.lock().lost =
            Some((ErrorKind::Kernel, "the thread that releases the origin failed".to_owned()));
    }
}

/// The state of the gate's thread.
struct GateThread {
    dm: Dm,
    stack: Stack,
    /// Bounds the kernel's wait for I/O in flight.
    nudge: Nudge,
    released: ExtentSet,
    hold: Option<HoldPolicy>,
    events: Box<dyn Fn(GateEvent) + Send>,
    spent_reported: bool,
}

impl GateThread {
    fn run(&mut self, shared: &Shared) {
        // A region was finished that the kernel has not released yet.
        let mut due = !self.released.is_empty();
        let mut rest_until = Instant::now();
        let mut hold_rest_until = rest_until;
        let mut has_held = false;
        loop {
            let rest = rest_until.saturating_duration_since(Instant::now());
            let resting = rest > Duration::ZERO;
            let time = match &self.hold {
                Some(_) if std::mem::take(&mut has_held) => Some(HOLD_PAUSE),
                Some(_) => Some(HOLD_POLL),
                None if resting || due => Some(rest),
                None => None,
            };
            let mut state = shared.wait(time, !resting);
            if state.stop {
                return;
            }
            due |= !state.pending.is_empty();
            self.released.extend(state.pending.drain(..));
            let held = state.report.held;
            drop(state);
            let watch = Stopwatch::start();
            let outcome = if Instant::now() >= hold_rest_until && self.must_hold(held) {
                let outcome = self.hold(shared);
                has_held = outcome.is_ok();
                if !has_held {
                    // This rest does not grow with the attempt: the budget for holds bounds what all attempts
                    // cost, and ranges released meanwhile do not fill the store.
                    hold_rest_until = Instant::now() + FAILURE_REST_MIN;
                }
                outcome
            } else if due && Instant::now() >= rest_until {
                self.release(shared)
            } else {
                continue;
            };
            match outcome {
                Ok(stall) => {
                    due = false;
                    rest_until = Instant::now() + stall.saturating_mul(REST_FACTOR);
                }
                Err(error) if error.kind() == ErrorKind::StoreInvalid => {
                    shared.lock().lost = Some((error.kind(), error.to_string()));
                    return;
                }
                // The region stays preserved and goes into the next release.
                Err(error) => {
                    tracing::debug!("releasing a region: {error}");
                    rest_until = Instant::now() + rest_after_failure(watch.elapsed());
                }
            }
        }
    }

    /// Releases everything that is due, by one swap.
    fn release(&self, shared: &Shared) -> Result<Duration> {
        let released: Vec<Extent> = self.released.iter().collect();
        let watch = Stopwatch::start();
        let released = self.stack.release(&self.dm, &released, None, &self.nudge);
        if matches!(&released, Err(error) if error.kind() == ErrorKind::Interrupted) {
            shared.lock().note_stall(watch.elapsed());
        }
        let stall = released?;
        if stall > Duration::ZERO {
            let report = self.note(shared, stall);
            (self.events)(GateEvent::Released(report, stall));
        }
        Ok(stall)
    }

    fn note(&self, shared: &Shared, stall: Duration) -> GateReport {
        let mut state = shared.lock();
        state.note_stall(stall);
        state.report.releases += 1;
        state.report.released_bytes = self.released.iter().map(|extent| extent.length()).sum();
        state.report
    }

    fn must_hold(&mut self, held: Duration) -> bool {
        let Some(hold) = &self.hold else { return false };
        if !(hold.is_short)() {
            return false;
        }
        if held < hold.budget {
            return true;
        }
        if !self.spent_reported {
            self.spent_reported = true;
            (self.events)(GateEvent::HoldSpent);
        }
        false
    }

    /// The copy's watchdog, ready to be armed for a slice.
    fn watchdog(&self) -> Result<Watchdog> {
        let order = Order {
            devices: vec![self.stack.origin_number()],
            filesystems: Vec::new(),
            budget_ms: u64::try_from((HOLD_SLICE + HOLD_GRACE).as_millis()).unwrap_or(u64::MAX),
            is_expedited: false,
        };
        self.stack.standby().guard(&order)
    }

    /// Keeps the origin suspended slice by slice, and arms the watchdog again for each, until the store is no
    /// longer short, everything is released, the hold has reached its maximum, or `left` has passed. Each
    /// resume lets waiting writes consume more of the store, so the origin is not resumed between slices.
    /// Returns the watchdog, armed for what is left to do; None if it has resumed the origin or has died.
    fn hold_slices(&mut self, shared: &Shared, mut watchdog: Watchdog, left: Duration) -> Option<Watchdog> {
        let end = Instant::now() + left.min(HOLD_STRETCH_MAX);
        loop {
            let slice = HOLD_SLICE.min(end.saturating_duration_since(Instant::now()));
            let mut state = shared.wait(Some(slice), false);
            self.released.extend(state.pending.drain(..));
            let over = state.stop || Instant::now() >= end;
            drop(state);
            let caught_up = self.released.total() >= self.stack.size();
            let stands = watchdog.check().is_ok();
            let done = over || caught_up || !self.hold.as_ref().is_some_and(|hold| (hold.is_short)());
            if stands && done {
                return Some(watchdog);
            }
            if !stands || watchdog.arm().is_err() {
                // If the watchdog resumed the origin, it is not suspended again. If the watchdog died before
                // it could, the caller resumes the origin at once, without starting another process while
                // writers wait.
                let _ = self.stack.standby().dismiss(watchdog);
                return None;
            }
        }
    }

    fn warn_hold_ended_early(&self) {
        let origin = self.stack.origin();
        tracing::warn!(
            "writers of {origin} were not held for as long as intended: the watchdog resumed {origin}, or died"
        );
    }

    /// Suspends the origin for one hold. The resume releases what is due by then. Returns a stall of zero, as
    /// no rest follows a hold.
    fn hold(&mut self, shared: &Shared) -> Result<Duration> {
        let report = shared.lock().report;
        let budget = self.hold.as_ref().map_or(Duration::ZERO, |hold| hold.budget);
        let left = budget.saturating_sub(report.held);
        let mut watchdog = self.watchdog()?;
        watchdog.arm()?;
        let begin = Instant::now();
        // Dropped only when the watchdog is disarmed: an armed watchdog would drop a table that lvm2 has
        // loaded.
        let hold = match self.stack.hold(&self.dm, &self.nudge, HOLD_GRACE.min(left)) {
            Ok(hold) => hold,
            Err(error) => {
                // Writers waited until the wait for I/O in flight was cut short.
                shared.lock().report.held += begin.elapsed();
                if self.stack.is_held() {
                    // Dropped without the protocol's farewell, so that the watchdog takes this process for dead and
                    // resumes the origin.
                    drop(watchdog);
                } else {
                    let _ = self.stack.standby().dismiss(watchdog);
                }
                return Err(error);
            }
        };
        if report.holds == 0 {
            (self.events)(GateEvent::Holding);
        }
        let watchdog = self.hold_slices(shared, watchdog, left.saturating_sub(begin.elapsed()));
        let resumed = self.resume(&hold, watchdog.is_some());
        match (watchdog, self.stack.is_held()) {
            (watchdog, true) => drop(watchdog),
            // Logged only now, as the reader of the log may be slow.
            (None, false) => self.warn_hold_ended_early(),
            (Some(watchdog), false) => {
                if let Verdict::Fired(_) = self.stack.standby().dismiss(watchdog) {
                    self.warn_hold_ended_early();
                }
            }
        }
        let mut state = shared.lock();
        state.report.holds += 1;
        state.report.held += begin.elapsed();
        state.report.released_bytes = self.released.iter().map(|extent| extent.length()).sum();
        resumed.map(|_| Duration::ZERO)
    }

    /// Resumes the origin, with the release of what is due if possible.
    fn resume(&self, hold: &Hold, is_guarded: bool) -> Result<Duration> {
        if !is_guarded {
            // The watchdog has resumed the origin, or has died.
            self.stack.resume_if_suspended(&self.dm)?;
        }
        let released: Vec<Extent> = self.released.iter().collect();
        let swapped = self.stack.release(&self.dm, &released, Some(hold), &self.nudge);
        // A successful swap has resumed the origin. After a failed one this does.
        self.stack.resume_if_suspended(&self.dm).and(swapped)
    }
}
