//! Signals as requests: to stop, and to show progress.

use std::thread;

use super::output::Output;
use super::progress;
use crate::base::{Error, ErrorKind, Result};
use crate::sys::signal::{self, SignalCounts};

/// From here on a signal is a request to stop, which the operation's `interrupt` notices. A message on
/// standard error answers each signal. SIGUSR1 shows progress.
///
/// # Errors
/// The kernel's refusal to catch signals or to start a thread.
pub fn stop_on_signals(output: Output) -> Result<()> {
    signal::catch_termination()?;
    let spawned = thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Err(error) = signal::unblock_progress_signal() {
            tracing::debug!("SIGUSR1 is not answered: {error}");
        }
        let mut seen = SignalCounts::default();
        while let Some(arrived) = signal::wait(seen) {
            if arrived.progress_requests != seen.progress_requests {
                progress::answer(output);
            }
            if arrived.stops != seen.stops {
                output.note(if seen.stops == 0 {
                    "stopping: putting things back"
                } else {
                    "still putting things back, please wait"
                });
            }
            seen = arrived;
        }
    });
    spawned.map(|_| ()).map_err(|source| Error::io("starting the thread that waits for signals", source))
}

/// What operations ask between their steps.
///
/// # Errors
/// [`ErrorKind::Interrupted`] once a signal asked us to stop.
pub fn interrupt() -> Result<()> {
    if signal::stop_requested() {
        return Err(Error::new(ErrorKind::Interrupted, "interrupted by a signal"));
    }
    Ok(())
}
