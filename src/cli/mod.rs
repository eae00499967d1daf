//! Arguments, output, exit codes: the only layer that prints, asks or decides how the process ends.
//!
//! [`main`] parses, catches signals, dispatches to `op`, and turns what comes back into words and an
//! exit code. It holds no knowledge of devices: that is `op`'s.

pub mod args;
pub mod confirm;
pub mod dispatch;
pub mod log;
pub mod meter;
pub mod output;
pub mod pages;
pub mod progress;
pub mod reports;
pub mod resolve;
pub mod watch;

use std::process::ExitCode;
use std::thread;

use clap::Parser;
use clap::error::ErrorKind as ClapErrorKind;

use args::Cli;
use output::{Output, talk};

use crate::base::{Error, ErrorKind, Result};
use crate::sys::signal::{self, Arrived};

/// The whole run; the exit code is the one of the README's table.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage_exit(&error),
    };
    let output = Output::new(cli.global, dispatch::stdout_is_data(&cli.command));
    match log::init(cli.global).and_then(|()| dispatch::run(&cli.command, output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Help and version (exit 0, standard output), or what is wrong with the command line (exit 2).
fn usage_exit(error: &clap::Error) -> ExitCode {
    // Not parsed, so looked for: `--json` must hold for the very error that stops the parsing.
    let json = std::env::args_os().take_while(|word| word != "--").any(|word| word == "--json");
    let is_help = matches!(error.kind(), ClapErrorKind::DisplayHelp | ClapErrorKind::DisplayVersion);
    if json && !is_help {
        let text = error.render().to_string();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let what = lines.next().unwrap_or("bad command line").trim_start_matches("error: ").to_owned();
        let next = lines.find(|line| line.starts_with("tip:")).unwrap_or("see --help").to_owned();
        talk(&output::json_error(&Error::usage(what).next(next)));
    } else if error.print().is_err() {
        // Nobody reads it.
        return ExitCode::from(if is_help { 1 } else { ErrorKind::Usage.exit_code() });
    }
    ExitCode::from(if is_help { 0 } else { ErrorKind::Usage.exit_code() })
}

/// From here on a signal is a request to stop, which the operation's `interrupt` notices; somebody
/// who waits is told at once, and told again for each further signal. SIGUSR1 shows how far the operation is.
///
/// # Errors
/// The kernel's refusal to catch signals or to start a thread.
pub fn stop_on_signals(output: Output) -> Result<()> {
    signal::catch_termination()?;
    let spawned = thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Err(error) = signal::take_questions() {
            tracing::debug!("SIGUSR1 is not answered: {error}");
        }
        let mut seen = Arrived::default();
        while let Some(arrived) = signal::wait(seen) {
            if arrived.questions != seen.questions {
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
