//! Entrances that are no commands: the watchdog process and, in test builds, a stack on its own.
//!
//! Looked at before the command line is parsed: a watchdog must start fast and must not fail over an
//! option.

use std::process::ExitCode;

use super::watchdog;

/// Runs a hidden entrance where the first argument names one; None for an ordinary command.
#[must_use]
pub fn run() -> Option<ExitCode> {
    let first = std::env::args_os().nth(1)?;
    if first == watchdog::ARGUMENT {
        return Some(watchdog::main());
    }
    #[cfg(feature = "vm")]
    if first == trial::ARGUMENT {
        return Some(trial::main());
    }
    None
}

/// A stack inserted and removed without a copy, for the VM cases.
#[cfg(feature = "vm")]
mod trial {
    use std::fs::OpenOptions;
    use std::io::{Read, Write};
    use std::path::{Path, PathBuf};
    use std::process::ExitCode;
    use std::time::Duration;

    use crate::base::{ChunkSize, Error, Result, ResultExt};
    use crate::dm::Dm;
    use crate::op::hooks::Hook;
    use crate::op::job::Job;
    use crate::op::stack::{InstantContext, Stack, StackRequest, crash_points};
    use crate::sys::signal;

    /// `__stack REPORT ORIGIN COW BUDGET-MS HOOK [MOUNT-POINT...]`: inserts, writes "in place ..." or
    /// the error to REPORT, waits for the end of standard input, removes. `__stack REPORT points`
    /// writes the names of all crash points.
    pub const ARGUMENT: &str = "__stack";

    pub fn main() -> ExitCode {
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

    fn tell(report: &Path, text: &str) -> Result<()> {
        let what = || format!("writing {}", report.display());
        let mut file = OpenOptions::new().create(true).append(true).open(report).io_context(what)?;
        writeln!(file, "{text}").io_context(what)
    }

    fn run(report: &Path, words: &[String]) -> Result<()> {
        if words == ["points"] {
            return tell(report, &crash_points().join("\n"));
        }
        let [origin, cow, budget, hook, mounts @ ..] = words else {
            return Err(Error::usage("__stack REPORT ORIGIN COW BUDGET-MS HOOK [MOUNT-POINT...]"));
        };
        signal::catch_termination()?;
        let request = StackRequest {
            origin: origin.clone(),
            cow: cow.parse()?,
            chunk: ChunkSize::default(),
            filesystems: mounts.iter().map(PathBuf::from).collect(),
            lock_filesystem: false,
            budget: Duration::from_millis(budget.parse().map_err(|_| Error::usage("a budget in ms"))?),
            all: false,
        };
        let dm = Dm::open()?;
        let mut job = Job::begin("trial")?;
        let path = PathBuf::from(origin);
        let interrupt = || {
            if signal::stop_requested() {
                return Err(Error::new(crate::base::ErrorKind::Interrupted, "asked to stop"));
            }
            Ok(())
        };
        let mut at_instant = |context: &InstantContext<'_>| {
            Hook {
                option: "--hook-frozen",
                command: hook,
                origin: &path,
                below: Some(context.below),
                deadline: Some(context.deadline),
            }
            .run(&interrupt)
        };
        let stack = match Stack::insert(&dm, &mut job, &request, &mut at_instant, &interrupt) {
            Ok(stack) => stack,
            Err(error) => {
                if error.failed_undos().is_empty() {
                    job.finish()?;
                }
                return Err(error);
            }
        };
        let times = stack.times();
        let (frozen, suspended) = (times.frozen.as_millis(), times.suspended.as_millis());
        tell(report, &format!("in place frozen_ms={frozen} suspended_ms={suspended}"))?;
        let mut rest = Vec::new();
        // A signal ends the wait as well as the end of the input does.
        let _ = std::io::stdin().read_to_end(&mut rest);
        let checked = stack.check_in_place(&dm).and_then(|()| {
            let status = stack.snapshot_status(&dm)?;
            tell(report, &format!("status {status:?}"))
        });
        stack.remove(&dm, &mut job)?;
        job.finish()?;
        checked
    }
}
