//! The commands: arguments become a request, the request a plan, the plan a report.
//!
//! Every command has the same order: usage errors, refusals, consent, signals, work. Nothing is changed
//! before consent is given.

use std::io::{self, IsTerminal};

use super::args::{
    ArchiveCommand, Command, CopyArgs, InspectArgs, MergeArgs, RestoreArgs, ResumeArgs, VerifyArgs,
};
use super::confirm::confirmed;
use super::output::Output;
use super::progress::{observer, observer_of_several};
use super::signals::{interrupt, stop_on_signals};
use super::{pages, resolve, snapshot, watch};
use crate::base::{Error, Result};
use crate::op;
use crate::op::request::CopyRequest;
use crate::progress::Silent;
use crate::restore::ArchiveSource;

/// True if standard output carries an archive.
#[must_use]
pub fn stdout_is_data(command: &Command) -> bool {
    matches!(command, Command::Copy(args) if resolve::is_pipe(args))
}

/// Executes the command.
///
/// # Errors
/// The error that ends it; its kind decides the exit code.
pub fn run(command: &Command, output: Output) -> Result<()> {
    match command {
        Command::Attach(args) => {
            let request = resolve::attach(args)?;
            stop_on_signals(output)?;
            let attached = op::attach::attach(&request.device, &request.name, request.install_unit)?;
            output.report("attach", &attached)
        }
        Command::Detach(args) => {
            let request = resolve::detach(args)?;
            stop_on_signals(output)?;
            output.report("detach", &op::detach::detach(&request)?)
        }
        Command::Copy(args) => copy(args, output),
        Command::Snapshot(args) => snapshot::run(args, output),
        Command::Resume(args) => resume(args, output),
        Command::Restore(args) => restore(args, output),
        Command::Verify(args) => verify(args, output),
        Command::Inspect(args) => inspect(args, output),
        Command::Archive(args) => match &args.command {
            ArchiveCommand::Merge(args) => merge(args, output),
        },
        Command::Monitor(args) => snapshot::monitor(args, output),
        Command::Status(args) => match resolve::status(args)? {
            None => {
                let status = op::status::status()?;
                output.print_result("status", &status)?;
                if args.check { status.verdict() } else { Ok(()) }
            }
            Some(settings) => watch::watch(settings, output),
        },
        Command::Recover => recover(output),
        Command::Doctor => {
            let report = op::doctor::run();
            output.print_result("doctor", &report)?;
            report.verdict()
        }
        Command::Completions { shell } => output.result_text(&pages::completions(*shell)),
        Command::Man { directory: None } => output.result_text(&pages::man_pages()?[0].1),
        Command::Man { directory: Some(directory) } => {
            let count = pages::write_man_pages(directory)?;
            tracing::info!("{count} pages written to {}", directory.display());
            Ok(())
        }
    }
}

fn copy(args: &CopyArgs, output: Output) -> Result<()> {
    let mut requests = resolve::copy(args)?;
    if requests.len() > 1 {
        return copy_several(args, requests, output);
    }
    let mut request = requests.remove(0);
    if resolve::is_pipe(args) && !args.consent.dry_run && io::stdout().is_terminal() {
        return Err(
            Error::usage("an archive is not written to a terminal").next("pipe it somewhere, or name a file")
        );
    }
    // Planned as if consent were given, so that any other obstacle is reported first.
    request.replace = true;
    let mut plan = op::copy::plan(&request, &interrupt)?;
    let destroys = plan.destroys();
    if !confirmed(output, "copy", args.consent, destroys.as_deref(), &plan)? {
        return Ok(());
    }
    // Consent covers only what was shown: a file that appears later is not replaced.
    plan.request.replace = args.consent.yes || destroys.is_some();
    stop_on_signals(output)?;
    let observer = observer(output);
    let outcome = op::copy::run(&plan, observer.as_ref(), &interrupt)?;
    drop(observer);
    output.report("copy", &outcome)
}

fn copy_several(args: &CopyArgs, mut requests: Vec<CopyRequest>, output: Output) -> Result<()> {
    // As for one origin.
    requests.iter_mut().for_each(|request| request.replace = true);
    let mut plan = op::copy::group_plan::plan(&requests, &interrupt)?;
    if !confirmed(output, "copy", args.consent, plan.destroys().as_deref(), &plan)? {
        return Ok(());
    }
    for copy in &mut plan.copies {
        copy.request.replace = args.consent.yes || copy.destroys().is_some();
    }
    stop_on_signals(output)?;
    let observer = observer_of_several(output);
    let outcome = op::copy::group::run(&plan, observer.as_ref(), &interrupt)?;
    drop(observer);
    output.report("copy", &outcome)?;
    outcome.verdict()
}

fn resume(args: &ResumeArgs, output: Output) -> Result<()> {
    let plan = op::resume::plan(args.job.as_deref())?;
    stop_on_signals(output)?;
    let observer = observer(output);
    if args.dry_run {
        op::resume::check(&plan, observer.as_ref(), &interrupt)?;
        drop(observer);
        return output.plan("resume", &plan);
    }
    let outcome = op::resume::run(plan, observer.as_ref(), &interrupt)?;
    drop(observer);
    output.report("resume", &outcome)
}

fn restore(args: &RestoreArgs, output: Output) -> Result<()> {
    let mut plan = op::restore_plan::plan(&resolve::restore(args)?, &interrupt)?;
    let destroys = plan.target.overwrites.clone();
    if !confirmed(output, "restore", args.consent, destroys.as_deref(), &plan)? {
        return Ok(());
    }
    // Consent covers only what was shown: a file that appears later is not replaced.
    plan.request.replace = args.consent.yes || destroys.is_some();
    stop_on_signals(output)?;
    let observer = observer(output);
    let report = op::restore::run(&plan.request, observer.as_ref(), &interrupt)?;
    drop(observer);
    output.report("restore", &report)
}

fn merge(args: &MergeArgs, output: Output) -> Result<()> {
    let mut plan = op::archive_merge::plan(&resolve::merge(args)?, &interrupt)?;
    let destroys = plan.target.overwrites.clone();
    if !confirmed(output, "archive merge", args.consent, destroys.as_deref(), &plan)? {
        return Ok(());
    }
    // Consent covers only what was shown: a file that appears later is not replaced.
    plan.request.replace = args.consent.yes || destroys.is_some();
    stop_on_signals(output)?;
    let observer = observer(output);
    let report = op::archive_merge::run(&plan, observer.as_ref(), &interrupt)?;
    drop(observer);
    output.report("archive merge", &report)
}

fn verify(args: &VerifyArgs, output: Output) -> Result<()> {
    let request = resolve::verify(args)?;
    stop_on_signals(output)?;
    let observer = observer(output);
    if let ArchiveSource::Path(path) = &request.archive
        && request.against.is_none()
        && let Some(report) = op::raw_secondary::verify(path, observer.as_ref(), &interrupt)?
    {
        drop(observer);
        return output.report("verify", &report);
    }
    let report = op::verify::run(&request, observer.as_ref(), &interrupt)?;
    drop(observer);
    output.report("verify", &report)
}

fn inspect(args: &InspectArgs, output: Output) -> Result<()> {
    let request = resolve::inspect(args)?;
    stop_on_signals(output)?;
    if let Some(report) = op::raw_secondary::inspect(&request.archive)? {
        return output.print_result("inspect", &report);
    }
    let report = op::inspect::run(&request, &Silent, &interrupt)?;
    output.print_result("inspect", &report)
}

/// Cannot be interrupted: a signal is only noted, and the recovery runs to its end.
fn recover(output: Output) -> Result<()> {
    stop_on_signals(output)?;
    output.report("recover", &op::recover::recover()?)
}
