//! Entrances that are no commands: processes that help a command (watchdog, writing back) and, in test builds, parts of a
//! copy on their own.
//!
//! Looked at before the command line is parsed: a watchdog must start fast and must not fail over an
//! option.

use std::process::ExitCode;

use super::{recover, watchdog, write_back};

/// Runs a hidden entrance where the first argument names one; None for an ordinary command.
#[must_use]
pub fn run() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next()?;
    if first == watchdog::ARGUMENT {
        let job = arguments.next().and_then(|job| job.into_string().ok());
        let drop_loaded = job.clone().map(|job| move |process| recover::drop_loaded(&job, process));
        return Some(watchdog::main(drop_loaded, job.map(|job| move || recover::recover_job(&job))));
    }
    if first == write_back::ARGUMENT {
        return Some(write_back::main());
    }
    #[cfg(feature = "vm")]
    if first == trial::ARGUMENT {
        return Some(trial::main(trial::run));
    }
    #[cfg(feature = "vm")]
    if first == super::hidden_store::ARGUMENT {
        return Some(trial::main(super::hidden_store::run));
    }
    #[cfg(feature = "vm")]
    if first == free_map::ARGUMENT {
        return Some(free_map::main());
    }
    None
}

/// A stack inserted and removed without a copy, for the VM cases.
#[cfg(feature = "vm")]
pub(super) mod trial {
    use crate::volume::lvm_lock::LvmScope;
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

    /// Runs `run` with the report's path and the words behind it; an error is its last line.
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

    /// See [`ARGUMENT`].
    pub fn run(report: &Path, words: &[String]) -> Result<()> {
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
            planned: None,
            lvm_lock: LvmScope::Change,
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
        let standby = super::watchdog::Standby::start(job.id());
        let stack = match Stack::insert(&dm, &mut job, &request, &standby, &mut at_instant, &interrupt) {
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

/// The map of an origin's free space on its own, for the VM cases.
#[cfg(feature = "vm")]
mod free_map {
    use std::fmt::Write as _;
    use std::fs::{self, File};
    use std::io::Read as _;
    use std::path::{Path, PathBuf};
    use std::process::{Command, ExitCode};
    use std::time::Instant;

    use crate::base::{Error, Result, ResultExt};
    use crate::sys::freeze;
    use crate::volume::free::FreeMapper;

    /// `__free_map REPORT MAJOR:MINOR HOOK MOUNT-POINT...`: prepares, runs HOOK, freezes, reads the map of
    /// the device, writes it to REPORT ("free START END" and "log START END" in bytes, "note TEXT", "changed" where the second
    /// look at the devices finds others, "took MICROSECONDS"), waits for the end of standard input, thaws.
    pub const ARGUMENT: &str = "__free_map";

    pub fn main() -> ExitCode {
        let words: Vec<String> = std::env::args().skip(2).collect();
        let Some((report, words)) = words.split_first() else { return ExitCode::from(2) };
        let Err(error) = run(Path::new(report), words) else { return ExitCode::SUCCESS };
        match fs::write(report, format!("error {error}\n")) {
            Ok(()) => ExitCode::from(error.kind().exit_code()),
            Err(_) => ExitCode::from(99),
        }
    }

    fn run(report: &Path, words: &[String]) -> Result<()> {
        let [origin, hook, mounts @ ..] = words else {
            return Err(Error::usage("__free_map REPORT MAJOR:MINOR HOOK MOUNT-POINT..."));
        };
        let mounts: Vec<PathBuf> = mounts.iter().map(PathBuf::from).collect();
        let mapper = FreeMapper::prepare(origin.parse()?, &mounts)?;
        let hooked = Command::new("sh").args(["-ec", hook]).status().io_context(|| hook.clone())?;
        if !hooked.success() {
            return Err(Error::usage(format!("{hook}: {hooked}")));
        }
        let files = mounts.iter().map(|point| File::open(point).io_context(|| point.display().to_string()));
        let files = files.collect::<Result<Vec<File>>>()?;
        for file in &files {
            freeze::freeze(file).io_context(|| "freezing".to_owned())?;
        }
        let begin = Instant::now();
        let (free, picture) = mapper.read();
        let took = begin.elapsed();
        let mut text = String::new();
        if picture.still_holds() {
            for extent in &free.extents {
                let _ = writeln!(text, "free {} {}", extent.start().get(), extent.end().get());
            }
            for extent in &free.logs {
                let _ = writeln!(text, "log {} {}", extent.start().get(), extent.end().get());
            }
        } else {
            text.push_str("changed\n");
        }
        for note in &free.notes {
            let _ = writeln!(text, "note {note}");
        }
        let _ = writeln!(text, "took {}", took.as_micros());
        // Whole, or not there: the script waits for it.
        let unfinished = report.with_extension("new");
        let written = fs::write(&unfinished, text).and_then(|()| fs::rename(&unfinished, report));
        let written = written.io_context(|| report.display().to_string());
        let mut rest = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut rest);
        for file in files.iter().rev() {
            freeze::thaw(file).io_context(|| "thawing".to_owned())?;
        }
        written
    }
}
