//! Asks for consent before something is destroyed.

use std::io::{self, BufRead, IsTerminal};

use serde::Serialize;

use super::options::Consent;
use super::output::{Output, write_stderr};
use super::reports::Human;
use crate::base::{Error, ErrorKind, Result, ResultExt, escape};

/// True if the user can be asked: standard input and standard error are terminals.
#[must_use]
pub fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// The refusal if the user cannot be asked.
#[must_use]
pub fn needs_yes(destroys: &str) -> Error {
    Error::refused(format!("{destroys}, and there is no terminal to ask for consent"))
        .state("nothing was changed")
        .next("pass --yes if that is what you want; --dry-run shows the plan")
}

/// Shows `plan` and asks. Returns Ok only if the answer is yes.
///
/// # Errors
/// [`ErrorKind::Refused`] for any other answer, or the failed read.
pub fn ask(plan: &str, destroys: &str) -> Result<()> {
    write_stderr(&escape::text(&format!("{}\n\n{destroys}. Continue? [y/N] ", plan.trim_end())));
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).io_context(|| "reading the answer".to_owned())?;
    if matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Refused, "not confirmed").state("nothing was changed"))
}

/// With `--dry-run`, shows the plan and returns false. Otherwise asks for consent if something would be
/// destroyed and `--yes` was not given.
pub fn confirmed<P: Human + Serialize>(
    output: Output,
    command: &str,
    consent: Consent,
    destroys: Option<&str>,
    plan: &P,
) -> Result<bool> {
    if consent.dry_run {
        output.plan(command, plan)?;
        return Ok(false);
    }
    match destroys {
        Some(destroys) if !consent.yes => {
            if !can_ask() {
                return Err(needs_yes(destroys));
            }
            ask(&plan.human(), destroys)?;
        }
        _ => {}
    }
    Ok(true)
}
