//! `tidemark status --watch`: prints the status again and again.
//!
//! On a terminal each status replaces the last one, as with watch(1). Elsewhere they follow each other,
//! separated by an empty line, or as JSON lines. A signal is the normal end of a watch, so it is no error.

use std::io::{self, IsTerminal as _};
use std::thread;
use std::time::{Duration, Instant};

use super::output::Output;
use super::reports::Human as _;
use super::resolve::WatchSettings;
use crate::base::{Result, clock};
use crate::op::status::status;
use crate::sys::signal;

/// Longest time between two checks for a signal.
const SIGNAL_POLL: Duration = Duration::from_millis(50);

/// Moves to the upper left corner. The old text is overwritten instead of being erased first, which would
/// flicker.
const HOME: &str = "\x1b[H";

/// Erases the rest of the line.
const WIPE_LINE: &str = "\x1b[K";

/// Erases everything below.
const WIPE_BELOW: &str = "\x1b[J";

/// Erases everything.
const WIPE_ALL: &str = "\x1b[2J";

/// Prints the status until a signal arrives or the count is reached.
///
/// # Errors
/// The error of a status; the failed write.
pub fn watch(settings: WatchSettings, output: Output) -> Result<()> {
    signal::catch_termination()?;
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    let is_redrawn = !output.json && io::stdout().is_terminal() && !dumb;
    let mut seen = 0u64;
    loop {
        let begin = Instant::now();
        let status = status()?;
        if is_redrawn {
            let now = clock::utc_text(clock::utc_now_ns()).unwrap_or_default();
            let text = format!("every {:?}  {now}\n\n{}", settings.interval, status.human());
            output.result_text(&screen(&text, seen == 0))?;
        } else {
            if seen > 0 && !output.json {
                output.result_text("\n")?;
            }
            output.print_result("status", &status)?;
        }
        seen += 1;
        if settings.count.is_some_and(|count| seen >= count) || !pause(begin, settings.interval) {
            return Ok(());
        }
    }
}

/// Waits until `interval` after `begin`; false once a signal has arrived.
fn pause(begin: Instant, interval: Duration) -> bool {
    loop {
        if signal::stop_requested() {
            return false;
        }
        let left = interval.saturating_sub(begin.elapsed());
        if left == Duration::ZERO {
            return true;
        }
        thread::sleep(left.min(SIGNAL_POLL));
    }
}

/// `text`, replacing whatever the terminal shows.
fn screen(text: &str, is_first: bool) -> String {
    let begin = if is_first { WIPE_ALL } else { "" };
    format!("{begin}{HOME}{}{WIPE_BELOW}", text.replace('\n', &format!("{WIPE_LINE}\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_previous_output_is_erased_from_the_screen() {
        assert_eq!(screen("a\nb\n", true), "\x1b[2J\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        assert_eq!(screen("a\n", false), "\x1b[Ha\x1b[K\n\x1b[J");
    }

    #[test]
    fn a_pause_ends_in_time() {
        let begin = Instant::now();
        assert!(pause(begin, Duration::from_millis(120)) || signal::stop_requested());
        assert!(begin.elapsed() >= Duration::from_millis(120) || signal::stop_requested());
    }
}
