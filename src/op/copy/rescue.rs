//! Puts the origin back when the copier cannot. Putting back never waits for the secondary: a dead file server or a
//! suspended disk may answer tomorrow, or never.
//!
//! Where a copy fails, the origin gets its own table back first, before anything in flight is waited for
//! ([`Rescue::restore`]). And where a signal asks us to stop while the copier is inside a call of the kernel that does
//! not return, a thread that never touches the secondary does it after [`GRACE`].
//!
//! What is left then is devices that no write passes through any more: the copier removes them when it comes back, or
//! `recover` does once the process has ended.
//!
//! Invariants:
//! - the origin's table is put back at most once here, by one of the two;
//! - the gate is stopped before, and could not load over it anyway: the table is not the one that it expects;
//! - a copy whose origin was put back is never published: before that it asks for the table, and the signal stays.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::live::Live;
use crate::base::{Result, ResultExt as _};
use crate::dm::Dm;
use crate::job::Job;
use crate::stack::Stack;
use crate::stack::gate::Gate;
use crate::sys::process::join_worker;
use crate::sys::signal;

/// How long after a signal the copier may take to notice it.
const GRACE: Duration = Duration::from_secs(3);

/// Between two looks for a signal.
const POLL: Duration = Duration::from_millis(200);

#[derive(Default)]
struct State {
    /// The copier has come to its end.
    over: bool,
    restored: bool,
}

struct Shared {
    dm: Dm,
    stack: Stack,
    job: Arc<Mutex<Job>>,
    stop_gate: Box<dyn Fn() + Send + Sync>,
    state: Mutex<State>,
    wake: Condvar,
}

/// The thread that puts the origin back. Dropping this ends it.
pub(super) struct Rescue {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Rescue {
    /// Begins to look after the origin that `live` holds.
    ///
    /// # Errors
    /// Where no thread can be had, or device-mapper cannot be opened.
    pub(super) fn start(live: &Live, gate: &Gate) -> Result<Self> {
        let shared = Arc::new(Shared {
            dm: Dm::open()?,
            stack: live.stack().clone(),
            job: live.shared_job(),
            stop_gate: gate.stopper(),
            state: Mutex::default(),
            wake: Condvar::new(),
        });
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("origin-rescue".to_owned())
            .spawn(move || theirs.watch())
            .io_context(|| "starting the thread that restores the origin after an interrupt".to_owned())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Gives the origin its own table back. A failure is logged; putting back the rest tries again, and reports it.
    pub(super) fn restore(&self) {
        self.shared.restore();
    }
}

impl Drop for Rescue {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.wake.notify_all();
        join_worker(&mut self.thread, "the thread that restores the origin after an interrupt");
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is an assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True where it was done by this call.
    fn restore(&self) -> bool {
        (self.stop_gate)();
        let mut state = self.lock();
        if state.restored {
            return false;
        }
        // A panic leaves the record whole: it is replaced at once.
        let mut job = self.job.lock().unwrap_or_else(PoisonError::into_inner);
        match self.stack.restore(&self.dm, &mut job) {
            Ok(()) => state.restored = true,
            Err(error) => tracing::warn!("{error}"),
        }
        state.restored
    }

    fn watch(&self) {
        signal::block_in_this_thread();
        let mut signalled: Option<Instant> = None;
        loop {
            let state = self.wake.wait_timeout_while(self.lock(), POLL, |state| !state.over);
            let (over, restored) = {
                let (state, _) = state.unwrap_or_else(PoisonError::into_inner);
                (state.over, state.restored)
            };
            if over || restored {
                return;
            }
            let is_asked = signal::stop_requested() || signal::is_stop_pending();
            if !is_asked {
                signalled = None;
            }
            if !is_asked || signalled.get_or_insert_with(Instant::now).elapsed() < GRACE {
                continue;
            }
            if self.restore() {
                tracing::warn!(
                    "{} has its own table again. The secondary does not answer, and this process exits once \
                     the secondary answers; if it never does, kill this process, and run 'tidemark recover' \
                     after it has exited",
                    self.stack.origin()
                );
            }
            // Where that failed, it is tried again after as long.
            signalled = None;
        }
    }
}
