//! Each command: what was typed becomes a request, the request a plan, the plan a report.
//!
//! The order is the same everywhere: usage errors, refusals, consent, signals, work. Nothing is
//! changed before consent is given.

use super::args::Command;
use super::output::Output;
use super::pages;
use crate::base::Result;

/// Carries the command out.
///
/// # Errors
/// Whatever ends it; the kind decides the exit code.
pub fn run(command: &Command, output: Output) -> Result<()> {
    match command {
        Command::Completions { shell } => output.result_text(&pages::completions(*shell)),
        Command::Man { directory: None } => output.result_text(&pages::man_pages()?[0].1),
        Command::Man { directory: Some(directory) } => {
            let count = pages::write_man_pages(directory)?;
            tracing::info!("{count} pages written to {}", directory.display());
            Ok(())
        }
    }
}
