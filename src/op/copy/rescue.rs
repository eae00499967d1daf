//! Restores the origin if the copier cannot. The restore never waits for the secondary: a dead file server or a
//! suspended disk may never answer.
//!
//! If a copy fails, the origin's own table is restored first, before requests in flight are waited for
//! ([`Rescue::restore`]). If a signal requests a stop while the copier is blocked in a system call, a thread that never
//! accesses the secondary restores the table after [`GRACE`].
//!
//! Only devices that no write passes through are left then. The copier removes them once its system call returns, or
//! `recover` does after the process has ended.
//!
//! Invariants:
//! - this module restores the origin's table at most once, in the copier's thread or in its own;
//! - the gate is stopped before. Even a running gate could not replace the restored table, because it only replaces the
//!   table that it expects;
//! - a copy whose origin was restored is never published: the copy checks the table before, and the stop request of the
//!   signal persists.

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

/// How long the copier may take to notice a signal.
const GRACE: Duration = Duration::from_secs(3);

/// Time between two checks for a signal.
const POLL: Duration = Duration::from_millis(200);

#[derive(Default)]
struct State {
    /// The copier has ended.
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

/// The thread that restores the origin. Dropping this ends the thread.
pub(super) struct Rescue {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Rescue {
    /// Starts the thread for the origin that `live` holds.
    ///
    /// # Errors
    /// If no thread can be started, or device-mapper cannot be opened.
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

    /// Restores the origin's own table. A failure is logged; the removal of the stack retries it and reports the error.
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
        // Every change is a single assignment, so the state is consistent even after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if this call has restored the table.
    fn restore(&self) -> bool {
        (self.stop_gate)();
        let mut state = self.lock();
        if state.restored {
            return false;
        }
        // A panic leaves the job consistent: its record is replaced atomically.
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
            // After a failure, it is tried again after the same time.
            signalled = None;
        }
    }
}
