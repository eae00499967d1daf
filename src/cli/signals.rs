//! Signals as requests: to stop, or to show progress.

use std::thread;

use super::output::Output;
use super::progress;
use crate::base::{Error, ErrorKind, Result};
use crate::sys::signal::{self, SignalCounts};

/// From here on a signal is a request to stop, which the operation's `interrupt` detects. Each signal is
/// acknowledged on standard error. SIGUSR1 shows progress.
///
/// # Errors
/// The kernel's, if it refuses to catch signals or to start a thread.
pub fn stop_on_signals(output: Output) -> Result<()> {
    signal::catch_termination()?;
    let spawned = thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Err(error) = signal::unblock_progress_signal() {
            tracing::debug!("SIGUSR1 will not print the progress: {error}");
        }
        let mut seen = SignalCounts::default();
        while let Some(arrived) = signal::wait(seen) {
            if arrived.progress_requests != seen.progress_requests {
                progress::show_progress(output);
            }
            if arrived.stops != seen.stops {
                output.note(if seen.stops == 0 {
                    "stopping: undoing changes"
                } else {
                    "still undoing changes, please wait"
                });
            }
            seen = arrived;
        }
    });
    spawned.map(|_| ()).map_err(|source| Error::io("starting the thread that waits for signals", source))
}

/// Checked by operations between their steps.
///
/// # Errors
/// [`ErrorKind::Interrupted`] once a signal has requested a stop.
pub fn interrupt() -> Result<()> {
    if signal::stop_requested() {
        return Err(Error::new(ErrorKind::Interrupted, "interrupted by a signal"));
    }
    Ok(())
}
