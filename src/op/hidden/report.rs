//! The report and exit code of an entry point for the VM cases.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::base::{Result, ResultExt as _};

/// Runs `run` with the report's path and the following words. An error becomes the report's last line.
pub fn main(run: impl Fn(&Path, &[String]) -> Result<()>) -> ExitCode {
    let words: Vec<String> = std::env::args().skip(2).collect();
    let Some((report, words)) = words.split_first() else { return ExitCode::from(2) };
    let report = PathBuf::from(report);
    match run(&report, words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let undos: Vec<_> = error.failed_undos().iter().map(ToString::to_string).collect();
            let text = format!("error {}: {error} {undos:?}", error.kind().name());
            match tell(&report, &text) {
                Ok(()) => ExitCode::from(error.kind().exit_code()),
                Err(_) => ExitCode::from(99),
            }
        }
    }
}

/// Adds a line to the report.
pub fn tell(report: &Path, text: &str) -> Result<()> {
    let what = || format!("writing {}", report.display());
    let mut file = OpenOptions::new().create(true).append(true).open(report).io_context(what)?;
    writeln!(file, "{text}").io_context(what)
}
