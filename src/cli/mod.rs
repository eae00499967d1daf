//! Arguments, output, exit codes: the only layer that prints, asks, or decides how the process ends.
//!
//! [`main`] parses the arguments, dispatches to `op`, and turns the result into text and an exit code. It
//! knows nothing about devices: `op` does.

pub mod args;
pub mod confirm;
pub mod dispatch;
mod groups;
pub mod log;
pub mod meter;
pub mod options;
pub mod output;
pub mod pages;
mod plans;
pub mod progress;
pub mod reports;
pub mod resolve;
pub mod signals;
mod snapshot;
pub mod snapshot_args;
pub mod watch;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind as ClapErrorKind;

use args::Cli;
use output::{Output, write_stderr};

use crate::base::{Error, ErrorKind};

/// Runs the whole command. The exit code is one of the README's table.
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

/// Prints help or version (exit 0, standard output), or the fault in the command line (exit 2).
fn usage_exit(error: &clap::Error) -> ExitCode {
    // Searched for, as nothing was parsed: `--json` must apply to the error that stopped the parsing.
    let json = std::env::args_os().take_while(|word| word != "--").any(|word| word == "--json");
    let is_help = matches!(error.kind(), ClapErrorKind::DisplayHelp | ClapErrorKind::DisplayVersion);
    if json && !is_help {
        let text = error.render().to_string();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let what = lines.next().unwrap_or("bad command line").trim_start_matches("error: ").to_owned();
        let next = lines.find(|line| line.starts_with("tip:")).unwrap_or("see --help").to_owned();
        write_stderr(&output::json_error(&Error::usage(what).next(next)));
    } else if error.print().is_err() {
        // Standard output or standard error has no reader.
        return ExitCode::from(if is_help { 1 } else { ErrorKind::Usage.exit_code() });
    }
    ExitCode::from(if is_help { 0 } else { ErrorKind::Usage.exit_code() })
}
