//! Chooses the destination and the form of output: results go to standard output, everything else to standard
//! error, as text or as JSON lines.
//!
//! Every JSON line is an object that begins with `"tidemark": 1` (the version of these lines) and a `"type"`:
//! `plan`, `progress`, `result`, `error`, `log`. Errors and logs go to standard error, the rest to standard
//! output. If standard output carries an archive, everything goes to standard error.
//!
//! A failed write of progress is ignored (there is no reader, and the copy continues); a failed write of a
//! result is an error.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;

use indicatif::ProgressBar;
use serde::Serialize;

use super::args::Global;
use super::reports::Human;
use crate::base::{Error, Result, ResultExt, escape};

/// Version of the JSON lines: increased when a reader of the old ones would misread the new ones.
pub const JSON_VERSION: u32 = 1;

/// The progress bar on the terminal, if there is one: other text on that terminal is written above it.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Draws this bar on standard error; None stops drawing.
pub fn set_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = bar;
}

/// Writes whole lines to standard error, above the progress bar. A failed write cannot be reported anywhere.
pub fn write_stderr(text: &str) {
    let bar = BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let write = || {
        let mut stderr = io::stderr().lock();
        let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
    };
    match bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// One JSON line, ready to be written.
#[derive(Serialize)]
struct Line<'a, T: Serialize> {
    tidemark: u32,
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(flatten)]
    body: T,
}

/// `{"tidemark":1,"type":kind,...}` with a newline; `body` must serialize to an object.
pub fn json_line(kind: &str, body: impl Serialize) -> String {
    let line = Line { tidemark: JSON_VERSION, kind, body };
    let text = serde_json::to_string(&line).expect("our own values have string keys and serialize");
    let mut text = escape::json(text);
    text.push('\n');
    text
}

/// The output settings of this run.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON lines instead of text.
    pub json: bool,
    /// No progress, no report.
    pub quiet: bool,
    /// Standard output carries an archive.
    pub stdout_is_data: bool,
}

impl Output {
    /// From the options.
    #[must_use]
    pub fn new(global: Global, stdout_is_data: bool) -> Self {
        Self { json: global.json, quiet: global.quiet, stdout_is_data }
    }

    /// Writes text to the destination of results.
    ///
    /// # Errors
    /// The failed write.
    pub fn result_text(&self, text: &str) -> Result<()> {
        if self.stdout_is_data {
            write_stderr(text);
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
            .io_context(|| "writing the result to standard output".to_owned())
    }

    /// Prints what a command did: as text unless `--quiet`, or as a JSON line `result`.
    ///
    /// # Errors
    /// The failed write.
    pub fn report<T: Human + Serialize>(&self, command: &str, report: &T) -> Result<()> {
        if self.json || !self.quiet { self.print_result(command, report) } else { Ok(()) }
    }

    /// Prints what the user asked for (`inspect`, `status`), even with `--quiet`.
    ///
    /// # Errors
    /// The failed write.
    pub fn print_result<T: Human + Serialize>(&self, command: &str, report: &T) -> Result<()> {
        #[derive(Serialize)]
        struct Body<'a, T> {
            command: &'a str,
            report: &'a T,
        }
        if self.json {
            self.result_text(&json_line("result", Body { command, report }))
        } else {
            self.result_text(&with_newline(report.human()))
        }
    }

    /// Prints the plan for `--dry-run`.
    ///
    /// # Errors
    /// The failed write.
    pub fn plan<T: Human + Serialize>(&self, command: &str, plan: &T) -> Result<()> {
        #[derive(Serialize)]
        struct Body<'a, T> {
            command: &'a str,
            plan: &'a T,
        }
        if self.json {
            self.result_text(&json_line("plan", Body { command, plan }))
        } else {
            self.result_text(&with_newline(plan.human()))
        }
    }

    /// Prints a message for the user on standard error, even with `--quiet`.
    pub fn note(&self, text: &str) {
        #[derive(Serialize)]
        struct Body<'a> {
            level: &'a str,
            message: &'a str,
        }
        write_stderr(&if self.json {
            json_line("log", Body { level: "INFO", message: text })
        } else {
            with_newline(text.to_owned())
        });
    }

    /// Prints the error that ends the run, on standard error.
    pub fn error(&self, error: &Error) {
        set_bar(None);
        write_stderr(&if self.json { json_error(error) } else { text_error(error, stderr_has_colour()) });
    }
}

/// Escapes our text, which may contain untrusted names, and ends it with a newline.
fn with_newline(text: String) -> String {
    let mut text = escape::text(&text).into_owned();
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// True if text on standard error may be coloured: it is a terminal, and NO_COLOR (any non-empty value, see
/// no-color.org) is not set.
#[must_use]
pub fn stderr_has_colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
    io::stderr().is_terminal() && !refused && !dumb
}

/// `tidemark: what: cause`, then the state, what could not be undone, and the next step.
#[must_use]
pub fn text_error(error: &Error, colour: bool) -> String {
    let (red, bold, plain) = if colour { ("\x1b[31;1m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
    let mut text = format!("{red}tidemark{plain}: {}\n", escape::text(&error.to_string()));
    if let Some(state) = error.state_left() {
        text.push_str(&format!("  {bold}state:{plain} {}\n", escape::text(state)));
    }
    for undo in error.failed_undos() {
        text.push_str(&format!("  {bold}not undone:{plain} {}\n", escape::text(&undo.to_string())));
    }
    if let Some(next) = error.next_step() {
        text.push_str(&format!("  {bold}next:{plain} {}\n", escape::text(next)));
    }
    text
}

/// One JSON line of type `error`.
#[must_use]
pub fn json_error(error: &Error) -> String {
    #[derive(Serialize)]
    struct Undo {
        kind: &'static str,
        what: String,
        errno: Option<i32>,
    }
    #[derive(Serialize)]
    struct Body<'a> {
        kind: &'static str,
        what: &'a str,
        message: String,
        errno: Option<i32>,
        state: Option<&'a str>,
        next: Option<&'a str>,
        undo: Vec<Undo>,
        exit_code: u8,
    }
    let undo = error.failed_undos().iter();
    json_line(
        "error",
        Body {
            kind: error.kind().name(),
            what: error.what(),
            message: error.to_string(),
            errno: error.errno(),
            state: error.state_left(),
            next: error.next_step(),
            undo: undo
                .map(|undo| Undo { kind: undo.kind().name(), what: undo.to_string(), errno: undo.errno() })
                .collect(),
            exit_code: error.exit_code(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ErrorKind;

    fn example() -> Error {
        Error::io("write of 4096 bytes at 0 of x", io::Error::from_raw_os_error(libc::ENOSPC))
            .state("the origin is untouched")
            .next("free some space")
            .with_failed_undo(Error::new(ErrorKind::Kernel, "resume of y"))
    }

    #[test]
    fn an_error_is_laid_out_line_by_line() {
        assert_eq!(
            text_error(&example(), false),
            "tidemark: write of 4096 bytes at 0 of x: No space left on device (os error 28)\n  \
             state: the origin is untouched\n  not undone: resume of y\n  next: free some space\n"
        );
        assert!(text_error(&example(), true).contains("\x1b["));
    }

    #[test]
    fn an_error_is_one_json_line() {
        let line = json_error(&example());
        assert_eq!(line.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["tidemark"], 1);
        assert_eq!(value["type"], "error");
        assert_eq!(value["kind"], "no-space");
        assert_eq!(value["errno"], libc::ENOSPC);
        assert_eq!(value["undo"][0]["kind"], "kernel");
        assert_eq!(value["exit_code"], 1);
    }
}
