//! `tidemark status --watch`: looks again and again.
//!
//! On a terminal each look replaces the last one, as watch(1) does; elsewhere one follows the other, with
//! an empty line between, or as JSON lines. A signal is how a watch ends, so it is no error.

use std::io::{self, IsTerminal as _};
use std::thread;
use std::time::{Duration, Instant};

use super::output::Output;
use super::reports::Human as _;
use super::resolve::Looks;
use crate::base::{Result, clock};
use crate::op::status::status;
use crate::sys::signal;

/// Longest time between two looks for a signal.
const SIGNAL_POLL: Duration = Duration::from_millis(50);

/// To the upper left corner. The old text is overwritten and not wiped first, which would flicker.
const HOME: &str = "\x1b[H";

/// Wipes the rest of the line.
const WIPE_LINE: &str = "\x1b[K";

/// Wipes everything below.
const WIPE_BELOW: &str = "\x1b[J";

/// Wipes everything.
const WIPE_ALL: &str = "\x1b[2J";

/// Looks until a signal or the last look.
///
/// # Errors
/// A look's that fails; the failed write.
pub fn watch(looks: Looks, output: Output) -> Result<()> {
    signal::catch_termination()?;
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    let is_redrawn = !output.json && io::stdout().is_terminal() && !dumb;
    let mut seen = 0u64;
    loop {
        let begin = Instant::now();
        let status = status()?;
        if is_redrawn {
            let now = clock::utc_text(clock::utc_now_ns()).unwrap_or_default();
            let text = format!("every {:?}  {now}\n\n{}", looks.interval, status.human());
            output.result_text(&screen(&text, seen == 0))?;
        } else {
            if seen > 0 && !output.json {
                output.result_text("\n")?;
            }
            output.answer("status", &status)?;
        }
        seen += 1;
        if looks.count.is_some_and(|count| seen >= count) || !pause(begin, looks.interval) {
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

/// `text` in the place of whatever the terminal shows.
fn screen(text: &str, is_first: bool) -> String {
    let begin = if is_first { WIPE_ALL } else { "" };
    format!("{begin}{HOME}{}{WIPE_BELOW}", text.replace('\n', &format!("{WIPE_LINE}\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_last_look_stays_on_the_screen() {
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
