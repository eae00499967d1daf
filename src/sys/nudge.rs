//! Interrupts a system call that waits too long: from a given moment on, the waiting thread gets a signal
//! again and again, until its work is done.
//!
//! A call that sleeps interruptibly then returns EINTR (a suspension of device-mapper that waits for I/O in
//! flight does so); another call is not affected. The signal is SIGURG, which ends no process; its handler
//! does nothing. Everything is prepared in advance: [`Nudge::within`] allocates nothing.

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Pause between two signals, as the first may arrive before the call has begun to wait.
const PAUSE: Duration = Duration::from_millis(5);

/// Small, as the thread calls next to nothing, and locked memory is allocated at once.
const STACK_BYTES: usize = 128 << 10;

thread_local! {
    /// When the work of this thread has to end.
    static END: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// True if the work of the calling thread is past its end: an interrupted call must not be repeated.
#[must_use]
pub fn is_overdue() -> bool {
    END.get().is_some_and(|end| Instant::now() >= end)
}

extern "C" fn on_nudge(_signal: libc::c_int) {}

#[derive(Debug, Default)]
struct State {
    end: Option<Instant>,
    done: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment, so the state is never half-written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, thread: Pthread) {
        let mut state = self.lock();
        while !state.done {
            state = match state.end.map(|end| end.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => {
                    // Under the lock: once `within` has cleared the end, no signal follows.
                    let _ = pthread_kill(thread, Signal::SIGURG);
                    self.wait(state, PAUSE)
                }
                Some(left) => self.wait(state, left),
            };
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).map_or_else(|error| error.into_inner().0, |(state, _)| state)
    }
}

/// Interrupts the thread that created it; cannot be moved to another.
#[derive(Debug)]
pub struct Nudge {
    shared: Arc<Shared>,
    watcher: Option<JoinHandle<()>>,
    /// !Send, so the thread that is interrupted lives as long as this value.
    _thread: PhantomData<*const ()>,
}

impl Nudge {
    /// For the calling thread.
    ///
    /// # Errors
    /// The kernel's, if it refuses the thread or the handler.
    pub fn new() -> io::Result<Self> {
        let action = SigAction::new(SigHandler::Handler(on_nudge), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler is an extern "C" function that does nothing.
        unsafe { sigaction(Signal::SIGURG, &action) }?;
        let shared = Arc::new(Shared::default());
        let (watcher_shared, thread) = (Arc::clone(&shared), pthread_self());
        let watcher = thread::Builder::new()
            .name("nudge".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || watcher_shared.watch(thread))?;
        Ok(Self { shared, watcher: Some(watcher), _thread: PhantomData })
    }

    /// Runs `work`. A wait in it that goes past `end` is interrupted, if it can be.
    pub fn within<T>(&self, end: Instant, work: impl FnOnce() -> T) -> T {
        self.set(Some(end));
        let result = work();
        self.set(None);
        result
    }

    fn set(&self, end: Option<Instant>) {
        END.set(end);
        self.shared.lock().end = end;
        self.shared.changed.notify_all();
    }
}

impl Drop for Nudge {
    fn drop(&mut self) {
        self.shared.lock().done = true;
        self.shared.changed.notify_all();
        if let Some(watcher) = self.watcher.take() {
            // The thread does nothing that could panic.
            let _ = watcher.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_wait_is_interrupted_at_its_end_and_a_short_one_is_not() {
        let nudge = Nudge::new().unwrap();
        let start = Instant::now();
        let waited = nudge.within(start + Duration::from_millis(50), || {
            let waited = nix::poll::poll(&mut [], nix::poll::PollTimeout::from(20_000u16));
            (waited, is_overdue(), thread::spawn(is_overdue).join().unwrap())
        });
        assert_eq!(waited, (Err(nix::errno::Errno::EINTR), true, false));
        assert!(!is_overdue());
        assert!(start.elapsed() >= Duration::from_millis(50) && start.elapsed() < Duration::from_secs(15));
        let calm = nudge.within(Instant::now() + Duration::from_secs(60), || {
            nix::poll::poll(&mut [], nix::poll::PollTimeout::from(30u16))
        });
        assert_eq!(calm, Ok(0));
    }
}
