//! Before something is destroyed: is that what the user wants?

use std::io::{self, BufRead, IsTerminal};

use super::output::talk;
use crate::base::{Error, ErrorKind, Result, ResultExt, escape};

/// True where a question can be put and answered: both ends are a terminal.
#[must_use]
pub fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// The refusal where nobody can be asked.
#[must_use]
pub fn needs_yes(destroys: &str) -> Error {
    Error::refused(format!("{destroys}, and there is no terminal to ask for consent"))
        .state("nothing was changed")
        .next("pass --yes if that is what you want; --dry-run shows the plan")
}

/// Shows `plan` and asks; returns only where the answer is yes.
///
/// # Errors
/// [`ErrorKind::Refused`] for any other answer, or the failed read.
pub fn ask(plan: &str, destroys: &str) -> Result<()> {
    talk(&escape::text(&format!("{}\n\n{destroys}. Go on? [y/N] ", plan.trim_end())));
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).io_context(|| "reading the answer".to_owned())?;
    if matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Refused, "not confirmed").state("nothing was changed"))
}
